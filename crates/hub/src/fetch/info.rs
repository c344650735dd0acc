//! What a repository holds.

use serde::{Deserialize, Serialize};

use super::Hub;
use super::http::spoken;
use super::progress::Listener;
use crate::error::Result;
use crate::names::{RepoId, RepoPath, Revision, is_commit, shown};
use crate::{BlobHash, HubError, HubReference};

/// The largest file that is read into memory.
const MAX_READ: usize = 4 << 20;

/// A repository at one commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ModelInfo {
    /// Its id, as the hub spells it.
    pub id: RepoId,
    /// The commit.
    pub commit: String,
    /// All files, by path.
    pub files: Vec<RepoFile>,
    /// Whether only some may see it.
    pub private: bool,
    /// Whether its terms have to be accepted first.
    pub gated: bool,
    /// What it is for, such as `text-generation`.
    pub pipeline_tag: Option<String>,
    /// The library that it is made for, such as `mlx`.
    pub library: Option<String>,
    /// Everything that it is marked with.
    pub tags: Vec<String>,
    /// Downloads in the last month.
    pub downloads: Option<u64>,
    /// How many like it.
    pub likes: Option<u64>,
    /// When it changed last, as the hub writes it.
    pub last_modified: Option<String>,
}

impl ModelInfo {
    /// The bytes of all files, as the hub claims them.
    pub fn bytes(&self) -> u64 {
        self.files
            .iter()
            .fold(0, |sum, file| sum.saturating_add(file.bytes))
    }
}

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RepoFile {
    /// Its path.
    pub path: RepoPath,
    /// Its length.
    pub bytes: u64,
    /// The hash of its content.
    #[serde(serialize_with = "as_text")]
    pub hash: BlobHash,
}

fn as_text<S: serde::Serializer>(hash: &BlobHash, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(hash)
}

/// The answer of `/api/models/ID/revision/REVISION?blobs=true`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawInfo {
    id: String,
    sha: String,
    #[serde(default)]
    siblings: Vec<RawFile>,
    #[serde(default)]
    private: bool,
    #[serde(default)]
    gated: Gated,
    #[serde(rename = "pipeline_tag")]
    pipeline_tag: Option<String>,
    #[serde(rename = "library_name")]
    library_name: Option<String>,
    #[serde(default)]
    tags: Vec<String>,
    downloads: Option<u64>,
    likes: Option<u64>,
    last_modified: Option<String>,
}

/// `false`, `"auto"` or `"manual"`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Gated {
    Switch(bool),
    Kind(String),
}

impl Default for Gated {
    fn default() -> Self {
        Self::Switch(false)
    }
}

impl Gated {
    pub(super) fn is_gated(&self) -> bool {
        match self {
            Self::Switch(on) => *on,
            Self::Kind(kind) => !kind.is_empty(),
        }
    }
}

#[derive(Debug, Deserialize)]
struct RawFile {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<RawLfs>,
}

#[derive(Debug, Deserialize)]
struct RawLfs {
    sha256: String,
    size: u64,
}

impl Hub {
    /// What a repository holds at a revision.
    ///
    /// # Errors
    ///
    /// [`HubError::Offline`], [`HubError::NotFound`], [`HubError::Denied`], what the network says, and
    /// [`HubError::InvalidName`] for a repository with a file that would lead out of its folder.
    pub async fn info(&self, reference: &HubReference) -> Result<ModelInfo> {
        self.info_with(reference, &|_| {}).await
    }

