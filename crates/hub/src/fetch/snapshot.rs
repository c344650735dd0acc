//! A model as a whole: what is missing of it, fetched several files at once.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use serde::Serialize;

use super::file::{Job, half_made, is_here, wait_for};
use super::http::Http;
use super::progress::{FetchEvent, Listener, Meter};
use super::select::is_pickle;
use super::sink::{blocking, panicked};
use super::{FileSelection, Hub, ModelInfo, RepoFile};
use crate::error::{Context, Result};
use crate::layout::RepoFolder;
use crate::lock::Lock;
use crate::names::{HubReference, RepoId, RepoPath, Revision};
use crate::{FileState, HubError, Verification};

/// Which files to fetch, and of which repository.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SnapshotRequest {
    /// The repository and its revision. A file in it is the one that is fetched.
    pub reference: HubReference,
    /// Which of its files.
    pub files: FileSelection,
}

impl SnapshotRequest {
    /// What the engine reads of a repository, or the one file that the reference names.
    pub fn new(reference: HubReference) -> Self {
        let files = match &reference.file {
            Some(file) => FileSelection::Files([file.clone()].into()),
            None => FileSelection::Engine,
        };
        Self { reference, files }
    }

    /// Another choice of files.
    pub fn with_files(mut self, files: FileSelection) -> Self {
        self.files = files;
        self
    }
}

/// A model that is here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Snapshot {
    /// Its repository.
    pub repo: RepoId,
    /// The commit; `None` where the hub could not be asked and the cache had the model.
    pub commit: Option<String>,
    /// The folder of its files, or the one file that was asked for.
    pub path: PathBuf,
    /// The files that were asked for.
    pub files: Vec<RepoPath>,
    /// Pickles that would have been among them.
    pub refused: Vec<RepoPath>,
    /// Bytes of all files.
    pub bytes: u64,
    /// Bytes that came over the network.
    pub fetched_bytes: u64,
}

/// What a repair found and did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Repaired {
    /// What was wrong.
    pub found: Verification,
    /// Bytes that came over the network.
    pub fetched_bytes: u64,
}

/// What is to be fetched, and what it takes.
struct Plan {
    commit: String,
    folder: RepoFolder,
    files: Vec<RepoFile>,
    refused: Vec<RepoPath>,
}

impl Hub {
    /// Fetches what is missing of a model and returns where it is. `tell` hears what happens, from the thread that
    /// polls.
    ///
    /// A model is looked up on the hub each time, so that a branch brings what it stands at now; where the hub cannot
    /// be reached, or is not to be, what the cache has whole is taken. [`HubCache::find`](crate::HubCache::find) asks
    /// nobody.
    ///
    /// # Errors
    ///
    /// What the hub, the network and the disk say; every file that came whole by then is kept, and the others are taken
    /// up where they are by the next call.
    pub async fn fetch(
        &self,
        request: &SnapshotRequest,
        tell: &(dyn Fn(FetchEvent) + Send + Sync),
    ) -> Result<Snapshot> {
        match self.fetch_now(request, tell).await {
            // The branch has moved since its files were listed; once more with a new list.
            Err(HubError::Changed { file, .. }) => {
                tracing::info!(file, "a file has changed on the hub; its list is asked for again");
                self.fetch_now(request, tell).await
            }
            other => other,
        }
    }

    async fn fetch_now(&self, request: &SnapshotRequest, tell: Listener<'_>) -> Result<Snapshot> {
        let reference = &request.reference;
        let info = match self.info_with(reference, tell).await {
            Ok(info) => info,
            Err(error) => return self.cached_instead(request, error, tell),
        };
        let http = self.http(reference.repo.as_str())?;
        let plan = self.plan(request, info)?;
        let total: u64 = plan.files.iter().map(|file| file.bytes).sum();
        let meter = Meter::new(tell, self.options().system.clone(), total);
        let shared = plan.folder.lock();
        // Whoever removes models waits for us, and we for them: what is here is looked up when nobody takes it away.
        let repo = reference.repo.as_str();
        let lock = wait_for(&*self.options().system, &meter, repo, || {
            Lock::try_shared(&shared)
        })
        .await?;
        let missing = plan.missing();
        let present: u64 = total - missing.iter().map(|(file, half)| file.bytes - half).sum::<u64>();
        meter.correct(present as i64);
        tell(FetchEvent::Planned {
            files: plan.files.len(),
            bytes: total,
            present,
        });
        self.check_room(total - present)?;
        let fetched_bytes = self.fetch_files(http, reference, &plan, missing, &meter).await?;
        let snapshot = plan.folder.snapshot(&plan.commit);
        let (folder, revision, commit) = (plan.folder, reference.revision.clone(), plan.commit.clone());
        blocking(move || folder.set_commit(&revision, &commit)).await??;
        drop(lock);
        Ok(Snapshot {
            repo: reference.repo.clone(),
            commit: Some(plan.commit),
            path: match &reference.file {
                Some(file) => snapshot.join(file.to_path()),
                None => snapshot,
            },
            files: plan.files.into_iter().map(|file| file.path).collect(),
            refused: plan.refused,
            bytes: total,
            fetched_bytes,
        })
    }

