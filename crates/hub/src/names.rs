//! What repositories, revisions and files may be called.
//!
//! All of it becomes part of a path or a URL, and much of it comes from a server: a value of these types leads nowhere
//! else.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::HubError;

/// The longest id of a repository.
const MAX_ID: usize = 96;
/// The longest path of a file, in bytes, and the longest of its components.
const MAX_PATH: usize = 1024;
const MAX_COMPONENT: usize = 255;

/// The id of a model's repository: `owner/name`, or `name` alone for the hub's oldest models.
///
/// ```
/// use mlx_engine_hub::RepoId;
///
/// let id: RepoId = "mlx-community/Qwen3-0.6B-4bit".parse()?;
/// assert_eq!(id.as_str(), "mlx-community/Qwen3-0.6B-4bit");
/// assert!("../etc".parse::<RepoId>().is_err());
/// # Ok::<(), mlx_engine_hub::HubError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RepoId(String);

impl RepoId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The folder in the cache: `models--owner--name`.
    pub(crate) fn folder_name(&self) -> String {
        format!("models--{}", self.0.replace('/', "--"))
    }

    /// The id that has a folder of this name.
    pub(crate) fn from_folder_name(name: &str) -> Option<Self> {
        // Neither part may hold `--`, so that there is one way back.
        name.strip_prefix("models--")?.replacen("--", "/", 1).parse().ok()
    }
}

impl FromStr for RepoId {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let refuse = |why| HubError::InvalidName {
            what: "repository id",
            name: shown(text),
            why,
        };
        if text.is_empty() || text.len() > MAX_ID {
            return Err(refuse("it has to have 1 to 96 characters"));
        }
        if text.split('/').count() > 2 {
            return Err(refuse("it is `owner/name`"));
        }
        for part in text.split('/') {
            let plain = |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
            if part.is_empty() || !part.chars().all(plain) {
                return Err(refuse("its parts are made of letters, digits, `-`, `_` and `.`"));
            }
            if part.starts_with(['-', '.']) || part.ends_with(['-', '.']) {
                return Err(refuse("its parts neither begin nor end with `-` or `.`"));
            }
        }
        if text.contains("--") || text.contains("..") {
            return Err(refuse("it holds neither `--` nor `..`"));
        }
        Ok(Self(text.to_owned()))
    }
}

/// A branch, a tag, or a commit; `main` unless told.
///
/// ```
/// use mlx_engine_hub::Revision;
///
/// let revision: Revision = "refs/pr/3".parse()?;
/// assert!(!revision.is_commit());
/// assert_eq!(Revision::default().as_str(), "main");
/// assert!("../elsewhere".parse::<Revision>().is_err());
/// # Ok::<(), mlx_engine_hub::HubError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Revision(String);

impl Revision {
    /// The revision as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is a whole commit, 40 hexadecimal digits, which never changes.
    pub fn is_commit(&self) -> bool {
        is_commit(&self.0)
    }
}

impl Default for Revision {
    fn default() -> Self {
        Self("main".to_owned())
    }
}

/// Whether a text is a commit of git.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

impl FromStr for Revision {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let refuse = |why| HubError::InvalidName {
            what: "revision",
            name: shown(text),
            why,
        };
        if text.is_empty() || text.len() > MAX_COMPONENT {
            return Err(refuse("it has to have 1 to 255 bytes"));
        }
        if text.contains(|character: char| character.is_control() || " ~^:?*[\\".contains(character)) {
            return Err(refuse("git allows neither spaces nor ~^:?*[\\ in it"));
        }
        if text
            .split('/')
            .any(|part| part.is_empty() || part.starts_with('.'))
            || text.contains("..")
        {
            return Err(refuse("its parts are not empty, and do not begin with `.`"));
        }
        Ok(Self(text.to_owned()))
    }
}

/// The path of a file in a repository, with `/` between its components. It stays below the folder that it is joined to.
///
/// ```
/// use mlx_engine_hub::RepoPath;
///
/// assert!("onnx/model.onnx".parse::<RepoPath>().is_ok());
/// for bad in ["../../.ssh/id", "/etc/passwd", "a//b", "a/./b", "C:x", "a\\b", ""] {
///     assert!(bad.parse::<RepoPath>().is_err(), "{bad}");
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RepoPath(String);

