//! `cargo xtask publish`: the crates in the order in which a registry can take them, which is that of the layers.

use crate::error::{Error, Result};
use crate::layers;
use crate::packages::{self, Package};
use crate::workspace::{cargo, run as go};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Publish them, one after the other, in place of listing them
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
    if !found.is_empty() && !args.execute {
        println!("publish: not yet, {}", found.join("; "));
    }
    if !args.execute {
        return Ok(());
    }
    if !found.is_empty() {
        return Err(Error::Refused(format!(
            "the crates cannot be published\n  {}",
            found.join("\n  ")
        )));
    }
    for package in order {
        go(cargo().args(["publish", "--package", &package.name]))?;
    }
    Ok(())
}

/// The packages that are published, each after those that it depends on.
fn order(packages: &[Package]) -> Vec<&Package> {
    let named = |name: &str| packages.iter().find(|package| package.name == name);
    layers::ORDER
        .iter()
        .filter(|name| **name != UPSTREAM)
        .filter_map(|name| named(name))
        .collect()
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
        let dependencies = package.dependencies.iter();
        for dependency in
            dependencies.filter(|dependency| dependency.unversioned && dependency.kind != packages::Kind::Dev)
        {
            let line = format!(
                "`{}` has no version beside its path: give it one in Cargo.toml",
                dependency.name
            );
            if !found.contains(&line) {
                found.push(line);
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
            for dependency in package
                .dependencies
                .iter()
                .filter(|on| on.kind != packages::Kind::Dev)
            {
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
}