    /// What the cache has, where the hub cannot be asked.
    fn cached_instead(
        &self,
        request: &SnapshotRequest,
        error: HubError,
        tell: Listener<'_>,
    ) -> Result<Snapshot> {
        if !error.is_about_the_way() {
            return Err(error);
        }
        let reference = &request.reference;
        let found = match &request.files {
            FileSelection::Engine => self.cache().find(reference).ok(),
            FileSelection::Files(files) => {
                let each = |file: &RepoPath| {
                    let one = HubReference {
                        file: Some(file.clone()),
                        ..reference.clone()
                    };
                    self.cache().find(&one).ok()
                };
                let found = files.iter().map(each).collect::<Option<Vec<_>>>();
                let folder = self.cache().commit(reference);
                found.and(folder).map(|commit| {
                    let snapshot = self.cache().folder(&reference.repo).snapshot(&commit);
                    match &reference.file {
                        Some(file) => snapshot.join(file.to_path()),
                        None => snapshot,
                    }
                })
            }
            // What a pattern would match is known to the hub alone.
            _ => None,
        };
        let Some(path) = found else {
            return Err(error);
        };
        tell(FetchEvent::FromCache {
            reason: error.to_string(),
        });
        Ok(Snapshot {
            repo: reference.repo.clone(),
            commit: None,
            path,
            files: Vec::new(),
            refused: Vec::new(),
            bytes: 0,
            fetched_bytes: 0,
        })
    }

    fn plan(&self, request: &SnapshotRequest, info: ModelInfo) -> Result<Plan> {
        let repo = &request.reference.repo;
        let (files, refused) = request.files.apply(repo, &info.files)?;
        let found = files
            .iter()
            .fold(0_u64, |sum, file| sum.saturating_add(file.bytes));
        let limit = self.options().max_bytes;
        if found > limit {
            return Err(HubError::TooLarge {
                repo: repo.to_string(),
                what: "bytes",
                found,
                limit,
            });
        }
        Ok(Plan {
            commit: info.commit,
            folder: self.cache().folder(repo),
            files,
            refused,
        })
    }

    /// Asks for room before any of it is used.
    fn check_room(&self, needed: u64) -> Result<()> {
        let cache = self.cache().root();
        // The folder is made with the first file.
        let there = cache
            .ancestors()
            .find(|folder| folder.is_dir())
            .unwrap_or(Path::new("/"));
        let available = self
            .options()
            .system
            .available_space(there)
            .context("read", there)?;
        if needed > available {
            return Err(HubError::DiskFull {
                needed,
                available,
                folder: cache.to_owned(),
            });
        }
        Ok(())
    }

    async fn fetch_files(
        &self,
        http: &Http,
        reference: &HubReference,
        plan: &Plan,
        missing: Vec<(&RepoFile, u64)>,
        meter: &Meter<'_>,
    ) -> Result<u64> {
        // Files of one content have one blob.
        let mut places = BTreeMap::<_, Vec<&RepoPath>>::new();
        for file in plan.files.iter().filter(|file| !is_last(&file.path)) {
            places.entry(file.hash).or_default().push(&file.path);
        }
        let absent: BTreeSet<_> = missing.iter().map(|(file, _)| file.hash).collect();
        for (hash, paths) in places.iter().filter(|(hash, _)| !absent.contains(hash)) {
            paths
                .iter()
                .try_for_each(|path| plan.folder.link(&plan.commit, path, hash))?;
        }
        let at_once = self.options().files_at_once.max(1);
        let mut waiting = missing.into_iter();
        let mut running = FuturesUnordered::new();
        let mut received = 0;
        loop {
            while running.len() < at_once
                && let Some((file, present)) = waiting.next()
            {
                let url = http.url(parts(reference, &plan.commit).chain(file.path.components()));
                let job = Job {
                    http,
                    folder: &plan.folder,
                    system: &*self.options().system,
                    meter,
                    url,
                    file,
                    present,
                };
                let places = places.get(&file.hash).map(Vec::as_slice);
                running.push(fetch_one(job, &plan.commit, places.unwrap_or_default()));
            }
            match running.next().await {
                Some(done) => received += done?,
                None => break,
            }
        }
        plan.files
            .iter()
            .filter(|file| is_last(&file.path))
            .try_for_each(|file| plan.folder.link(&plan.commit, &file.path, &file.hash))?;
        Ok(received)
    }