    /// As [`info`](Self::info), and tells of tries that fail.
    pub(super) async fn info_with(&self, reference: &HubReference, tell: Listener<'_>) -> Result<ModelInfo> {
        let what = HubReference {
            file: None,
            ..reference.clone()
        };
        let what = what.to_string();
        let http = self.http(&what)?;
        let parts = ["api", "models"]
            .into_iter()
            .chain(reference.repo.as_str().split('/'));
        let mut url = http.url(parts.chain(["revision", reference.revision.as_str()]));
        url.set_query(Some("blobs=true"));
        let (raw, _) = http.json::<RawInfo>(&url, &what, tell).await?;
        let nonsense = |why: String| HubError::Answer {
            url: spoken(&url),
            why,
        };
        if !is_commit(&raw.sha) {
            return Err(nonsense(format!("`{}` is no commit", shown(&raw.sha))));
        }
        check_pin(&reference.revision, &raw.sha).map_err(nonsense)?;
        let most = self.options().max_files;
        if raw.siblings.len() > most {
            return Err(HubError::TooLarge {
                repo: what,
                what: "files",
                found: raw.siblings.len() as u64,
                limit: most as u64,
            });
        }
        let files = raw.siblings.into_iter().map(|file| known(file, &nonsense));
        let mut files = files.collect::<Result<Vec<_>>>()?;
        files.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(ModelInfo {
            id: raw.id.parse()?,
            commit: raw.sha,
            files,
            private: raw.private,
            gated: raw.gated.is_gated(),
            pipeline_tag: raw.pipeline_tag,
            library: raw.library_name,
            tags: raw.tags,
            downloads: raw.downloads,
            likes: raw.likes,
            last_modified: raw.last_modified,
        })
    }
}

impl Hub {
    /// The content of a small file of a repository, such as its `config.json`, without a trace in the cache. `info` says
    /// what the file is; it is compared with the length and the hash there.
    ///
    /// # Errors
    ///
    /// [`HubError::NotFound`] where `info` has no such file, [`HubError::TooLarge`] for one of more than 4 MiB,
    /// [`HubError::WrongContent`], and what the network says.
    pub async fn read(&self, info: &ModelInfo, path: &RepoPath) -> Result<Vec<u8>> {
        let what = format!("{}/{path}", info.id);
        let Some(file) = info.files.iter().find(|file| file.path == *path) else {
            return Err(HubError::NotFound {
                what,
                message: "the repository has no such file".to_owned(),
            });
        };
        if file.bytes > MAX_READ as u64 {
            return Err(HubError::TooLarge {
                repo: what,
                what: "bytes",
                found: file.bytes,
                limit: MAX_READ as u64,
            });
        }
        let http = self.http(&what)?;
        let parts = info.id.as_str().split('/').chain(["resolve", &info.commit]);
        let url = http.url(parts.chain(path.components()));
        let (body, _) = http.body(&url, &what, MAX_READ, &|_| {}).await?;
        let mut hasher = file.hash.hasher(file.bytes);
        hasher.update(&body);
        let got = hasher.finish();
        if got == file.hash {
            return Ok(body);
        }
        Err(HubError::WrongContent {
            file: what,
            expected: file.hash.to_string(),
            got: got.to_string(),
        })
    }
}

/// Who asks for a commit gets that one.
fn check_pin(asked: &Revision, got: &str) -> Result<(), String> {
    if asked.is_commit() && asked.as_str() != got {
        return Err(format!("it is about commit {got}, not {asked}"));
    }
    Ok(())
}

fn known(file: RawFile, nonsense: &impl Fn(String) -> HubError) -> Result<RepoFile> {
    let path: RepoPath = file.rfilename.parse()?;
    let (bytes, hash) = match file.lfs {
        Some(lfs) => (Some(lfs.size), Some(lfs.sha256)),
        None => (file.size, file.blob_id),
    };
    let hash = hash.and_then(|hash| hash.parse::<BlobHash>().ok());
    match (bytes, hash) {
        (Some(bytes), Some(hash)) => Ok(RepoFile { path, bytes, hash }),
        _ => Err(nonsense(format!("it gives no length and hash for `{path}`"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_cannot_be_true_add_up_to_the_most_there_is() {
        let file = |path: &str, bytes| RepoFile {
            path: path.parse().unwrap(),
            bytes,
            hash: "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391".parse().unwrap(),
        };
        let info = |files| ModelInfo {
            id: "a/b".parse().unwrap(),
            commit: String::new(),
            files,
            private: false,
            gated: false,
            pipeline_tag: None,
            library: None,
            tags: Vec::new(),
            downloads: None,
            likes: None,
            last_modified: None,
        };
        assert_eq!(info(vec![file("a", 3), file("b", 4)]).bytes(), 7);
        assert_eq!(info(vec![file("a", u64::MAX), file("b", 1)]).bytes(), u64::MAX);
    }
}
