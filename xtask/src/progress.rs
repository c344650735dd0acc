//! What set-up says while it works: lines in a pipe, a bar on a terminal.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A size for people.
pub(crate) fn megabytes(bytes: u64) -> String {
    if bytes < 100_000 {
        return format!("{:.1} kB", bytes as f64 / 1e3);
    }
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// Runs `work` while a bar shows how many bytes have arrived below `folder`. Shows nothing in a pipe.
pub(crate) fn while_arriving<T>(folder: PathBuf, expected: u64, work: impl FnOnce() -> T) -> T {
    if !std::io::stderr().is_terminal() {
        return work();
    }
    let bar = ProgressBar::new(expected);
    if let Ok(style) = ProgressStyle::with_template(
        "  {bar:40} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec}",
    ) {
        bar.set_style(style);
    }
    let (stop, stopped) = mpsc::channel::<()>();
    let watcher = thread::spawn({
        let bar = bar.clone();
        move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(Duration::from_millis(100)) {
                bar.set_position(size_below(folder.clone()).min(expected));
            }
        }
    });
    let result = work();
    drop(stop);
    // A panic in the watcher costs the bar, not the download.
    let _ = watcher.join();
    bar.finish_and_clear();
    result
}

/// Bytes of all files below a folder; what vanishes meanwhile counts nothing.
fn size_below(folder: PathBuf) -> u64 {
    let mut total = 0;
    let mut folders = vec![folder];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(meta) if meta.is_dir() => folders.push(entry.path()),
                Ok(meta) => total += meta.len(),
                Err(_) => {}
            }
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(megabytes(512), "0.5 kB");
        assert_eq!(megabytes(10_388_414), "10.4 MB");
    }

    #[test]
    fn files_in_nested_folders_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("a")).unwrap();
        std::fs::write(folder.path().join("a/b"), [0; 30]).unwrap();
        std::fs::write(folder.path().join("c"), [0; 12]).unwrap();
        assert_eq!(size_below(folder.path().to_path_buf()), 42);
    }

    #[test]
    fn the_work_is_done_and_its_result_returned() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(while_arriving(folder.path().to_path_buf(), 10, || 7), 7);
    }
}
