//! A program, how long it runs and how much memory it takes.

use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::workspace::{spell, unstarted};

/// How often the memory of a program is looked at. The system keeps the largest value, so that only what is taken in the
/// last moments is missed.
const LOOK: Duration = Duration::from_millis(5);

/// What a program did.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) stdout: String,
    /// From the start of the process to its end.
    pub(crate) seconds: f64,
    /// The largest resident memory, where the system tells it.
    pub(crate) peak_bytes: Option<u64>,
}

/// Runs a program to its end; failing is an error that has what the program said.
pub(crate) fn measured(command: &mut Command) -> Result<Done> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = command.spawn().map_err(|error| unstarted(command, &error))?;
    let failed = |why: String| Error::Failed {
        command: spell(command),
        status: why,
    };
    // Both pipes are emptied while the program runs: a full one would stop it.
    let (stdout, stderr) = (reader(child.stdout.take()), reader(child.stderr.take()));
    let mut peak_bytes = None;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| failed(error.to_string()))? {
            break status;
        }
        peak_bytes = peak(&child).max(peak_bytes);
        thread::sleep(LOOK);
    };
    let seconds = started.elapsed().as_secs_f64();
    let (stdout, stderr) = (text(stdout), text(stderr));
    if status.success() {
        return Ok(Done {
            stdout,
            seconds,
            peak_bytes,
        });
    }
    let last = stderr.lines().rev().find(|line| !line.trim().is_empty());
    Err(failed(format!("{status}: {}", last.unwrap_or("it said nothing"))))
}

fn reader(pipe: Option<impl Read + Send + 'static>) -> Option<thread::JoinHandle<String>> {
    pipe.map(|mut pipe| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was read before an error is shown; the status says that it failed.
            let _ = pipe.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    })
}

fn text(reader: Option<thread::JoinHandle<String>>) -> String {
    reader.and_then(|reader| reader.join().ok()).unwrap_or_default()
}

fn peak(child: &Child) -> Option<u64> {
    high_water(&fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?)
}

/// The line `VmHWM: N kB` of Linux.
fn high_water(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_timed_and_its_output_kept() {
        let done = measured(Command::new("sh").args(["-c", "echo out; echo err >&2"])).unwrap();
        assert_eq!(done.stdout, "out\n");
        assert!(done.seconds > 0.0);
    }

    #[test]
    fn a_failing_program_is_quoted() {
        let error = measured(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("why") && text.contains('3'), "{text}");
    }

    #[test]
    fn the_high_water_mark_is_in_bytes() {
        assert_eq!(high_water("Name:\tx\nVmHWM:\t   12 kB\n"), Some(12288));
        assert_eq!(high_water("Name:\tx\n"), None);
    }
}
