//! The access token.

use secrecy::{ExposeSecret, SecretString};

/// An access token of the hub. It is neither printed nor written to a log, and is wiped from memory when it goes.
#[derive(Clone, Debug)]
pub struct Token(SecretString);

impl Token {
    /// A token without the white space around it; none where nothing is left.
    pub fn new(text: impl Into<String>) -> Option<Self> {
        let text: String = text.into();
        let token = text.trim();
        (!token.is_empty()).then(|| Self(SecretString::from(token)))
    }

    /// The token itself, for the header of a request.
    #[cfg_attr(
        not(any(feature = "fetch", test)),
        expect(dead_code, reason = "only requests show it")
    )]
    pub(crate) fn reveal(&self) -> &str {
        self.0.expose_secret()
    }
}