    /// Compares every file of a cached model with its hash, or the one that the reference names, and fetches those that are
    /// damaged or missing. Pickles, which Python may have fetched, are not.
    ///
    /// # Errors
    ///
    /// As [`HubCache::verify`](crate::HubCache::verify) and [`fetch`](Self::fetch), and [`HubError::Busy`] while someone
    /// else fetches it.
    pub async fn repair(
        &self,
        reference: &HubReference,
        tell: &(dyn Fn(FetchEvent) + Send + Sync),
    ) -> Result<Repaired> {
        let found = self.compare(reference, tell).await?;
        let broken: BTreeSet<RepoPath> = found.broken().filter(|path| !is_pickle(path)).cloned().collect();
        let pinned = HubReference {
            file: None,
            revision: found.commit.parse::<Revision>()?,
            ..reference.clone()
        };
        if broken.is_empty() {
            return Ok(Repaired {
                found,
                fetched_bytes: 0,
            });
        }
        // Nothing is thrown away while the hub does not say that it has it.
        let info = self.info_with(&pinned, tell).await?;
        let request = SnapshotRequest::new(pinned).with_files(FileSelection::Files(broken));
        request.files.apply(&reference.repo, &info.files)?;
        let (cache, repo, report) = (self.cache().clone(), reference.repo.clone(), found.clone());
        blocking(move || discard(&cache, &repo, &report)).await??;
        let snapshot = self.fetch(&request, tell).await?;
        Ok(Repaired {
            found,
            fetched_bytes: snapshot.fetched_bytes,
        })
    }

    /// As [`HubCache::verify`](crate::HubCache::verify), on a thread of its own that ends when nobody waits for it.
    async fn compare(&self, reference: &HubReference, tell: Listener<'_>) -> Result<Verification> {
        let (cache, whole) = (self.cache().clone(), reference.clone());
        let (read, mut reads) = tokio::sync::watch::channel((0, 0));
        let mut work = tokio::task::spawn_blocking(move || {
            cache.verify(&whole, |done, bytes| match read.send((done, bytes)) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            })
        });
        loop {
            tokio::select! {
                biased;
                Ok(()) = reads.changed() => {
                    let (done, bytes) = *reads.borrow_and_update();
                    tell(FetchEvent::Checking { file: reference.repo.to_string(), done, bytes });
                }
                found = &mut work => return found.map_err(panicked)?,
            }
        }
    }
}

/// Without its configuration a snapshot is no model. So it comes last into its place: a commit that was named is found
/// without a ref, and must not be taken for whole where its fetch was interrupted.
fn is_last(path: &RepoPath) -> bool {
    path.as_str() == "config.json"
}

/// The address of a repository's files at a commit, in parts.
fn parts<'a>(reference: &'a HubReference, commit: &'a str) -> impl Iterator<Item = &'a str> {
    reference.repo.as_str().split('/').chain(["resolve", commit])
}

/// Fetches a file and puts it into its places of the snapshot.
async fn fetch_one(job: Job<'_>, commit: &str, places: &[&RepoPath]) -> Result<u64> {
    let (folder, file, meter) = (job.folder, job.file, job.meter);
    let received = job.run().await?;
    for path in places {
        folder.link(commit, path, &file.hash)?;
    }
    meter.tell(FetchEvent::Fetched {
        file: file.path.clone(),
    });
    Ok(received)
}

/// Removes the blobs of damaged files.
fn discard(cache: &crate::HubCache, repo: &RepoId, report: &Verification) -> Result<()> {
    let cached = cache.repository(repo)?;
    let revisions = cached.into_iter().flat_map(|cached| cached.revisions);
    let revision = revisions
        .into_iter()
        .find(|revision| revision.commit == report.commit);
    let damaged: BTreeSet<&RepoPath> = report
        .files
        .iter()
        .filter(|(path, state)| matches!(state, FileState::Damaged { .. }) && !is_pickle(path))
        .map(|(path, _)| path)
        .collect();
    let files = revision.into_iter().flat_map(|revision| revision.files);
    let blobs = files
        .filter(|file| damaged.contains(&file.path))
        .filter_map(|file| file.blob);
    cache.discard(repo, &blobs.collect())
}

impl Plan {
    /// Files whose blobs are not here, each content once, with the bytes of them that are.
    fn missing(&self) -> Vec<(&RepoFile, u64)> {
        let mut seen = BTreeSet::new();
        let absent = self
            .files
            .iter()
            .filter(|file| !is_here(&self.folder, file) && seen.insert(file.hash));
        absent.map(|file| (file, half_made(&self.folder, file))).collect()
    }
}
