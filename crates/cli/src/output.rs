//! Results on stdout.

use std::fmt;
use std::io::{ErrorKind, Write};

use crate::failure::Failure;

/// Prints a line to stdout. A reader that is gone, as `head` is after its lines, ends the command and is no failure.
macro_rules! outln {
    ($($argument:tt)*) => {
        crate::output::write(format_args!("{}\n", format_args!($($argument)*)))?
    };
}

pub(crate) use outln;

/// Prints a line to stderr. Where that cannot be written there is nobody to tell.
macro_rules! errln {
    ($($argument:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr().lock(), $($argument)*);
    }};
}

pub(crate) use errln;

/// Prints a value as one line of JSON.
pub(crate) fn print_json<T: serde::Serialize + ?Sized>(value: &T) -> Result<(), Failure> {
    let json = serde_json::to_string(value).map_err(|error| Failure::other(error.to_string()))?;
    write(format_args!("{json}\n"))
}

/// Writes to stdout and does not wait for a line to be whole.
pub(crate) fn write(text: fmt::Arguments<'_>) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let written = out.write_fmt(text).and_then(|()| out.flush());
    written.map_err(|error| match error.kind() {
        ErrorKind::BrokenPipe => Failure::ReaderGone,
        _ => Failure::other(format!("stdout could not be written: {error}")),
    })
}
