//! Text from files and from stdin.

use std::io::Read;
use std::path::Path;

use crate::failure::Failure;

/// The text of a file.
pub(crate) fn file(path: &Path) -> Result<String, Failure> {
    let bytes = std::fs::read(path)
        .map_err(|error| Failure::other(format!("`{}` could not be read: {error}", path.display())))?;
    utf8(bytes, &format!("`{}`", path.display()))
}

/// The text on stdin.
pub(crate) fn stdin() -> Result<String, Failure> {
    let mut bytes = Vec::new();
    std::io::stdin()
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::other(format!("stdin could not be read: {error}")))?;
    utf8(bytes, "stdin")
}

/// The text on stdin, or [`Failure::Interrupted`] where Ctrl-C comes first.
pub(crate) async fn stdin_or_interrupt() -> Result<String, Failure> {
    tokio::select! {
        text = tokio::task::spawn_blocking(stdin) => text.map_err(|error| Failure::other(error.to_string()))?,
        _ = tokio::signal::ctrl_c() => Err(Failure::Interrupted),
    }
}

fn utf8(bytes: Vec<u8>, name: &str) -> Result<String, Failure> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::other(format!(
            "{name} is not UTF-8: byte {at} begins no character; convert it first"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_text_are_named() {
        let Err(Failure::Other(message)) = utf8(b"ab\xffc".to_vec(), "stdin") else {
            panic!("it is refused")
        };
        assert_eq!(
            message,
            "stdin is not UTF-8: byte 2 begins no character; convert it first"
        );
        assert!(matches!(utf8("ß".into(), "stdin"), Ok(text) if text == "ß"));
    }
}
