//! One file: taken up where it was left, checked, and only then given its name.

use std::path::Path;
use std::time::Duration;

use reqwest::header::{CONTENT_RANGE, HeaderMap};
use reqwest::{StatusCode, Url};

use super::http::{Answer, Http, header, spoken};
use super::progress::{FetchEvent, Meter};
use super::sink::{Sink, blocking};
use super::{HubSystem, RepoFile};
use crate::error::{Context, Result};
use crate::layout::RepoFolder;
use crate::lock::{Attempt, Lock};
use crate::{BlobHash, HubError};

/// So often is looked whether a lock is free.
const LOOK: Duration = Duration::from_millis(200);
/// A try that brought so much, or this part of the file, got on: those before it count no more.
const HEADWAY: u64 = 1 << 20;
const HEADWAY_PART: u64 = 20;

/// What fetching a file needs to know.
pub(super) struct Job<'a> {
    pub(super) http: &'a Http,
    pub(super) folder: &'a RepoFolder,
    pub(super) system: &'a dyn HubSystem,
    pub(super) meter: &'a Meter<'a>,
    /// Where the file is, at its commit.
    pub(super) url: Url,
    pub(super) file: &'a RepoFile,
    /// Bytes of it that are counted as present.
    pub(super) present: u64,
}

/// Whether a blob is here with the length that it should have.
pub(super) fn is_here(folder: &RepoFolder, file: &RepoFile) -> bool {
    std::fs::metadata(folder.blob(&file.hash)).is_ok_and(|meta| meta.is_file() && meta.len() == file.bytes)
}

/// Bytes of a file that are here half-made.
pub(super) fn half_made(folder: &RepoFolder, file: &RepoFile) -> u64 {
    let found = std::fs::metadata(folder.incomplete(&file.hash)).map_or(0, |meta| meta.len());
    if found > file.bytes { 0 } else { found }
}

/// Waits until a lock is free, and tells whom it waits for.
pub(super) async fn wait_for(
    system: &dyn HubSystem,
    meter: &Meter<'_>,
    what: &str,
    attempt: impl Fn() -> Result<Attempt>,
) -> Result<Lock> {
    let mut told = None;
    loop {
        match attempt()? {
            Attempt::Held(lock) => return Ok(lock),
            Attempt::Busy(holder) => {
                if told.as_ref() != Some(&holder) {
                    meter.tell(FetchEvent::Waiting {
                        file: what.to_owned(),
                        holder: holder.clone(),
                    });
                    told = Some(holder);
                }
            }
        }
        system.sleep(LOOK).await;
    }
}

