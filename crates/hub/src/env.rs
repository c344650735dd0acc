//! The environment variables that say where the cache is and how the hub is reached, all of them.
//!
//! They are those of Python's `huggingface_hub`, so that both find the same files.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::Token;

/// The folder of everything that Hugging Face's programs keep; `$XDG_CACHE_HOME/huggingface` or
/// `~/.cache/huggingface` unless set.
pub const HF_HOME: &str = "HF_HOME";
/// The folder of the cached repositories; `$HF_HOME/hub` unless set.
pub const HF_HUB_CACHE: &str = "HF_HUB_CACHE";
/// The older name of [`HF_HUB_CACHE`].
pub const HUGGINGFACE_HUB_CACHE: &str = "HUGGINGFACE_HUB_CACHE";
/// Where the hub is; `https://huggingface.co` unless set.
pub const HF_ENDPOINT: &str = "HF_ENDPOINT";
/// An access token.
pub const HF_TOKEN: &str = "HF_TOKEN";
/// The older name of [`HF_TOKEN`].
pub const HUGGING_FACE_HUB_TOKEN: &str = "HUGGING_FACE_HUB_TOKEN";
/// The file that holds the access token; `$HF_HOME/token` unless set.
pub const HF_TOKEN_PATH: &str = "HF_TOKEN_PATH";
/// `1` sends no token unless a program gives one.
pub const HF_HUB_DISABLE_IMPLICIT_TOKEN: &str = "HF_HUB_DISABLE_IMPLICIT_TOKEN";
/// `1` keeps off the network: what is not in the cache is an error.
pub const HF_HUB_OFFLINE: &str = "HF_HUB_OFFLINE";
/// Another name of [`HF_HUB_OFFLINE`].
pub const TRANSFORMERS_OFFLINE: &str = "TRANSFORMERS_OFFLINE";
/// Where [`HF_HOME`] lies unless it is set.
pub const XDG_CACHE_HOME: &str = "XDG_CACHE_HOME";

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// What the variables say.
///
/// ```
/// use mlx_engine_hub::Environment;
///
/// let set = [("HF_HOME", "/models"), ("HF_HUB_OFFLINE", "1")];
/// let value = |name: &str| set.iter().find(|(set, _)| *set == name).map(|(_, value)| value.into());
/// let environment = Environment::from_lookup(value);
/// assert_eq!(environment.cache, Some("/models/hub".into()));
/// assert!(environment.offline);
/// assert_eq!(environment.endpoint, "https://huggingface.co");
/// ```
#[derive(Clone, Debug)]
pub struct Environment {
    /// The folder of the cached repositories; `None` where even `HOME` is not set.
    pub cache: Option<PathBuf>,
    /// Where the hub is, without a slash at the end.
    pub endpoint: String,
    /// The access token.
    pub token: Option<Token>,
    /// Whether the network is to be left alone.
    pub offline: bool,
}

impl Environment {
    /// Reads the variables of this process, and the token's file where a variable does not give the token.
    pub fn read() -> Self {
        Self::from_lookup(|name| std::env::var_os(name))
    }