impl RepoPath {
    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The components, of which there is at least one.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }

    /// The path on this system, relative.
    pub fn to_path(&self) -> PathBuf {
        self.components().collect()
    }

    /// The last component.
    pub fn file_name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }

    /// Whether the file lies in the repository's own folder.
    pub fn is_top_level(&self) -> bool {
        !self.0.contains('/')
    }

    /// Whether the name ends so, whatever the case.
    pub fn has_extension(&self, extension: &str) -> bool {
        self.file_name()
            .rsplit_once('.')
            .is_some_and(|(stem, found)| !stem.is_empty() && found.eq_ignore_ascii_case(extension))
    }
}

impl FromStr for RepoPath {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let refuse = |why| HubError::InvalidName {
            what: "file name",
            name: shown(text),
            why,
        };
        if text.is_empty() || text.len() > MAX_PATH {
            return Err(refuse("it has to have 1 to 1024 bytes"));
        }
        if text.contains(|character: char| character.is_control() || "\\:".contains(character)) {
            return Err(refuse("it holds control characters, `\\` or `:`"));
        }
        for part in text.split('/') {
            if part.is_empty() || part == "." || part == ".." {
                return Err(refuse("it would lead out of its folder"));
            }
            if part.len() > MAX_COMPONENT {
                return Err(refuse("a component has more than 255 bytes"));
            }
        }
        Ok(Self(text.to_owned()))
    }
}

macro_rules! text {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = HubError;

            fn try_from(text: String) -> Result<Self, HubError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    };
}

text!(RepoId);
text!(Revision);
text!(RepoPath);

/// A name from outside for a message: short, and without what a terminal would obey.
pub(crate) fn shown(text: &str) -> String {
    let mut short: String = text.chars().take(120).flat_map(char::escape_default).collect();
    if text.chars().count() > 120 {
        short.push('…');
    }
    short
}

/// What a user calls a model on the hub: `owner/name`, `owner/name@revision`, `hf:owner/name`,
/// `hf:owner/name/file.gguf` or `hf:owner/name@revision/file.gguf`.
///
/// ```
/// use mlx_engine_hub::HubReference;
///
/// let reference: HubReference = "hf:TheBloke/Some-GGUF@v2/some.Q4_K_M.gguf".parse()?;
/// assert_eq!(reference.repo.as_str(), "TheBloke/Some-GGUF");
/// assert_eq!(reference.revision.as_str(), "v2");
/// assert_eq!(reference.file.unwrap().as_str(), "some.Q4_K_M.gguf");
/// # Ok::<(), mlx_engine_hub::HubError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HubReference {
    /// The repository.
    pub repo: RepoId,
    /// The branch, tag or commit.
    pub revision: Revision,
    /// One file of it, where one is meant.
    pub file: Option<RepoPath>,
}

impl HubReference {
    /// The main revision of a repository.
    pub fn new(repo: RepoId) -> Self {
        Self {
            repo,
            revision: Revision::default(),
            file: None,
        }
    }

    /// Another revision.
    pub fn with_revision(mut self, revision: Revision) -> Self {
        self.revision = revision;
        self
    }
}

impl FromStr for HubReference {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let Some(rest) = text.strip_prefix("hf:") else {
            // Without the prefix everything behind the `@` is the revision, with its slashes.
            let (repo, revision) = match text.split_once('@') {
                Some((repo, revision)) => (repo, revision.parse()?),
                None => (text, Revision::default()),
            };
            if !repo.contains('/') {
                return Err(HubError::InvalidName {
                    what: "hub reference",
                    name: shown(text),
                    why: "it is `owner/name`, perhaps with `@revision`",
                });
            }
            return Ok(Self::new(repo.parse()?).with_revision(revision));
        };
        let mut parts = rest.splitn(3, '/');
        let owner = parts.next().unwrap_or_default();
        let name = parts.next().unwrap_or_default();
        let rest = parts.next();
        let (name, revision) = match name.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (name, None),
        };
        let repo: RepoId = format!("{owner}/{name}").parse()?;
        let mut revision = revision.unwrap_or("main").to_owned();
        let mut file = rest.map(str::to_owned);
        // The hub's own revisions have slashes: `refs/pr/1`, `refs/convert/parquet`.
        if revision == "refs" {
            let mut parts = file.as_deref().unwrap_or_default().splitn(3, '/');
            let (kind, number) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            revision = format!("refs/{kind}/{number}");
            file = parts.next().map(str::to_owned);
        }
        let file = file.map(|file| file.parse()).transpose()?;
        Ok(Self {
            repo,
            revision: revision.parse()?,
            file,
        })
    }
}