impl Job<'_> {
    /// Brings the file's blob into the cache, and returns the bytes that came over the network.
    pub(super) async fn run(self) -> Result<u64> {
        let name = self.file.path.as_str();
        let lock_path = self.folder.blob_lock(&self.file.hash);
        let lock = wait_for(self.system, self.meter, name, || Lock::try_alone(&lock_path)).await?;
        if is_here(self.folder, self.file) {
            // Whoever was waited for has fetched it.
            self.meter.correct(self.file.bytes as i64 - self.present as i64);
            return Ok(0);
        }
        let half = self.folder.incomplete(&self.file.hash);
        let told = |done, bytes| {
            self.meter.tell(FetchEvent::Checking {
                file: name.to_owned(),
                done,
                bytes,
            });
        };
        let mut sink = Sink::open(half.clone(), self.file.hash, self.file.bytes, lock, told).await?;
        self.meter.correct(sink.length() as i64 - self.present as i64);
        let mut taken_up = sink.length() > 0;
        let mut received = 0;
        loop {
            received += self.receive(&mut sink).await?;
            let written = sink.finish().await?;
            if written.hash == self.file.hash {
                self.name(&half).await?;
                return Ok(received);
            }
            remove(&half)?;
            self.meter.correct(-(self.file.bytes as i64));
            if !taken_up {
                return Err(self.wrong(self.file.hash.to_string(), written.hash.to_string()));
            }
            // What an earlier try left may have been the wrong part: all of it again, once.
            taken_up = false;
            tracing::warn!(
                file = name,
                "what was left of an earlier download is not of this file"
            );
            sink = Sink::open(half.clone(), self.file.hash, self.file.bytes, written.lock, told).await?;
        }
    }

    /// Gives a file that is right its name.
    async fn name(&self, half: &Path) -> Result<()> {
        let (half, blob) = (half.to_owned(), self.folder.blob(&self.file.hash));
        blocking(move || std::fs::rename(half, &blob).context("write", &blob)).await?
    }

    fn wrong(&self, expected: String, got: String) -> HubError {
        HubError::WrongContent {
            file: self.file.path.to_string(),
            expected,
            got,
        }
    }

    /// Receives until all bytes are there, trying again what may pass. Returns the bytes that came.
    async fn receive(&self, sink: &mut Sink) -> Result<u64> {
        let mut backoff = self.http.backoff();
        let mut reached = sink.length();
        let mut received = 0;
        let headway = HEADWAY.min(self.file.bytes / HEADWAY_PART).max(1);
        loop {
            let Err(error) = self.receive_once(sink, &mut received).await else {
                return Ok(received);
            };
            if matches!(error, HubError::WrongContent { .. }) {
                // Nothing of it may be taken up.
                sink.restart().await?;
            }
            if sink.length() >= reached + headway {
                backoff.reset();
                reached = sink.length();
            }
            let Some(after) = backoff.next(&error) else {
                return Err(error);
            };
            self.meter.tell(FetchEvent::Retrying {
                file: self.file.path.to_string(),
                reason: error.to_string(),
                after,
            });
            self.system.sleep(after).await;
        }
    }

    async fn receive_once(&self, sink: &mut Sink, received: &mut u64) -> Result<()> {
        let size = self.file.bytes;
        if sink.length() == size {
            return Ok(());
        }
        let from = sink.length();
        let Answer { mut response, etag } = self.http.get(&self.url, from, self.file.path.as_str()).await?;
        self.check_etag(etag)?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if begins_at(response.headers(), from, size) => {}
            // The whole file, though a part was asked for.
            StatusCode::OK => self.begin_anew(sink).await?,
            status => {
                self.begin_anew(sink).await?;
                if status != StatusCode::RANGE_NOT_SATISFIABLE && status != StatusCode::PARTIAL_CONTENT {
                    return Err(HubError::Answer {
                        url: spoken(&self.url),
                        why: format!("status {status} has no file"),
                    });
                }
                return Err(self.truncated(0));
            }
        }
        while let Some(chunk) = self.http.chunk(&self.url, &mut response).await? {
            let count = chunk.len() as u64;
            if sink.length() + count > size {
                return Err(self.wrong(format!("{size} bytes"), "more".to_owned()));
            }
            sink.write(chunk).await?;
            *received += count;
            self.meter.add(&self.file.path, sink.length(), size, count);
        }
        if sink.length() < size {
            return Err(self.truncated(sink.length()));
        }
        Ok(())
    }

    async fn begin_anew(&self, sink: &mut Sink) -> Result<()> {
        if sink.length() > 0 {
            self.meter.correct(-(sink.length() as i64));
            sink.restart().await?;
        }
        Ok(())
    }

    fn truncated(&self, got: u64) -> HubError {
        HubError::Truncated {
            file: self.file.path.to_string(),
            got,
            expected: self.file.bytes,
        }
    }

    /// The hub names a file by its hash: another one is another file.
    fn check_etag(&self, etag: Option<String>) -> Result<()> {
        let Some(hash) = etag.and_then(|etag| etag.parse::<BlobHash>().ok()) else {
            return Ok(());
        };
        if hash == self.file.hash {
            return Ok(());
        }
        Err(HubError::Changed {
            file: self.file.path.to_string(),
            expected: self.file.hash.to_string(),
            got: hash.to_string(),
        })
    }
}

/// Whether a part of a file is the one that was asked for, by `Content-Range: bytes FROM-TO/SIZE`.
fn begins_at(headers: &HeaderMap, from: u64, size: u64) -> bool {
    let Some(range) = header(headers, CONTENT_RANGE.as_str()) else {
        return false;
    };
    let Some((range, total)) = range
        .strip_prefix("bytes ")
        .and_then(|range| range.split_once('/'))
    else {
        return false;
    };
    let begins = range
        .split_once('-')
        .and_then(|(begin, _)| begin.trim().parse().ok());
    begins == Some(from) && (total == "*" || total.trim().parse() == Ok(size))
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("remove", path),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_the_one_that_was_asked_for() {
        let check = |range: &str, expected: bool| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_RANGE, range.parse().unwrap());
            assert_eq!(begins_at(&headers, 10, 100), expected, "{range}");
        };
        check("bytes 10-99/100", true);
        check("bytes 10-99/*", true);
        check("bytes 0-99/100", false);
        check("bytes 10-98/99", false);
        check("bytes */100", false);
        check("items 10-99/100", false);
        check("bytes 10", false);
        assert!(!begins_at(&HeaderMap::new(), 10, 100));
    }
}
