//! `cargo xtask mutants`: faults put into the code one by one, each of which a test has to notice.
//!
//! Run over the parts that everything rests on and that are decided without MLX, so that each is built and tested in
//! seconds.

use std::fs;

use crate::error::{Context, Error, Result};
use crate::packages;
use crate::workspace::{cargo, on_path, run as go, spell};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The K-th of N parts of the faults, such as 0/8: all of them take hours
    #[arg(long, value_name = "K/N")]
    shard: Option<String>,

    /// Faults that are tried at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    jobs: u32,

    /// The parts to put faults into: all where there are none
    #[arg(value_name = "PART", value_parser = clap::builder::PossibleValuesParser::new(PARTS.map(|part| part.name)))]
    parts: Vec<String>,
}

/// Code, and what selects the tests that have to notice.
#[derive(Debug, Clone, Copy)]
struct Part {
    name: &'static str,
    package: &'static str,
    files: &'static [&'static str],
}

const PARTS: [Part; 5] = [
    Part {
        name: "core",
        package: "mlx-engine-core",
        files: &["crates/core/src/**/*.rs"],
    },
    Part {
        name: "registry",
        package: "mlx-engine-registry",
        files: &["crates/registry/src/**/*.rs"],
    },
    Part {
        name: "scheduler",
        package: "mlx-engine-engine",
        files: &["crates/engine/src/scheduler/*.rs"],
    },
    Part {
        name: "parser",
        package: "mlx-engine-text",
        files: &["crates/text/src/parser/*.rs", "crates/text/src/stop.rs"],
    },
    Part {
        name: "breaker",
        package: "mlx-engine-resilience",
        files: &["crates/resilience/src/breaker.rs"],
    },
];

pub(crate) fn run(args: &Args) -> Result<()> {
    if !on_path("cargo-mutants") {
        return Err(Error::MissingTool {
            tool: "cargo-mutants".to_owned(),
            purpose: "putting faults into the code",
            install: "install it (cargo install --locked cargo-mutants) and run the command again",
        });
    }
    let folder = packages::read()?.target.join("mutants");
    fs::create_dir_all(&folder).context("make the folder", &folder)?;
    let chosen = PARTS
        .iter()
        .filter(|part| args.parts.is_empty() || args.parts.iter().any(|name| name == part.name));
    let mut survived = Vec::new();
    for part in chosen {
        let out = folder.join(part.name);
        fs::create_dir_all(&out).context("make the folder", &out)?;
        let mut command = cargo();
        command.args(arguments(part, args)).arg("--output").arg(&out);
        println!("mutants: {} ({})", part.name, spell(&command));
        if go(&mut command).is_err() {
            survived.push(format!(
                "{}: see {}",
                part.name,
                out.join("mutants.out").display()
            ));
        }
    }
    if survived.is_empty() {
        println!("mutants: a test noticed each fault");
        return Ok(());
    }
    Err(Error::Refused(format!(
        "not every fault was noticed\n  {}",
        survived.join("\n  ")
    )))
}

fn arguments(part: &Part, args: &Args) -> Vec<String> {
    let mut words: Vec<String> = [
        "mutants",
        "--no-shuffle",
        "--colors=never",
        "--package",
        part.package,
    ]
    .map(str::to_owned)
    .to_vec();
    for file in part.files {
        words.extend(["--file".to_owned(), (*file).to_owned()]);
    }
    words.push("--no-default-features".to_owned());
    words.extend(["--jobs".to_owned(), args.jobs.to_string()]);
    if let Some(shard) = &args.shard {
        words.extend(["--shard".to_owned(), shard.clone()]);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace;

    #[test]
    fn every_part_is_there() {
        let packages = packages::read().unwrap().packages;
        for part in PARTS {
            assert!(
                packages.iter().any(|package| package.name == part.package),
                "{part:?}"
            );
            for file in part.files {
                let folder = file.split('*').next().unwrap();
                assert!(workspace::root().join(folder).exists(), "{file}");
            }
        }
    }

    #[test]
    fn a_part_is_tested_without_mlx() {
        let args = Args {
            shard: Some("0/8".to_owned()),
            jobs: 2,
            parts: Vec::new(),
        };
        assert_eq!(
            arguments(&PARTS[4], &args).join(" "),
            "mutants --no-shuffle --colors=never --package mlx-engine-resilience --file crates/resilience/src/breaker.rs \
             --no-default-features --jobs 2 --shard 0/8"
        );
    }
}
