//! The Python packages that tests and fixtures compare with.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};
use crate::fetch::BY_HAND;
use crate::staging::{Staging, place};
use crate::workspace::{PYTHON, output, run as go};

/// Every package with its version and the hashes of its wheels; nothing beside them is looked for.
const REQUIREMENTS: &str = include_str!("../oracle-requirements.txt");

/// Puts the packages into the cache, unless they are there, and returns their folder, which is a `PYTHONPATH`.
pub(crate) fn bring(cache: &Path) -> Result<PathBuf> {
    let folder = cache.join(folder_name(&python_version()?, REQUIREMENTS));
    if folder.is_dir() {
        return Ok(folder);
    }
    println!("the oracles: mlx-lm and what it needs, about 340 MB unpacked");
    let staging = Staging::new(cache)?;
    let requirements = staging.path().join("requirements.txt");
    fs::write(&requirements, REQUIREMENTS).context("write", &requirements)?;
    let packages = staging.path().join("packages");
    let mut pip = Command::new(PYTHON);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
        .args(["--no-deps", "--only-binary=:all:", "--require-hashes", "--target"])
        .arg(&packages)
        .arg("-r")
        .arg(&requirements);
    let by_hand = cache.join(BY_HAND);
    if by_hand.is_dir() {
        pip.arg("--find-links").arg(by_hand);
    }
    // It warns of what `--target` keeps from happening.
    pip.env("PIP_ROOT_USER_ACTION", "ignore");
    // pip writes to its temporary folder first: kept in ours, it is on the right disk and never left behind.
    pip.env("TMPDIR", staging.folder("arriving")?);
    go(&mut pip)?;
    place(&packages, &folder)?;
    println!("the oracles: in {}", folder.display());
    Ok(folder)
}

/// A command of the oracles' Python.
pub(crate) fn python(packages: &Path) -> Command {
    let mut command = Command::new(PYTHON);
    command.env("PYTHONPATH", packages);
    // Bytecode beside a script would be a difference.
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

/// Compiled packages are of one version of Python.
fn python_version() -> Result<String> {
    let mut ask = Command::new(PYTHON);
    ask.args(["-c", "import sys; print('%d.%d' % sys.version_info[:2])"]);
    let answer = output(&mut ask)?;
    let version = String::from_utf8_lossy(&answer.stdout).trim().to_owned();
    if answer.status.success() && !version.is_empty() {
        return Ok(version);
    }
    Err(Error::Failed {
        command: OsStr::new(PYTHON).to_string_lossy().into_owned(),
        status: String::from_utf8_lossy(&answer.stderr).trim().to_owned(),
    })
}

/// Another list or another Python is another folder, so that two checkouts do not disturb each other.
fn folder_name(python: &str, requirements: &str) -> String {
    let digest = Sha256::digest(requirements);
    let [a, b, c, d, ..] = digest[..] else {
        return format!("oracle-python{python}");
    };
    format!("oracle-python{python}-{:08x}", u32::from_be_bytes([a, b, c, d]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_package_has_one_version_and_hashes() {
        let whole = REQUIREMENTS.replace("\\\n", "");
        let lines = whole
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        for line in lines.clone() {
            let hashes: Vec<_> = line.split("--hash=sha256:").skip(1).map(str::trim).collect();
            let is_hash = |hash: &&str| hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
            assert!(!hashes.is_empty() && hashes.iter().all(is_hash), "{line}");
        }
        let mut names: Vec<_> = lines
            .map(|line| line.split_once("==").expect(line).0.to_lowercase())
            .collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert!(count > 20 && names.len() == count, "{names:?}");
    }

    #[test]
    fn mlx_is_the_one_that_is_linked() {
        for package in ["mlx", "mlx-cpu", "mlx-metal"] {
            let pin = format!("\n{package}=={}", crate::cache::MLX_VERSION);
            assert!(REQUIREMENTS.contains(&pin), "{pin}");
        }
    }

    #[test]
    fn another_list_is_another_folder() {
        assert_ne!(folder_name("3.11", "a==1"), folder_name("3.11", "a==2"));
        assert_ne!(folder_name("3.11", "a==1"), folder_name("3.12", "a==1"));
    }

    #[test]
    fn what_is_there_is_not_fetched() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache
            .path()
            .join(folder_name(&python_version().unwrap(), REQUIREMENTS));
        fs::create_dir(&folder).unwrap();
        assert_eq!(bring(cache.path()).unwrap(), folder);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    }
}
