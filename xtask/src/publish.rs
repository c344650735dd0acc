//! `cargo xtask publish`: the crates, each after those that it needs, as a registry takes them.
//!
//! Cargo publishes a workspace in that order itself. What is said here is the order, and what stands in the way.

use std::process::Command;

use crate::error::{Error, Result};
use crate::layers;
use crate::packages::{self, Kind, Package};
use crate::workspace::{cargo, run as go, spell};

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

pub(crate) fn run(args: &Args) -> Result<()> {
    let workspace = packages::read()?;
    let order = order(&workspace.packages);
    for (package, at) in order.iter().zip(1..) {
        println!("publish: {at:>2} {}", package.name);
    }
    let found = obstacles(&order);
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

/// The call of cargo. Packed for a look, crates are not built: they need each other from the registry.
fn command(dry_run: bool) -> Command {
    let mut command = cargo();
    command.args(["publish", "--workspace", "--exclude", UPSTREAM]);
    command.args(["--exclude", env!("CARGO_PKG_NAME")]);
    if dry_run {
        command.args(["--dry-run", "--no-verify", "--allow-dirty"]);
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

/// What stands in the way, each as a line.
fn obstacles(order: &[&Package]) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(package) = order.iter().find(|package| !package.published) {
        found.push(format!(
            "`publish` is false for {}: set it in Cargo.toml",
            package.name
        ));
    }
    for package in order {
        for dependency in &package.dependencies {
            if dependency.name == UPSTREAM && dependency.kind != Kind::Dev {
                found.push(format!(
                    "{} calls what the {UPSTREAM} of this workspace has and upstream's crate of that name does not: a program that \
                     takes it from the registry needs the `[patch.crates-io]` of the README, and cargo's verification fails without",
                    package.name
                ));
            }
            if dependency.unversioned {
                let line = format!(
                    "`{}` has no version beside its path: give it one in Cargo.toml",
                    dependency.name
                );
                if !found.contains(&line) {
                    found.push(line);
                }
            }
        }
    }
    found
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
        let mut registry = sample("mlx-engine-registry", &["mlx-engine-core"]);
        registry.dependencies[0].unversioned = true;
        let found = obstacles(&[&core, &registry, &registry]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("mlx-engine-registry"), "{found:?}");
        assert!(found[1].contains("`mlx-engine-core` has no version"), "{found:?}");
    }

    #[test]
    fn what_needs_our_own_mlx_sys_is_named() {
        let workspace = packages::read().unwrap();
        let found = obstacles(&order(&workspace.packages));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("mlx-engine-models calls"), "{found:?}");
    }
}
