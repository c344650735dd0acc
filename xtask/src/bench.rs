//! `cargo xtask bench`: the benches of the workspace, with the test model at hand, or the peers in turn with ours.

mod baseline;
mod curves;
mod llama;
mod machine;
mod mlx_lm;
mod ours;
mod peers;
mod plot;
mod process;
mod report;

use std::path::PathBuf;

use crate::error::Result;
use crate::packages::{self, Package};
use crate::setup;
use crate::workspace::{cargo, run as go, spell};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run llama.cpp and mlx-lm in turn with ours, print how they compare and draw how speeds change with streams,
    /// context and threads; llama.cpp is fetched and built on the first call, for about ten minutes
    #[arg(long)]
    peers: bool,

    /// Rounds of each in turn, whose medians are compared
    #[arg(long, value_name = "N", default_value_t = 3, requires = "peers", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Measure the table alone, without the curves
    #[arg(long, requires = "peers")]
    no_curves: bool,

    /// Compare with a report.json that an earlier call wrote, and fail where a figure has become worse
    #[arg(long, value_name = "FILE", requires = "peers")]
    baseline: Option<PathBuf>,

    /// By how much a figure may be worse than in the baseline; the same machine drifts by 15
    #[arg(long, value_name = "PERCENT", default_value_t = 15, requires = "baseline", value_parser = clap::value_parser!(u32).range(0..=1000))]
    threshold: u32,

    /// Arguments for criterion, such as part of a bench's name
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    selection: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.peers {
        return peers::run(peers::Options {
            rounds: args.rounds,
            curves: !args.no_curves,
            baseline: args.baseline.as_deref().map(|path| (path, args.threshold)),
        });
    }
    let workspace = packages::read()?;
    let jobs: Vec<_> = workspace.packages.iter().filter_map(arguments).collect();
    if jobs.is_empty() {
        println!("bench: there is nothing to run: no package of this workspace has a bench target");
        return Ok(());
    }
    let cache = setup::fill(None, false)?;
    for job in &jobs {
        let mut command = cargo();
        command.arg("bench").args(job).arg("--").args(&args.selection);
        command.env("MLX_ENGINE_TEST_MODEL", cache.test_model());
        println!("bench: {}", spell(&command));
        go(&mut command)?;
    }
    println!("bench: {} packages done", jobs.len());
    Ok(())
}

/// What selects the benches of a package, if it has some. By name, since criterion's options are none of the unit
/// tests' that `cargo bench` would run too.
fn arguments(package: &Package) -> Option<Vec<String>> {
    let benches: Vec<_> = package
        .targets
        .iter()
        .filter(|target| target.kinds.iter().any(|kind| kind == "bench"))
        .collect();
    if benches.is_empty() {
        return None;
    }
    let mut arguments = vec!["-p".to_owned(), package.name.clone()];
    for bench in benches {
        arguments.extend(["--bench".to_owned(), bench.name.clone()]);
        for feature in &bench.required_features {
            arguments.extend(["--features".to_owned(), feature.clone()]);
        }
    }
    Some(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packages::Target;
    use crate::packages::tests::sample;

    fn target(name: &str, kind: &str, features: &[&str]) -> Target {
        Target {
            name: name.to_owned(),
            kinds: vec![kind.to_owned()],
            source: "x.rs".into(),
            required_features: features.iter().map(|feature| (*feature).to_owned()).collect(),
        }
    }

    #[test]
    fn benches_are_named_with_their_features() {
        let mut package = sample("mlx-engine-kernels", &[]);
        assert_eq!(arguments(&package), None);
        package.targets = vec![target("lib", "lib", &[]), target("matmul", "bench", &["simd"])];
        assert_eq!(
            arguments(&package).unwrap().join(" "),
            "-p mlx-engine-kernels --bench matmul --features simd"
        );
    }
}
