//! Which files of a repository are wanted.

use std::collections::BTreeSet;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use super::RepoFile;
use crate::error::Result;
use crate::names::shown;
use crate::{HubError, RepoId, RepoPath, engine_reads};

/// What Python would run when it reads it.
const PICKLES: [&str; 8] = ["bin", "ckpt", "dill", "joblib", "pickle", "pkl", "pt", "pth"];

/// Which files of a repository are wanted. Pickles are never fetched, whatever is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileSelection {
    /// What the engine reads: weights as safetensors, and JSON and templates beside them.
    #[default]
    Engine,
    /// These files.
    Files(BTreeSet<RepoPath>),
    /// Files that a pattern of `allow` matches and none of `ignore`. `*` and `?` match `/` too, and `[abc]` one of some
    /// characters, as in Python's `fnmatch`. No pattern in `allow` allows all.
    Patterns {
        /// What is wanted.
        allow: Vec<String>,
        /// What is not.
        ignore: Vec<String>,
    },
    /// Everything.
    All,
}

impl FileSelection {
    /// Splits files into those that are wanted and the pickles that would have been.
    pub(super) fn apply(&self, repo: &RepoId, files: &[RepoFile]) -> Result<(Vec<RepoFile>, Vec<RepoPath>)> {
        let chosen: Box<dyn Fn(&RepoPath) -> bool> = match self {
            Self::Engine => Box::new(engine_reads),
            Self::Files(paths) => {
                let there: BTreeSet<&RepoPath> = files.iter().map(|file| &file.path).collect();
                if let Some(path) = paths.iter().find(|path| !there.contains(path)) {
                    return Err(HubError::NotFound {
                        what: format!("{repo}/{path}"),
                        message: "the repository has no such file".to_owned(),
                    });
                }
                Box::new(|path| paths.contains(path))
            }
            Self::Patterns { allow, ignore } => {
                let (allowed, ignored) = (globs(allow)?, globs(ignore)?);
                let all = allow.is_empty();
                Box::new(move |path| {
                    let path = path.as_str();
                    (all || allowed.is_match(path)) && !ignored.is_match(path)
                })
            }
            Self::All => Box::new(|_| true),
        };
        let wanted = files.iter().filter(|file| chosen(&file.path)).cloned();
        let (pickles, wanted): (Vec<_>, Vec<_>) = wanted.partition(|file| is_pickle(&file.path));
        if wanted.is_empty() {
            return Err(HubError::NothingToFetch {
                repo: repo.to_string(),
                wanted: self.described(repo, files),
            });
        }
        Ok((wanted, pickles.into_iter().map(|file| file.path).collect()))
    }

    /// What was looked for, behind "no file that".
    fn described(&self, repo: &RepoId, files: &[RepoFile]) -> String {
        let gguf = files.iter().filter(|file| file.path.has_extension("gguf"));
        let gguf: Vec<_> = gguf
            .take(5)
            .map(|file| format!("hf:{repo}/{}", file.path))
            .collect();
        match self {
            Self::Engine if !gguf.is_empty() => {
                format!(
                    "is read by itself; name one of its GGUF files: {}",
                    gguf.join(", ")
                )
            }
            Self::Engine => "the engine reads: no safetensors, no GGUF".to_owned(),
            _ => "matches and is no pickle".to_owned(),
        }
    }
}

/// Whether Python would run what the file holds.
pub(super) fn is_pickle(path: &RepoPath) -> bool {
    PICKLES.iter().any(|pickle| path.has_extension(pickle))
}

/// Patterns in the manner of Python's `fnmatch`.
fn globs(patterns: &[String]) -> Result<GlobSet> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        let refuse = |_| HubError::InvalidName {
            what: "pattern",
            name: shown(pattern),
            why: "its brackets do not match",
        };
        // A folder stands for all that is in it; braces stand for themselves.
        let whole = if pattern.ends_with('/') {
            format!("{pattern}*")
        } else {
            pattern.clone()
        };
        let plain = whole.replace('{', "[{]").replace('}', "[}]");
        let glob = GlobBuilder::new(&plain)
            .literal_separator(false)
            .backslash_escape(false)
            .build()
            .map_err(refuse)?;
        set.add(glob);
    }
    set.build().map_err(|error| HubError::InvalidName {
        what: "pattern",
        name: shown(&error.to_string()),
        why: "it is too large",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(names: &[&str]) -> Vec<RepoFile> {
        let hash = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391".parse().unwrap();
        let file = |name: &&str| RepoFile {
            path: name.parse().unwrap(),
            bytes: 1,
            hash,
        };
        names.iter().map(file).collect()
    }

    fn chosen(selection: &FileSelection, names: &[&str]) -> Result<(Vec<String>, usize)> {
        let (wanted, pickles) = selection.apply(&"a/b".parse().unwrap(), &files(names))?;
        Ok((
            wanted.iter().map(|file| file.path.to_string()).collect(),
            pickles.len(),
        ))
    }

    #[test]
    fn the_engine_gets_what_it_reads() {
        let names = [
            "README.md",
            "config.json",
            "model.safetensors",
            "onnx/config.json",
            "pytorch_model.bin",
        ];
        let (wanted, pickles) = chosen(&FileSelection::Engine, &names).unwrap();
        assert_eq!(
            (wanted, pickles),
            (vec!["config.json".to_owned(), "model.safetensors".to_owned()], 0)
        );
        let error = chosen(&FileSelection::Engine, &["x.Q4_0.gguf", "README.md"]).unwrap_err();
        assert!(error.to_string().contains("hf:a/b/x.Q4_0.gguf"), "{error}");
        assert!(
            chosen(&FileSelection::Engine, &["README.md"])
                .unwrap_err()
                .to_string()
                .contains("no safetensors")
        );
    }

    #[test]
    fn pickles_stay_where_they_are() {
        let (wanted, pickles) = chosen(&FileSelection::All, &["a.PT", "b.txt", "d/c.pkl"]).unwrap();
        assert_eq!((wanted, pickles), (vec!["b.txt".to_owned()], 2));
        assert!(chosen(&FileSelection::All, &["a.pt"]).is_err());
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let selection = FileSelection::Files(["x.gguf".parse().unwrap()].into());
        assert_eq!(chosen(&selection, &["x.gguf", "y.gguf"]).unwrap().0, ["x.gguf"]);
        let error = chosen(&selection, &["y.gguf"]).unwrap_err().to_string();
        assert!(error.contains("`a/b/x.gguf`"), "{error}");
    }

    #[test]
    fn a_pattern_that_is_none_is_refused() {
        let selection = FileSelection::Patterns {
            allow: vec!["[x".to_owned()],
            ignore: vec![],
        };
        assert!(matches!(
            chosen(&selection, &["x"]),
            Err(HubError::InvalidName { what: "pattern", .. })
        ));
    }
}
