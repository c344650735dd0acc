//! `cargo xtask demo`: one question to the test model, answered by real MLX.

use std::io::{self, Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::thread;

use crate::error::{Context, Error, Result};
use crate::setup;
use crate::workspace::{cargo, run as go, spell, unstarted};

const QUESTION: &str = "What is the capital of France?";
const ANSWER: &str = "Paris";

const BINARY: [&str; 5] = ["--release", "-p", "mlx-engine-cli", "--bin", "mlx-engine"];

pub(crate) fn run() -> Result<()> {
    let cache = setup::fill(None, false)?;
    // Built first, so that no compiler message falls between question and answer.
    go(cargo().arg("build").args(BINARY))?;
    println!("> {QUESTION}");
    let mut command = cargo();
    command
        .args(["run", "--quiet"])
        .args(BINARY)
        .args(["--", "generate", "--model"])
        .arg(cache.test_model());
    command.args(["--prompt", QUESTION, "--temperature", "0", "--max-tokens", "64"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| unstarted(&command, &error))?;
    // What the program says about the answer comes after it, on lines of its own.
    let remarks = child.stderr.take().map(|mut stderr| {
        thread::spawn(move || {
            let mut remarks = Vec::new();
            stderr.read_to_end(&mut remarks).map(|_| remarks)
        })
    });
    let mut answer = Vec::new();
    if let Some(mut output) = child.stdout.take() {
        tee(&mut output, &mut io::stdout(), &mut answer).context("pass on", Path::new("the answer"))?;
    }
    if !answer.ends_with(b"\n") {
        println!();
    }
    if let Some(Ok(Ok(remarks))) = remarks.map(thread::JoinHandle::join) {
        println!("{}", String::from_utf8_lossy(&remarks).trim());
    }
    let status = child.wait().context("wait for", Path::new("the answer"))?;
    if !status.success() {
        return Err(Error::Failed {
            command: spell(&command),
            status: status.to_string(),
        });
    }
    check(&String::from_utf8_lossy(&answer))
}

/// Passes bytes on as they come, and keeps them.
fn tee(from: &mut impl Read, to: &mut impl Write, kept: &mut Vec<u8>) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                to.write_all(&buffer[..count])?;
                to.flush()?;
                kept.extend_from_slice(&buffer[..count]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn check(answer: &str) -> Result<()> {
    if answer.contains(ANSWER) {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "the answer does not name {ANSWER}: the model computes wrongly\n  cargo xtask test -p mlx-engine-models says where"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_passed_on_and_kept() {
        let (mut shown, mut kept) = (Vec::new(), Vec::new());
        let long = "The capital of France is Paris. ".repeat(300);
        tee(&mut long.as_bytes(), &mut shown, &mut kept).unwrap();
        assert_eq!(shown, long.as_bytes());
        assert_eq!(kept, shown);
    }

    #[test]
    fn an_answer_without_paris_fails() {
        assert!(check("It is Paris.").is_ok());
        assert!(
            check("It is Lyon.")
                .unwrap_err()
                .to_string()
                .contains("does not name Paris")
        );
    }
}
