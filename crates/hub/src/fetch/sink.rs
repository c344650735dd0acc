//! Where the bytes of a file go: a half-made file beside its place, hashed on the way.
//!
//! A thread of its own writes and hashes, and holds the lock of the file for as long as it writes: a download that is
//! given up is not begun by someone else before its last byte is on the disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};

use crate::error::{Context, Result};
use crate::hash::Hasher;
use crate::lock::Lock;
use crate::{BlobHash, HubError};

/// So many pieces wait to be written.
const WAITING: usize = 32;
/// So much of what is here is hashed before anybody may give it up.
const STRETCH: u64 = 64 << 20;

enum Piece {
    Data(Bytes),
    Restart,
    Finish,
}

/// A file that is being written.
pub(super) struct Sink {
    pieces: mpsc::Sender<Piece>,
    writer: JoinHandle<Result<Option<Written>>>,
    length: u64,
}

/// A file that was written, with the lock that it was written under.
pub(super) struct Written {
    pub(super) hash: BlobHash,
    pub(super) lock: Lock,
}

struct Writer {
    file: File,
    path: PathBuf,
    hasher: Hasher,
    like: BlobHash,
    size: u64,
}

impl Sink {
    /// Opens the half-made file of a blob with `size` bytes, and takes in what is there of it. `told` hears how much was
    /// taken in, of how much, where that takes a while.
    pub(super) async fn open(
        path: PathBuf,
        like: BlobHash,
        size: u64,
        lock: Lock,
        told: impl Fn(u64, u64),
    ) -> Result<Self> {
        // The lock is wherever something happens to the file.
        let opened = blocking(move || Ok((Writer::open(path, like, size)?, lock))).await?;
        let ((mut writer, found), mut lock) = opened?;
        let mut length = 0;
        while length < found {
            let taken =
                blocking(move || Ok((writer.take_in(STRETCH.min(found - length))?, writer, lock))).await?;
            let count;
            (count, writer, lock) = taken?;
            if count == 0 {
                break;
            }
            length += count;
            if found > STRETCH {
                told(length, found);
            }
        }
        let (pieces, waiting) = mpsc::channel(WAITING);
        let writer = tokio::task::spawn_blocking(move || writer.run(waiting, lock));
        Ok(Self {
            pieces,
            writer,
            length,
        })
    }

    /// Bytes that were given to it.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    pub(super) async fn write(&mut self, data: Bytes) -> Result<()> {
        self.length += data.len() as u64;
        self.send(Piece::Data(data)).await
    }

    /// Throws away what there is.
    pub(super) async fn restart(&mut self) -> Result<()> {
        self.length = 0;
        self.send(Piece::Restart).await
    }

    /// Brings everything to the disk.
    pub(super) async fn finish(mut self) -> Result<Written> {
        self.send(Piece::Finish).await?;
        match self.writer.await.map_err(panicked)?? {
            Some(written) => Ok(written),
            None => Err(HubError::Cancelled),
        }
    }

    async fn send(&mut self, piece: Piece) -> Result<()> {
        if self.pieces.send(piece).await.is_ok() {
            return Ok(());
        }
        // It takes no more because writing failed.
        match (&mut self.writer).await.map_err(panicked)? {
            Err(error) => Err(error),
            Ok(_) => Err(HubError::Cancelled),
        }
    }
}

/// Runs what would hold the runtime up.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(panicked)
}

/// The runtime is being taken down, or our own code panicked.
pub(super) fn panicked(error: JoinError) -> HubError {
    if error.is_panic() {
        std::panic::resume_unwind(error.into_panic());
    }
    HubError::Cancelled
}

impl Writer {
    fn open(path: PathBuf, like: BlobHash, size: u64) -> Result<(Self, u64)> {
        let folder = path.parent().unwrap_or(&path);
        std::fs::create_dir_all(folder).context("make the folder", folder)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .context("open", &path)?;
        let mut found = file.metadata().context("read", &path)?.len();
        if found > size {
            // It is of no file with this hash.
            file.set_len(0).context("write", &path)?;
            found = 0;
        }
        let writer = Self {
            file,
            path,
            hasher: like.hasher(size),
            like,
            size,
        };
        Ok((writer, found))
    }

    /// Hashes the next bytes that are in the file, and stands behind them. Returns their number.
    fn take_in(&mut self, most: u64) -> Result<u64> {
        let mut part = (&mut self.file).take(most);
        self.hasher.read(&mut part).context("read", &self.path)
    }

