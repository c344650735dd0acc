//! `cargo xtask api`: what each crate shows to others, as a list that a change of it changes.
//!
//! rustdoc writes down what it knows of the public items, and `public-api` makes lines of it. rustdoc's JSON has no stable form
//! yet, so that both have to be of one format: that of the oldest Rust that is supported.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use crate::error::{Context, Error, Result};
use crate::packages::{self, Package, Target};
use crate::workspace::{self, cargo, run as go};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only say what is out of date
    #[arg(long)]
    check: bool,
}

/// Where the lists are.
const FOLDER: &str = "docs/reference/api";

pub(crate) fn run(args: &Args) -> Result<()> {
    let workspace = packages::read()?;
    let folder = workspace::root().join(FOLDER);
    fs::create_dir_all(&folder).context("make the folder", &folder)?;
    let documented = workspace.target.join("doc");
    go(&mut document()?)?;
    let mut found = Vec::new();
    for (package, library) in libraries(&workspace.packages) {
        let lines = items(&documented.join(format!("{}.json", library.replace('-', "_"))))?;
        let list = folder.join(format!("{}.txt", package.name));
        let before = fs::read_to_string(&list).unwrap_or_default();
        if before == lines {
            continue;
        }
        if args.check {
            found.push(changed(&package.name, &before, &lines));
        } else {
            fs::write(&list, &lines).context("write", &list)?;
            println!("api: {}", list.display());
        }
    }
    if found.is_empty() {
        println!("api: the lists are as the code has it");
        return Ok(());
    }
    Err(Error::Refused(format!(
        "what crates show to others has changed (`cargo xtask api` writes it down)\n{}",
        found.join("\n")
    )))
}

/// The packages that are published and have a library, and its name. That of mlx-sys is upstream's, which is not ours to
/// promise.
fn libraries(packages: &[Package]) -> Vec<(&Package, &str)> {
    let is_library = |target: &&Target| target.kinds.iter().any(|kind| kind == "lib");
    packages
        .iter()
        .filter(|package| package.published && package.name != "mlx-sys")
        .filter_map(|package| Some((package, &*package.targets.iter().find(is_library)?.name)))
        .collect()
}

/// Names the rustdoc that this program stands in for.
const RUSTDOC: &str = "XTASK_RUSTDOC";

/// Has rustdoc write down what it knows of all packages.
fn document() -> Result<Command> {
    let mut command = cargo();
    command.args(["doc", "--workspace", "--no-deps", "--lib"]);
    let own = env::current_exe().context("find this program below", &workspace::root())?;
    let rustdoc = env::var_os("RUSTDOC").unwrap_or_else(|| OsString::from("rustdoc"));
    command.env("RUSTDOC", own).env(RUSTDOC, rustdoc);
    command.env("RUSTDOCFLAGS", "-Zunstable-options --output-format=json");
    Ok(command)
}

/// Does what cargo asks of rustdoc, where this program is called in its place. A stable one writes JSON where it is told that
/// this is meant; all else that cargo calls must not be told, or it would be built anew.
pub(crate) fn stand_in() -> Option<ExitCode> {
    let rustdoc = env::var_os(RUSTDOC)?;
    let mut command = Command::new(&rustdoc);
    command.args(env::args_os().skip(1));
    command.env("RUSTC_BOOTSTRAP", "1").env_remove(RUSTDOC);
    Some(match command.status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {} did not start: {error}", rustdoc.display());
            ExitCode::FAILURE
        }
    })
}

/// The public items in rustdoc's JSON, one a line, without the implementations that every type has or that are derived, which
/// are many and say little.
fn items(json: &Path) -> Result<String> {
    let found = public_api::Builder::from_rustdoc_json(json)
        .omit_blanket_impls(true)
        .omit_auto_trait_impls(true)
        .omit_auto_derived_impls(true)
        .build();
    let api = found.map_err(|error| {
        let what = format!("the public items in `{}` cannot be read: {error}", json.display());
        Error::Refused(format!(
            "{what}\n  run this by the Rust that `rust-version` names"
        ))
    })?;
    Ok(api
        .items()
        .map(|item| format!("{item}\n"))
        .collect::<Vec<_>>()
        .concat())
}

/// The lines that went and came, below the package that they are of.
fn changed(package: &str, before: &str, now: &str) -> String {
    let missing = |lines: &str, of: &str, sign: char| -> Vec<String> {
        let of: Vec<&str> = of.lines().collect();
        let gone = lines.lines().filter(|line| !of.contains(line));
        gone.map(|line| format!("    {sign} {line}")).collect()
    };
    let mut told = vec![format!("  {package}")];
    told.extend(missing(before, now, '-'));
    told.extend(missing(now, before, '+'));
    told.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_published_library_has_a_list_and_nothing_else_has() {
        let packages = packages::read().unwrap().packages;
        let listed = libraries(&packages).into_iter();
        let mut expect: Vec<String> = listed
            .map(|(package, _)| format!("{}.txt", package.name))
            .collect();
        expect.sort();
        let files = fs::read_dir(workspace::root().join(FOLDER)).unwrap();
        let mut found: Vec<String> = files
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        found.sort();
        assert_eq!(found, expect);
        assert!(
            expect.contains(&"mlx-engine-core.txt".to_owned()) && !expect.contains(&"xtask.txt".to_owned())
        );
    }

    #[test]
    fn a_change_shows_what_went_and_what_came() {
        let told = changed("core", "pub fn a()\npub fn b()\n", "pub fn b()\npub fn c()\n");
        assert_eq!(told, "  core\n    - pub fn a()\n    + pub fn c()");
    }
}
