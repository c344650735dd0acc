//! mlx-lm: the same weights on the same MLX, from Python, in float32, which is its fastest on a CPU.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::ours::{Ours, Speeds};
use super::process::{Done, measured};
use crate::error::{Context, Error, Result};
use crate::oracle;

/// What is run: a folder, the tokens of the prompt and those of the answer; it prints both speeds.
const SCRIPT: &str = include_str!("mlx_lm.py");

pub(crate) struct MlxLm {
    packages: PathBuf,
    script: PathBuf,
    model: PathBuf,
}

impl MlxLm {
    /// Puts the test model as mlx-lm reads it below `folder`: ours converts it, with the integers as they are.
    pub(crate) fn ready(folder: &Path, packages: &Path, ours: &Ours) -> Result<Self> {
        let model = folder.join("mlx-lm-model");
        if !model.is_dir() {
            ours.convert(&model)?;
        }
        let script = folder.join("mlx_lm_speed.py");
        fs::write(&script, SCRIPT).context("write", &script)?;
        Ok(Self {
            packages: packages.to_path_buf(),
            script,
            model,
        })
    }

    /// Tokens a second of a prompt, and of an answer behind it.
    pub(crate) fn one(&self, prompt: u32, answer: u32) -> Result<Speeds> {
        let done = self.run(prompt, answer)?;
        let told: Value = serde_json::from_str(done.stdout.trim())
            .map_err(|_| Error::Refused(format!("mlx-lm printed no figures: {}", done.stdout)))?;
        match (told["prefill"].as_f64(), told["decode"].as_f64()) {
            (Some(prefill), Some(decode)) => Ok(Speeds { prefill, decode }),
            _ => Err(Error::Refused(format!("mlx-lm printed no figures: {told}"))),
        }
    }

    /// A whole process that says one token of a short prompt.
    pub(crate) fn first_token(&self) -> Result<Done> {
        self.run(0, 1)
    }

    fn run(&self, prompt: u32, answer: u32) -> Result<Done> {
        let mut command = oracle::python(&self.packages);
        command.arg(&self.script).arg(&self.model);
        command.args([prompt, answer].map(|number| number.to_string()));
        measured(&mut command)
    }
}
