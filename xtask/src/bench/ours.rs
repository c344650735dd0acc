//! Our own program, and what it reaches.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::process::{Done, measured};
use crate::error::{Error, Result};
use crate::workspace::{cargo, run as go};

/// Tokens a second: of what was fed, and of what was made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Speeds {
    pub(crate) prefill: f64,
    pub(crate) decode: f64,
}

/// The command, built as users build it, and the model.
pub(crate) struct Ours {
    program: PathBuf,
    model: PathBuf,
}

impl Ours {
    /// Builds the command with optimisation.
    pub(crate) fn ready(target: &Path, model: &Path) -> Result<Self> {
        go(cargo().args(["build", "--release", "-p", "mlx-engine-cli"]))?;
        Ok(Self {
            program: target
                .join("release")
                .join(format!("mlx-engine{}", std::env::consts::EXE_SUFFIX)),
            model: model.to_path_buf(),
        })
    }

    /// The instruction set and the threads of the kernels.
    pub(crate) fn kernels(&self) -> Result<(String, u32)> {
        let found = self.json(&["doctor"], false)?;
        let threads = found["cpu_threads"]
            .as_u64()
            .and_then(|threads| u32::try_from(threads).ok());
        match (found["cpu_kernels"].as_str(), threads) {
            (Some(name), Some(threads)) => Ok((name.to_owned(), threads)),
            _ => Err(Error::Refused(format!("doctor names no kernels: {found}"))),
        }
    }

    /// Tokens a second of a prompt, and of an answer behind it, as medians of `repeats`.
    pub(crate) fn one(&self, prompt: u32, answer: u32, threads: u32, repeats: u32) -> Result<Speeds> {
        let [prompt, answer, threads, repeats] =
            [prompt, answer, threads, repeats].map(|number| number.to_string());
        let found = self.json(
            &[
                "bench",
                "-p",
                &prompt,
                "-n",
                &answer,
                "--threads",
                &threads,
                "-r",
                &repeats,
            ],
            true,
        )?;
        speeds(&found)
    }

    /// Tokens a second of all streams together, for each number of streams.
    pub(crate) fn together(&self, prompt: u32, answer: u32, streams: &[u32]) -> Result<Vec<Speeds>> {
        let list = streams.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let (prompt, answer) = (prompt.to_string(), answer.to_string());
        let found = self.json(
            &["bench", "-p", &prompt, "-n", &answer, "-r", "1", "--batch", &list],
            true,
        )?;
        let rows = found["batches"].as_array().map(Vec::as_slice).unwrap_or_default();
        rows.iter().map(speeds).collect()
    }

    /// Writes the model as an MLX folder, with the integers that it has.
    pub(crate) fn convert(&self, out: &Path) -> Result<()> {
        let mut command = self.command(&["convert", "--model"]);
        command.arg(&self.model).arg("--out").arg(out);
        measured(&mut command).map(|_| ())
    }

    /// A whole process that says one token.
    pub(crate) fn first_token(&self) -> Result<Done> {
        let mut command = self.command(&[
            "generate",
            "--prompt",
            "Hello",
            "--temperature",
            "0",
            "--max-tokens",
            "1",
        ]);
        measured(command.arg("--model").arg(&self.model))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments);
        command
    }

    fn json(&self, arguments: &[&str], model: bool) -> Result<Value> {
        let mut command = self.command(arguments);
        command.arg("--json");
        if model {
            command.arg("--model").arg(&self.model);
        }
        let done = measured(&mut command)?;
        serde_json::from_str(&done.stdout).map_err(|error| {
            Error::Refused(format!(
                "mlx-engine {} gave no JSON: {error}",
                arguments.join(" ")
            ))
        })
    }
}

fn speeds(value: &Value) -> Result<Speeds> {
    let number = |key: &str| {
        value[key]
            .as_f64()
            .ok_or_else(|| Error::Refused(format!("mlx-engine bench did not print `{key}`: {value}")))
    };
    Ok(Speeds {
        prefill: number("prompt_tps")?,
        decode: number("generation_tps")?,
    })
}