impl fmt::Display for HubReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.file.is_some() {
            f.write_str("hf:")?;
        }
        write!(f, "{}", self.repo)?;
        if self.revision != Revision::default() {
            write!(f, "@{}", self.revision)?;
        }
        match &self.file {
            Some(file) => write!(f, "/{file}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Component, Path};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn references_are_read_as_written() {
        let check = |text: &str, repo: &str, revision: &str, file: Option<&str>| {
            let found: HubReference = text.parse().unwrap();
            let name = found.file.as_ref().map(RepoPath::as_str);
            assert_eq!(
                (found.repo.as_str(), found.revision.as_str(), name),
                (repo, revision, file),
                "{text}"
            );
            assert_eq!(
                found.to_string().parse::<HubReference>().unwrap(),
                found,
                "{text}"
            );
        };
        check("a/b", "a/b", "main", None);
        check("a/b@v1.0", "a/b", "v1.0", None);
        check("a/b@refs/pr/3", "a/b", "refs/pr/3", None);
        check("hf:a/b", "a/b", "main", None);
        check("hf:a/b/c.gguf", "a/b", "main", Some("c.gguf"));
        check("hf:a/b@v1/q4/c.gguf", "a/b", "v1", Some("q4/c.gguf"));
        check("hf:a/b@refs/pr/3/c.gguf", "a/b", "refs/pr/3", Some("c.gguf"));
    }

    #[test]
    fn what_is_no_name_is_refused_with_the_reason() {
        let check = |text: &str, why: &str| {
            let error = text.parse::<HubReference>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        };
        check("gpt2", "it is `owner/name`");
        check("a/b/c", "it is `owner/name`");
        check("a/b@", "1 to 255 bytes");
        check("a/b@..", "do not begin with `.`");
        check("a/b@x y", "git allows neither spaces");
        check("a/-b", "neither begin nor end");
        check("a/b--c", "neither `--` nor `..`");
        check("a/\u{1b}[2J", "\\u{1b}[2J");
        check("hf:a", "made of letters");
        check("hf:a/b/../c", "lead out of its folder");
        check(&format!("a/{}", "x".repeat(200)), "1 to 96 characters");
    }

    #[test]
    fn folders_lead_back_to_ids() {
        for id in ["mlx-community/Qwen3-0.6B-4bit", "gpt2", "a/b"] {
            let id: RepoId = id.parse().unwrap();
            assert_eq!(RepoId::from_folder_name(&id.folder_name()), Some(id));
        }
        for folder in ["datasets--a--b", "models--", "models--..--x", "models--a--b--c"] {
            assert_eq!(RepoId::from_folder_name(folder), None, "{folder}");
        }
    }

    /// Texts with a liking for what is dangerous.
    fn hostile() -> impl Strategy<Value = String> {
        let pieces = vec![
            "..", ".", "/", "\\", "a", "CON", ":", "\0", "~", "-", "--", " ", "é", "%2e", "@",
        ];
        prop_oneof![
            prop::collection::vec(prop::sample::select(pieces), 0..12).prop_map(|parts| parts.concat()),
            any::<String>(),
        ]
    }

    proptest! {
        #[test]
        fn a_path_stays_below_its_folder(text in hostile()) {
            if let Ok(path) = text.parse::<RepoPath>() {
                let joined = Path::new("/cache").join(path.to_path());
                prop_assert!(joined.starts_with("/cache"));
                prop_assert!(joined.components().skip(1).all(|part| matches!(part, Component::Normal(_))));
                prop_assert_eq!(joined.components().count(), 2 + path.components().count());
            }
        }

        #[test]
        fn an_id_and_a_revision_stay_below_the_cache(text in hostile()) {
            if let Ok(id) = text.parse::<RepoId>() {
                prop_assert_eq!(Path::new(&id.folder_name()).components().count(), 1);
            }
            if let Ok(revision) = text.parse::<Revision>() {
                let joined = Path::new("/refs").join(revision.as_str());
                prop_assert!(joined.starts_with("/refs"));
                prop_assert!(joined.components().skip(1).all(|part| matches!(part, Component::Normal(_))));
            }
            let _ = text.parse::<HubReference>();
        }
    }
}
