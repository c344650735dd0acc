//! The `mlx-engine` command: a thin user of the facade.
//!
//! Results go to stdout and everything else to stderr. Exit codes: 0 success, 1 failure, 2 usage, 130 interrupted.

mod args;
mod bench;
mod cached;
mod chat;
#[cfg(feature = "mlx")]
mod convert;
mod criteria;
mod doctor;
mod failure;
mod generate;
mod input;
mod load;
mod models;
mod optimize;
mod output;
#[cfg(feature = "hub")]
mod pull;
#[cfg(all(test, unix, feature = "hub", feature = "mlx"))]
mod reference;
mod registry;
mod score;
mod show;
mod stats;
mod table;
mod tokenize;
mod tools;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::failure::Failure;

fn main() -> ExitCode {
    #[cfg_attr(
        not(all(unix, feature = "otlp")),
        expect(unused_mut, reason = "there are no spans to send")
    )]
    let mut cli = Cli::parse();
    #[cfg(feature = "otlp")]
    let otlp = match cli.otlp.as_deref().map(spans).transpose() {
        Ok(otlp) => otlp,
        Err(failure) => return failure.report(),
    };
    #[cfg(unix)]
    if let Command::ServeEngine = cli.command {
        let served = mlx_engine::serve_child_then(move || {
            #[cfg(feature = "otlp")]
            send_rest(otlp);
        });
        return match served {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => Failure::from(error).report(),
        };
    }
    #[cfg(all(unix, feature = "otlp"))]
    if let Some(model) = cli.command.model() {
        model.otlp.clone_from(&cli.otlp);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return Failure::other(format!("the runtime could not be started: {error}")).report(),
    };
    // The others end at the first one, or take it as their own.
    if let Command::Generate(_) | Command::Score(_) | Command::Bench(_) = cli.command {
        runtime.spawn(end_at_second_interrupt());
    }
    let result = runtime.block_on(async {
        match cli.command {
            Command::Generate(args) => generate::run(args).await,
            Command::Chat(args) => chat::run(args).await,
            Command::Score(args) => score::run(args).await,
            Command::Tokenize(args) => tokenize::run(&args).await,
            Command::Bench(args) => bench::run(args).await,
            #[cfg(feature = "mlx")]
            Command::Convert(args) => convert::run(args).await,
            Command::Optimize(args) => optimize::run(args).await,
            Command::Models(args) => models::run(&args).await,
            Command::Doctor(args) => doctor::run(&args).await,
            // It was served above, before there was a runtime.
            #[cfg(unix)]
            Command::ServeEngine => Ok(()),
        }
    });
    // A read of stdin that nobody waits for must not hold the process up.
    runtime.shutdown_background();
    #[cfg(feature = "otlp")]
    send_rest(otlp);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// Sends the spans of requests and steps to a collector from now on.
#[cfg(feature = "otlp")]
fn spans(endpoint: &str) -> Result<mlx_engine::otlp::Otlp, Failure> {
    let failed = |error: mlx_engine::otlp::OtlpError| Failure::usage(error.to_string());
    let otlp =
        mlx_engine::otlp::Otlp::start(&mlx_engine::otlp::OtlpOptions::new(endpoint)).map_err(failed)?;
    otlp.install().map_err(failed)?;
    Ok(otlp)
}

/// Sends the spans that wait, and no more from then on.
#[cfg(feature = "otlp")]
fn send_rest(otlp: Option<mlx_engine::otlp::Otlp>) {
    if let Some(Err(error)) = otlp.map(mlx_engine::otlp::Otlp::shutdown) {
        output::errln!("warning: {error}");
    }
}

/// The first Ctrl-C is the commands': they end what they do. The second ends the process, whatever it is at.
async fn end_at_second_interrupt() {
    for _ in 0..2 {
        if tokio::signal::ctrl_c().await.is_err() {
            return;
        }
    }
    // At once: what runs at an ordinary exit would wait for the step that is being computed.
    signal_hook::low_level::exit(130);
}
