//! Automation of this repository: `cargo xtask setup`, `test`, `demo`, `lint`, `audit`, `api`, `docs`, `fixtures`, `coverage`, `mutants`,
//! `fuzz`, `bench`, `sanitize`, `cross`, `package`, `publish`.

mod api;
mod audit;
mod bench;
#[path = "../../crates/mlx-sys/build/cache.rs"]
#[expect(
    unreachable_pub,
    reason = "the file is shared with the build script of mlx-sys"
)]
mod cache;
mod coverage;
mod cross;
mod demo;
mod docs;
mod downloads;
mod error;
mod fetch;
mod fixtures;
mod fuzz;
mod gemma;
mod layers;
mod lint;
mod mutants;
mod oracle;
mod package;
mod packages;
mod progress;
mod publish;
mod sanitize;
mod setup;
mod staging;
mod test;
mod tidy;
mod unpack;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Automation of this repository",
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch MLX, the mlx-c sources, libclang (where none is installed) and the test model into the cache
    Setup(setup::Args),
    /// Run every test: with MLX, the documentation, and once more without MLX
    Test(test::Args),
    /// Ask the test model a question, with real MLX
    Demo,
    /// Check formatting, clippy, the layers, house rules and the documentation
    Lint,
    /// List what each crate shows to others
    Api(api::Args),
    /// Have other tools look at dependencies and features
    Audit(audit::Args),
    /// Write what the documentation takes from the code
    Docs(docs::Args),
    /// Make the oracle fixtures again with mlx-lm
    Fixtures(fixtures::Args),
    /// Say how many of each crate's lines the tests run
    Coverage(coverage::Args),
    /// Put faults into the code one by one, and say which no test notices
    Mutants(mutants::Args),
    /// Run the fuzz targets, each for a while
    Fuzz(fuzz::Args),
    /// Run the benches, or the peers in turn with ours
    Bench(bench::Args),
    /// Run the tests of the kernels under valgrind
    Sanitize(sanitize::Args),
    /// Run the tests of the kernels for Arm, emulated
    Cross(cross::Args),
    /// Pack the command and what it needs of MLX into an archive that runs on another machine
    Package(package::Args),
    /// List the crates in the order in which they are published, or publish them
    Publish(publish::Args),
}

fn main() -> ExitCode {
    if let Some(code) = coverage::compiler::stand_in().or_else(api::stand_in) {
        return code;
    }
    let done = match Cli::parse().command {
        Command::Setup(args) => setup::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Demo => demo::run(),
        Command::Lint => lint::run(),
        Command::Api(args) => api::run(&args),
        Command::Audit(args) => audit::run(&args),
        Command::Docs(args) => docs::run(&args),
        Command::Fixtures(args) => fixtures::run(&args),
        Command::Coverage(args) => coverage::run(&args),
        Command::Mutants(args) => mutants::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Sanitize(args) => sanitize::run(&args),
        Command::Cross(args) => cross::run(&args),
        Command::Package(args) => package::run(&args),
        Command::Publish(args) => publish::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
