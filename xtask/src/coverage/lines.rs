//! Lines of code, and which of them ran.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};
use crate::packages::Package;
use crate::workspace;

/// How often each line of each file ran.
pub(super) type Lines = BTreeMap<PathBuf, BTreeMap<usize, u64>>;

/// Lines of code, and those of them that ran.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Count {
    pub(super) all: u64,
    pub(super) run: u64,
}

impl Count {
    pub(super) fn percent(self) -> f64 {
        if self.all == 0 {
            return 100.0;
        }
        self.run as f64 / self.all as f64 * 100.0
    }
}

/// The lines of each file, from lcov's records: `SF:` begins a file, `DA:` is a line and how often it ran. A line that several
/// records have ran as often as they say together.
pub(super) fn read(lcov: &str) -> Lines {
    let mut files = Lines::new();
    let mut file = PathBuf::new();
    for line in lcov.lines() {
        if let Some(name) = line.strip_prefix("SF:") {
            file = PathBuf::from(name);
        } else if let Some((number, times)) = line.strip_prefix("DA:").and_then(|rest| rest.split_once(',')) {
            let times = times.split(',').next().unwrap_or_default();
            if let (Ok(number), Ok(times)) = (number.parse(), times.parse::<u64>()) {
                let count = files.entry(file.clone()).or_default().entry(number).or_default();
                *count = count.saturating_add(times);
            }
        }
    }
    files
}

/// The counts of each file of a package's own sources. Tests are no part of them, beside the code or within it: they run
/// by being tests, and would make the number better than it is.
pub(super) fn per_file(lines: &Lines, packages: &[Package]) -> Result<BTreeMap<(String, PathBuf), Count>> {
    let mut found = BTreeMap::new();
    let root = workspace::root();
    let mut tests = BTreeSet::new();
    let mut counted = Vec::new();
    for (file, lines) in lines {
        let path = root.join(file);
        let owner = packages.iter().find(|package| {
            let sources = package.manifest.parent().unwrap_or(Path::new("")).join("src");
            path.starts_with(sources)
        });
        if let Some(package) = owner {
            let text = fs::read_to_string(&path).context("read", &path)?;
            let (own, files) = test_code(&path, &text);
            tests.extend(files);
            let code = lines.iter().filter(|(number, _)| !own.contains(number));
            let count = code.fold(Count::default(), |count, (_, times)| Count {
                all: count.all + 1,
                run: count.run + u64::from(*times > 0),
            });
            counted.push((package.name.clone(), path, count));
        }
    }
    for (package, path, count) in counted {
        // A module's own modules lie below its name.
        let test = |module: &PathBuf| path == *module || path.starts_with(module.with_extension(""));
        if !tests.iter().any(test) && count.all > 0 {
            let short = path.strip_prefix(&root).unwrap_or(&path).to_path_buf();
            found.insert((package, short), count);
        }
    }
    Ok(found)
}

/// What `#[cfg(test)]` stands before, as rustfmt lays it out: the lines of a file, and the files of modules.
fn test_code(path: &Path, text: &str) -> (BTreeSet<usize>, Vec<PathBuf>) {
    let (mut lines, mut files) = (BTreeSet::new(), Vec::new());
    let mut numbered = text.lines().zip(1..);
    while let Some((line, number)) = numbered.next() {
        if line.trim() != "#[cfg(test)]" {
            continue;
        }
        lines.insert(number);
        let indent = &line[..line.len() - line.trim_start().len()];
        let (close, semicolon) = (format!("{indent}}}"), format!("{indent}mod "));
        for (line, number) in numbered.by_ref() {
            lines.insert(number);
            if let Some(name) = line
                .strip_prefix(&semicolon)
                .and_then(|rest| rest.strip_suffix(';'))
            {
                files.extend(module_files(path, name));
            }
            let one_line = line.starts_with(indent)
                && !line[indent.len()..].starts_with([' ', '#', '/'])
                && line.ends_with([';', ',']);
            if one_line || line.trim_end_matches(',') == close {
                break;
            }
        }
    }
    (lines, files)
}

