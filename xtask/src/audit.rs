//! `cargo xtask audit`: what other tools find in the dependencies and the features.

use crate::error::{Error, Result};
use crate::workspace::{cargo, on_path, run as go, spell};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave out what needs the network: the database of known faults in dependencies
    #[arg(long)]
    offline: bool,

    /// The checks to run; all where there are none
    #[arg(value_name = "CHECK", value_parser = clap::builder::PossibleValuesParser::new(CHECKS.map(|check| check.name)))]
    checks: Vec<String>,
}

/// A tool, and what it is called with.
#[derive(Debug, Clone, Copy)]
struct Check {
    name: &'static str,
    tool: &'static str,
    purpose: &'static str,
    arguments: fn(&Args) -> Vec<&'static str>,
}

const CHECKS: [Check; 3] = [
    Check {
        name: "dependencies",
        tool: "cargo-deny",
        purpose: "looking for licences, duplicates, sources and known faults of dependencies",
        arguments: |args| {
            if args.offline {
                vec!["deny", "--offline", "check", "licenses", "bans", "sources"]
            } else {
                vec!["deny", "check"]
            }
        },
    },
    Check {
        name: "unused",
        tool: "cargo-machete",
        purpose: "looking for dependencies that nothing uses",
        arguments: |_| vec!["machete"],
    },
    // Metal and CUDA are of machines that this one is not, and mlx-sys has upstream's interface.
    Check {
        name: "features",
        tool: "cargo-hack",
        purpose: "building each feature alone",
        arguments: |_| {
            let words = "hack check --workspace --exclude mlx-sys --exclude mlx-engine-models --each-feature --no-dev-deps";
            words.split(' ').collect()
        },
    },
];

pub(crate) fn run(args: &Args) -> Result<()> {
    let chosen = CHECKS
        .iter()
        .filter(|check| args.checks.is_empty() || args.checks.iter().any(|name| name == check.name));
    for check in chosen {
        if !on_path(check.tool) {
            return Err(Error::MissingTool {
                tool: check.tool.to_owned(),
                purpose: check.purpose,
                install: "install it (cargo install --locked cargo-deny cargo-machete cargo-hack) and run the command again",
            });
        }
        let mut command = cargo();
        command.args((check.arguments)(args));
        println!("audit: {} ({})", check.name, spell(&command));
        go(&mut command)?;
    }
    println!("audit: all is well");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_network_known_faults_are_left_out() {
        let words = |offline| {
            let args = Args {
                offline,
                checks: Vec::new(),
            };
            (CHECKS[0].arguments)(&args).join(" ")
        };
        assert_eq!(words(false), "deny check");
        assert!(!words(true).contains("advisories") && words(true).contains("--offline"));
    }
}