    fn run(mut self, mut pieces: mpsc::Receiver<Piece>, lock: Lock) -> Result<Option<Written>> {
        while let Some(piece) = pieces.blocking_recv() {
            match piece {
                Piece::Data(data) => {
                    let written = self.file.write_all(&data);
                    written.map_err(|error| unwritten(error, &self.path, self.size))?;
                    self.hasher.update(&data);
                }
                Piece::Restart => {
                    self.hasher = self.like.hasher(self.size);
                    let emptied = self.file.set_len(0).and_then(|()| self.file.rewind());
                    emptied.context("write", &self.path)?;
                }
                Piece::Finish => {
                    self.file.sync_all().context("write", &self.path)?;
                    let hash = self.hasher.finish();
                    return Ok(Some(Written { hash, lock }));
                }
            }
        }
        // Given up: what has come stays for the next try.
        Ok(None)
    }
}

/// A write that failed, where the disk is full in terms of the disk.
fn unwritten(source: io::Error, path: &Path, size: u64) -> HubError {
    let folder = path.parent().unwrap_or(path).to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => HubError::DiskFull {
            needed: size.saturating_sub(std::fs::metadata(path).map_or(0, |meta| meta.len())),
            available: 0,
            folder,
        },
        _ => HubError::Io {
            action: "write",
            path: path.to_owned(),
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lock::Attempt;

    fn lock(folder: &Path) -> Lock {
        match Lock::try_alone(&folder.join("lock")).unwrap() {
            Attempt::Held(lock) => lock,
            Attempt::Busy(holder) => panic!("held by {holder}"),
        }
    }

    fn hash(content: &[u8]) -> BlobHash {
        let mut hasher = BlobHash::Sha256([0; 32]).hasher(content.len() as u64);
        hasher.update(content);
        hasher.finish()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn a_file_is_the_same_wherever_it_was_cut(
            content in prop::collection::vec(any::<u8>(), 0..5000),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
            size in 1_usize..700,
            begin_anew in any::<bool>(),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().join("blobs/x.incomplete");
                let expected = hash(&content);
                let bytes = content.len() as u64;
                let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(content.len() + 1)).collect();
                cuts.sort_unstable();
                for cut in cuts {
                    let mut sink = Sink::open(path.clone(), expected, bytes, lock(folder.path()), |_, _| {}).await.unwrap();
                    let start = sink.length() as usize;
                    assert!(start <= cut, "no more is there than was written");
                    for piece in content[start..cut].chunks(size) {
                        sink.write(Bytes::copy_from_slice(piece)).await.unwrap();
                    }
                    // Given up, as by Ctrl-C.
                    let Sink { pieces, writer, .. } = sink;
                    drop(pieces);
                    assert!(writer.await.unwrap().unwrap().is_none());
                }
                let mut sink = Sink::open(path.clone(), expected, bytes, lock(folder.path()), |_, _| {}).await.unwrap();
                if begin_anew {
                    sink.write(Bytes::from_static(b"wrong")).await.unwrap();
                    sink.restart().await.unwrap();
                }
                let start = sink.length() as usize;
                for piece in content[start..].chunks(size) {
                    sink.write(Bytes::copy_from_slice(piece)).await.unwrap();
                }
                assert_eq!(sink.length(), bytes);
                let written = sink.finish().await.unwrap();
                assert_eq!(written.hash, expected);
                assert_eq!(std::fs::read(&path).unwrap(), content);
            });
        }
    }

    #[test]
    fn a_full_disk_is_told_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "1234").unwrap();
        let error = unwritten(io::ErrorKind::StorageFull.into(), &path, 10);
        assert!(matches!(error, HubError::DiskFull { needed: 6, .. }), "{error}");
        let error = unwritten(io::ErrorKind::PermissionDenied.into(), &path, 10);
        assert!(matches!(error, HubError::Io { .. }));
    }

    #[tokio::test]
    async fn more_than_the_file_has_is_thrown_away_when_it_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "too much").unwrap();
        let sink = Sink::open(path.clone(), hash(b"abc"), 3, lock(folder.path()), |_, _| {})
            .await
            .unwrap();
        assert_eq!((sink.length(), std::fs::metadata(&path).unwrap().len()), (0, 0));
    }

    /// A disk that is full at once.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_write_that_fails_comes_back_to_who_writes() {
        let folder = tempfile::tempdir().unwrap();
        let (writer, _) = Writer::open(folder.path().join("x"), hash(b""), 1 << 30).unwrap();
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let (pieces, waiting) = mpsc::channel(1);
        let lock = lock(folder.path());
        let writer = tokio::task::spawn_blocking(move || Writer { file: full, ..writer }.run(waiting, lock));
        let mut sink = Sink {
            pieces,
            writer,
            length: 0,
        };
        let mut error = None;
        for _ in 0..8 {
            if let Err(failed) = sink.write(Bytes::from_static(b"data")).await {
                error = Some(failed);
                break;
            }
        }
        assert!(matches!(error, Some(HubError::DiskFull { .. })), "{error:?}");
    }
}