/// Where the module `name` of a file may lie.
fn module_files(path: &Path, name: &str) -> [PathBuf; 2] {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let folder = path.parent().unwrap_or(Path::new(""));
    let folder = if ["mod", "lib", "main"].contains(&&*stem) {
        folder.to_path_buf()
    } else {
        folder.join(&*stem)
    };
    [
        folder.join(format!("{name}.rs")),
        folder.join(name).join("mod.rs"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packages::tests::sample;

    #[test]
    fn lines_are_counted_once_and_by_file() {
        let folder = tempfile::tempdir().unwrap();
        let sources = folder.path().join("core/src");
        fs::create_dir_all(&sources).unwrap();
        let mut core = sample("core", &[]);
        core.manifest = folder.path().join("core/Cargo.toml");
        let a = sources.join("a.rs");
        fs::write(
            &a,
            "fn a() {\n}\n\nfn b() {}\n#[cfg(test)]\nmod tests {\n    fn t() {}\n}\n",
        )
        .unwrap();
        let below = sources.join("b");
        fs::create_dir_all(below.join("tests")).unwrap();
        fs::write(below.join("mod.rs"), "fn b() {}\n#[cfg(test)]\nmod tests;\n").unwrap();
        let mut lcov = Vec::new();
        for (file, text) in [("tests.rs", "mod c;\nfn t() {}\n"), ("tests/c.rs", "fn c() {}\n")] {
            fs::write(below.join(file), text).unwrap();
            lcov.push(format!(
                "SF:{}\nDA:1,1\nDA:2,1\nend_of_record\n",
                below.join(file).display()
            ));
        }
        lcov.push(format!(
            "SF:{}\nDA:1,0\nend_of_record\n",
            below.join("mod.rs").display()
        ));
        let shown = a.display();
        lcov.push(format!(
            "TN:\nSF:{shown}\nDA:1,3\nDA:2,0\nend_of_record\nSF:{shown}\nDA:2,1\nDA:4,0,sum\nDA:7,1\nend_of_record\n\
             SF:/elsewhere/c.rs\nDA:1,0\nend_of_record\n"
        ));
        let found = per_file(&read(&lcov.concat()), &[core]).unwrap();
        let counts: Vec<_> = found.values().copied().collect();
        assert_eq!(counts, [Count { all: 3, run: 2 }, Count { all: 1, run: 0 }]);
        assert!((counts[0].percent() - 66.67).abs() < 0.01);
    }

    #[test]
    fn code_of_tests_is_told_from_the_rest() {
        let check = |text: &str, expected: &[usize], modules: &[&str]| {
            let (lines, files) = test_code(Path::new("/w/src/prefix/mod.rs"), text);
            assert_eq!(lines.into_iter().collect::<Vec<_>>(), expected, "{text}");
            let files: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
            assert_eq!(files, modules, "{text}");
        };
        check(
            "a();\n#[cfg(test)]\nmod tests {\n    x();\n}\nb();\n",
            &[2, 3, 4, 5],
            &[],
        );
        check(
            "#[cfg(test)]\nmod tests;\nfn b() {}\n",
            &[1, 2],
            &["/w/src/prefix/tests.rs", "/w/src/prefix/tests/mod.rs"],
        );
        check(
            "    #[cfg(test)]\n    /// Told; and more;\n    pub(crate) fn a(&self) {\n        x();\n    }\n    fn b() {}\n",
            &[1, 2, 3, 4, 5],
            &[],
        );
        check("    #[cfg(test)]\n    pace: None,\n    b: 1,\n", &[1, 2], &[]);
        check(
            "    #[cfg(test)]\n    if let Some(a) = b {\n        c();\n    }\n    d();\n",
            &[1, 2, 3, 4],
            &[],
        );
    }

    #[test]
    fn a_module_lies_beside_or_below() {
        let [beside, below] = module_files(Path::new("/w/src/lib.rs"), "faults");
        assert_eq!(
            (beside, below),
            ("/w/src/faults.rs".into(), "/w/src/faults/mod.rs".into())
        );
        let [beside, _] = module_files(Path::new("/w/src/mock.rs"), "tests");
        assert_eq!(beside, PathBuf::from("/w/src/mock/tests.rs"));
    }
}