    /// As [`read`](Self::read), with the variables from a function.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<OsString>) -> Self {
        let set = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let path = |name: &str| {
            let path = PathBuf::from(set(name)?);
            // As Python's `expanduser`: in a file of settings no shell has done it.
            match (path.strip_prefix("~"), set("HOME")) {
                (Ok(rest), Some(home)) => Some(PathBuf::from(home).join(rest)),
                _ => Some(path),
            }
        };
        let text = |name: &str| set(name).and_then(|value| value.into_string().ok());
        let on = |name: &str| {
            text(name).is_some_and(|value| {
                ["1", "ON", "YES", "TRUE"].contains(&value.trim().to_ascii_uppercase().as_str())
            })
        };
        let home = path(HF_HOME)
            .or_else(|| path(XDG_CACHE_HOME).map(|cache| cache.join("huggingface")))
            .or_else(|| path("HOME").map(|home| home.join(".cache/huggingface")));
        let cache = path(HF_HUB_CACHE)
            .or_else(|| path(HUGGINGFACE_HUB_CACHE))
            .or_else(|| home.as_ref().map(|home| home.join("hub")));
        let from_file = || {
            let file = path(HF_TOKEN_PATH).or_else(|| home.as_ref().map(|home| home.join("token")))?;
            Token::new(std::fs::read_to_string(file).ok()?)
        };
        let token = if on(HF_HUB_DISABLE_IMPLICIT_TOKEN) {
            None
        } else {
            text(HF_TOKEN)
                .or_else(|| text(HUGGING_FACE_HUB_TOKEN))
                .and_then(Token::new)
                .or_else(from_file)
        };
        let endpoint = text(HF_ENDPOINT).unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        Self {
            cache,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token,
            offline: on(HF_HUB_OFFLINE) || on(TRANSFORMERS_OFFLINE),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment::from_lookup(|name| {
            let found = variables.iter().find(|(variable, _)| *variable == name)?;
            Some(found.1.into())
        })
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        let check = |variables: &[(&str, &str)], expected: Option<&str>| {
            assert_eq!(environment(variables).cache.as_deref(), expected.map(Path::new));
        };
        check(&[], None);
        check(&[("HOME", "/h")], Some("/h/.cache/huggingface/hub"));
        check(
            &[("HOME", "/h"), (XDG_CACHE_HOME, "/x")],
            Some("/x/huggingface/hub"),
        );
        check(&[(XDG_CACHE_HOME, "/x"), (HF_HOME, "/f")], Some("/f/hub"));
        check(&[("HOME", "/h"), (HF_HOME, "~/f")], Some("/h/f/hub"));
        check(&[(HF_HOME, "/f"), (HUGGINGFACE_HUB_CACHE, "/o")], Some("/o"));
        check(&[(HF_HUB_CACHE, "/c"), (HUGGINGFACE_HUB_CACHE, "/o")], Some("/c"));
        check(
            &[("HOME", "/h"), (HF_HUB_CACHE, "")],
            Some("/h/.cache/huggingface/hub"),
        );
    }

    #[test]
    fn switches_and_the_endpoint_are_read() {
        let plain = environment(&[]);
        assert_eq!(
            (plain.endpoint.as_str(), plain.offline),
            (DEFAULT_ENDPOINT, false)
        );
        let set = environment(&[(HF_ENDPOINT, "http://mirror/"), (HF_HUB_OFFLINE, "true")]);
        assert_eq!((set.endpoint.as_str(), set.offline), ("http://mirror", true));
        assert!(environment(&[(TRANSFORMERS_OFFLINE, "1")]).offline);
        assert!(!environment(&[(HF_HUB_OFFLINE, "0")]).offline);
    }

    #[test]
    fn the_token_comes_from_a_variable_or_the_file() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().to_str().unwrap();
        let token = |variables: &[(&str, &str)]| {
            let found = environment(variables).token;
            found.map(|token| token.reveal().to_owned())
        };
        assert_eq!(token(&[(HF_HOME, folder)]), None);
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(token(&[(HF_HOME, folder)]).as_deref(), Some("hf_file"));
        assert_eq!(
            token(&[(HF_HOME, folder), (HF_TOKEN, " hf_variable\n")]).as_deref(),
            Some("hf_variable")
        );
        assert_eq!(
            token(&[(HUGGING_FACE_HUB_TOKEN, "hf_old")]).as_deref(),
            Some("hf_old")
        );
        let file = home.path().join("token");
        assert_eq!(
            token(&[(HF_TOKEN_PATH, file.to_str().unwrap())]).as_deref(),
            Some("hf_file")
        );
        assert_eq!(
            token(&[(HF_TOKEN, "x"), (HF_HUB_DISABLE_IMPLICIT_TOKEN, "1")]),
            None
        );
    }

    #[test]
    fn a_token_is_not_printed() {
        let environment = environment(&[(HF_TOKEN, "hf_secret")]);
        assert!(!format!("{environment:?}").contains("secret"));
    }
}
