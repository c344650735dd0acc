//! What led to an error, as a value that can be cloned and written.

use std::error::Error;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The source of an [`EngineError`](crate::EngineError), shared so that the error can be cloned.
///
/// It is not an error itself but dereferences to one: `error.source()` gives the original, which can be downcast.
#[derive(Clone)]
pub struct ErrorSource(Arc<dyn Error + Send + Sync>);

impl ErrorSource {
    /// Shares an error, or makes one of a message.
    pub fn new(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(source.into().into())
    }
}

impl Deref for ErrorSource {
    type Target = dyn Error + Send + Sync;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

/// Written as its messages, the outermost first.
impl Serialize for ErrorSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let first: &(dyn Error + 'static) = &*self.0;
        let chain = std::iter::successors(Some(first), |error| (*error).source());
        serializer.collect_seq(chain.map(ToString::to_string))
    }
}

impl<'de> Deserialize<'de> for ErrorSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let messages = Vec::<String>::deserialize(deserializer)?;
        let chain = messages
            .into_iter()
            .rev()
            .fold(None, |source, message| Some(Box::new(Told { message, source })));
        Ok(chain.map_or_else(|| Self::new(String::new()), |told| Self(Arc::new(*told))))
    }
}

/// An error that was read: what it said, and what its source said.
#[derive(Debug)]
struct Told {
    message: String,
    source: Option<Box<Told>>,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Told {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|told| told as &(dyn Error + 'static))
    }
}

impl fmt::Debug for ErrorSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for ErrorSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EngineError;

    #[test]
    fn a_source_is_printed_as_what_it_is() {
        let io = || std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "truncated");
        let source = ErrorSource::new(io());
        assert_eq!(source.to_string(), "truncated");
        assert_eq!(format!("{source:?}"), format!("{:?}", io()));
        let error = EngineError::tokenizer("bad merge", io());
        assert_eq!(error.source().unwrap().to_string(), "truncated");
        // One that said nothing is read as nothing, and not refused.
        let silent: ErrorSource = serde_json::from_str("[]").unwrap();
        assert_eq!(silent.to_string(), "");
        assert!(silent.source().is_none());
    }
}
