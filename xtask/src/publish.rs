//! `cargo xtask publish`: the crates, each after those that it needs, as a registry takes them.
//!
//! Cargo publishes a workspace in that order itself. What is said here is the order, what stands in the way, and what whoever takes the
//! crates from a registry has to know.

use std::env;
use std::path::Path;
use std::process::Command;

use crate::error::{Error, Result};
use crate::layers;
use crate::packages::{self, Kind, Package};
use crate::workspace::{self, cargo, output, run as go, spell};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Pack every crate as the registry would get it, and send nothing
    #[arg(long, conflicts_with = "execute")]
    dry_run: bool,

    /// Publish them, in place of listing them
    #[arg(long)]
    execute: bool,
}

/// What upstream publishes under the same name: ours is put in its place inside of this workspace alone.
const UPSTREAM: &str = "mlx-sys";

/// Holds the token of the registry, where `cargo login` has not written one down.
const TOKEN: &str = "CARGO_REGISTRY_TOKEN";

pub(crate) fn run(args: &Args) -> Result<()> {
    let workspace = packages::read()?;
    let order = order(&workspace.packages);
    for (package, at) in order.iter().zip(1..) {
        println!("publish: {at:>2} {}", package.name);
    }
    if let Some(note) = patched(&order) {
        println!("publish: to know: {note}");
    }
    let mut found = obstacles(&order);
    if !args.dry_run {
        found.extend(unready(&changed()?, has_token()));
    }
    for obstacle in &found {
        println!("publish: not yet: {obstacle}");
    }
    if args.execute && !found.is_empty() {
        return Err(Error::Refused(format!(
            "the crates cannot be published\n  {}",
            found.join("\n  ")
        )));
    }
    if args.execute || args.dry_run {
        let mut command = command(args.dry_run);
        println!("publish: {}", spell(&command));
        go(&mut command)?;
    }
    Ok(())
}

/// The call of cargo. Packed for a look, crates are not built; published, each is built as somebody builds it who takes it from the registry and
/// has the line for our `mlx-sys`, which a packed manifest loses.
fn command(dry_run: bool) -> Command {
    let mut command = cargo();
    command.args(["publish", "--workspace", "--exclude", UPSTREAM]);
    command.args(["--exclude", env!("CARGO_PKG_NAME")]);
    if dry_run {
        command.args(["--dry-run", "--no-verify", "--allow-dirty"]);
    } else {
        let ours = workspace::root().join("crates").join(UPSTREAM);
        let path = toml::Value::String(ours.display().to_string());
        command.arg("--config");
        command.arg(format!("patch.crates-io.{UPSTREAM}.path={path}"));
    }
    command
}

/// The packages that are published, each after those that it depends on, for its tests too; those of an upper layer first
/// otherwise.
fn order(packages: &[Package]) -> Vec<&Package> {
    let named = |name: &str| packages.iter().find(|package| package.name == name);
    let mut waiting: Vec<&Package> = layers::ORDER
        .iter()
        .filter(|name| **name != UPSTREAM)
        .filter_map(|name| named(name))
        .collect();
    let mut order: Vec<&Package> = Vec::new();
    while !waiting.is_empty() {
        let needs = |package: &Package, other: &Package| {
            package.name != other.name && package.dependencies.iter().any(|on| on.name == other.name)
        };
        let free = waiting
            .iter()
            .position(|package| !waiting.iter().any(|other| needs(package, other)));
        // Where they need each other in a circle cargo says so.
        order.push(waiting.remove(free.unwrap_or(0)));
    }
    order
}

/// What in the manifests stands in the way, each as a line.
fn obstacles(order: &[&Package]) -> Vec<String> {
    let mut found = Vec::new();
    for package in order {
        if !package.published {
            found.push(format!(
                "`publish` is false for {}: set it in Cargo.toml",
                package.name
            ));
        }
        for dependency in &package.dependencies {
            let line = format!(
                "`{}` has no version beside its path: give it one in Cargo.toml",
                dependency.name
            );
            // Cargo leaves such a line out where it is one of the tests.
            if dependency.unversioned && dependency.kind != Kind::Dev && !found.contains(&line) {
                found.push(line);
            }
        }
    }
    found
}

/// What around the manifests stands in the way, each as a line.
fn unready(changed: &[String], token: bool) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(first) = changed.first() {
        found.push(format!(
            "{} files are not committed, {first} among them: what is published has to be in the history",
            changed.len()
        ));
    }
    if !token {
        found.push(format!(
            "there is no token of the registry: run cargo login, or set {TOKEN}"
        ));
    }
    found
}

