//! Memory of this process.

use std::fs;

/// Memory of this process that is resident, in bytes; `None` where the system has no `/proc`.
pub fn resident_bytes() -> Option<u64> {
    if cfg!(target_os = "linux") {
        resident(&fs::read_to_string("/proc/self/status").ok()?)
    } else {
        None
    }
}

/// The line `VmRSS:     1234 kB`, which needs no page size as `statm` would.
fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kilobytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_found_and_nothing_else_is_taken() {
        assert_eq!(
            resident("Name:\tx\nVmRSS:\t    1234 kB\nVmData: 5 kB\n"),
            Some(1234 * 1024)
        );
        for wrong in [
            "",
            "VmRSS:",
            "VmRSS: 12",
            "VmRSS: -1 kB",
            "VmRSS: 99999999999999999999 kB",
        ] {
            assert_eq!(resident(wrong), None, "{wrong}");
        }
        assert_eq!(resident("VmRSS: 18446744073709551615 kB"), None);
    }

    #[test]
    fn linux_says_how_much() {
        assert_eq!(
            resident_bytes().is_some_and(|bytes| bytes > 4096),
            cfg!(target_os = "linux")
        );
    }
}