/// The files that are not committed.
fn changed() -> Result<Vec<String>> {
    let mut git = Command::new("git");
    git.current_dir(workspace::root()).args(["status", "--porcelain"]);
    let told = output(&mut git)?;
    if !told.status.success() {
        return Err(Error::Failed {
            command: spell(&git),
            status: String::from_utf8_lossy(&told.stderr).trim().to_owned(),
        });
    }
    let text = String::from_utf8_lossy(&told.stdout);
    Ok(text
        .lines()
        .filter_map(|line| line.get(3..))
        .map(str::to_owned)
        .collect())
}

/// Whether cargo has a token: whether it is the right one the registry says.
fn has_token() -> bool {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let home = set("CARGO_HOME").or_else(|| Some(Path::new(&set("HOME")?).join(".cargo").into()));
    let written = home.is_some_and(|home| {
        let file = |name| Path::new(&home).join(name).is_file();
        file("credentials.toml") || file("credentials")
    });
    written || set(TOKEN).is_some()
}

/// What whoever takes the crates from the registry has to know: no obstacle, as the README says the same.
fn patched(order: &[&Package]) -> Option<String> {
    let package = order.iter().find(|package| {
        let mut needs = package.dependencies.iter();
        needs.any(|dependency| dependency.name == UPSTREAM && dependency.kind != Kind::Dev)
    })?;
    Some(format!(
        "{} calls what the {UPSTREAM} of this workspace has and upstream's crate of that name does not, so a program that takes \
         it from the registry needs the `[patch.crates-io]` of the README, and its page on docs.rs will not be built",
        package.name
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packages::tests::sample;

    #[test]
    fn what_is_depended_on_comes_first() {
        let workspace = packages::read().unwrap();
        let order = order(&workspace.packages);
        let names: Vec<_> = order.iter().map(|package| package.name.as_str()).collect();
        for (at, package) in order.iter().enumerate() {
            for dependency in &package.dependencies {
                let place = names.iter().position(|name| *name == dependency.name);
                assert!(
                    place.is_none_or(|place| place < at),
                    "{} after {}",
                    package.name,
                    dependency.name
                );
            }
        }
        let left_out: Vec<_> = workspace
            .packages
            .iter()
            .map(|package| package.name.as_str())
            .filter(|name| !names.contains(name))
            .collect();
        assert_eq!(left_out, ["mlx-sys", "xtask"]);
    }

    #[test]
    fn what_stands_in_the_way_is_said_once() {
        let mut core = sample("mlx-engine-core", &[]);
        core.published = true;
        let mut registry = sample("mlx-engine-registry", &["mlx-engine-core", "dev:mlx-engine-hub"]);
        for dependency in &mut registry.dependencies {
            dependency.unversioned = true;
        }
        let mut hub = sample("mlx-engine-hub", &["mlx-engine-core"]);
        hub.published = true;
        hub.dependencies[0].unversioned = true;
        let found = obstacles(&[&core, &registry, &hub]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("mlx-engine-registry"), "{found:?}");
        assert!(found[1].contains("`mlx-engine-core` has no version"), "{found:?}");
    }

    #[test]
    fn nothing_in_the_manifests_stands_in_the_way() {
        let workspace = packages::read().unwrap();
        let order = order(&workspace.packages);
        assert_eq!(obstacles(&order), Vec::<String>::new());
        let note = patched(&order).unwrap();
        assert!(note.starts_with("mlx-engine-models calls"), "{note}");
    }

    #[test]
    fn files_that_are_not_committed_and_a_missing_token_are_named() {
        assert_eq!(unready(&[], true), Vec::<String>::new());
        let found = unready(&["a.rs".to_owned(), "b.rs".to_owned()], false);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found[0].starts_with("2 files") && found[0].contains("a.rs"),
            "{found:?}"
        );
        assert!(found[1].contains(TOKEN), "{found:?}");
    }

    #[test]
    fn what_is_published_is_built_with_our_mlx_sys() {
        let spelled = spell(&command(false));
        assert!(
            spelled.contains("--config patch.crates-io.mlx-sys.path=\""),
            "{spelled}"
        );
        assert!(
            !spelled.contains("--no-verify") && !spelled.contains("--dry-run"),
            "{spelled}"
        );
        assert!(spell(&command(true)).contains("--dry-run"));
    }
}
