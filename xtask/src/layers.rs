//! Which crate may depend on which.
//!
//! Dependencies of tests alone are free: they ship with nobody.

use crate::packages::{Kind, Package};

/// From the bottom up: a crate may depend on what comes before it. They are published in this order, save that what tests
/// need comes before them.
pub(crate) const ORDER: [&str; 13] = [
    "mlx-engine-core",
    "mlx-engine-registry",
    "mlx-engine-hub",
    "mlx-engine-checkpoint",
    "mlx-engine-text",
    "mlx-sys",
    "mlx-engine-kernels",
    "mlx-engine-models",
    "mlx-engine-engine",
    "mlx-engine-monitor",
    "mlx-engine-resilience",
    "mlx-engine",
    "mlx-engine-cli",
];

/// Crates that stand alone in the workspace.
const ALONE: [&str; 4] = ["mlx-engine-checkpoint", "mlx-engine-text", "mlx-sys", "xtask"];

/// `bench --peers` asks the kernels what the machine gives at most; they know no MLX, so that `xtask` builds without it.
const MEASURING: (&str, &str) = ("xtask", "mlx-engine-kernels");

/// The crate that sees the facade and nothing below it.
const ON_THE_FACADE: &str = "mlx-engine-cli";

const FACADE: &str = "mlx-engine";

/// The doors to MLX, and who may use them.
const MLX: [&str; 2] = ["mlx-rs", "mlx-sys"];
const MAY_USE_MLX: [&str; 2] = ["mlx-engine-models", "mlx-sys"];

/// The edges that should not be there, each as a sentence.
pub(crate) fn forbidden(packages: &[Package]) -> Vec<String> {
    let mut found = Vec::new();
    for package in packages {
        let name = package.name.as_str();
        let place = ORDER.iter().position(|entry| *entry == name);
        if place.is_none() && name != "xtask" {
            found.push(format!(
                "{name} is in no layer: give it a place in xtask/src/layers.rs"
            ));
        }
        for dependency in package
            .dependencies
            .iter()
            .filter(|dependency| dependency.kind != Kind::Dev)
        {
            let to = dependency.name.as_str();
            if MLX.contains(&to) && !MAY_USE_MLX.contains(&name) {
                found.push(format!(
                    "{name} depends on {to}: MLX is reached through mlx-engine-models only"
                ));
                continue;
            }
            if (name, to) == MEASURING || !packages.iter().any(|package| package.name == to) {
                continue;
            }
            let below = ORDER.iter().position(|entry| *entry == to);
            if ALONE.contains(&name) {
                found.push(format!(
                    "{name} depends on {to}: it must depend on no crate of this workspace"
                ));
            } else if name == ON_THE_FACADE && to != FACADE {
                found.push(format!(
                    "{name} depends on {to}: it must see the facade {FACADE} alone"
                ));
            } else if below >= place {
                found.push(format!("{name} depends on {to}: that is a layer above it"));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packages::tests::sample;

    #[track_caller]
    fn check(packages: &[(&str, &[&str])], expected: &[&str]) {
        let packages: Vec<_> = packages.iter().map(|(name, on)| sample(name, on)).collect();
        let found = forbidden(&packages);
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.contains(expected), "{found}");
        }
    }

    #[test]
    fn the_planned_edges_are_allowed() {
        check(
            &[
                ("mlx-engine-core", &["serde"]),
                ("mlx-engine-registry", &["mlx-engine-core"]),
                ("mlx-engine-text", &["minijinja"]),
                ("mlx-sys", &[]),
                ("mlx-engine-kernels", &[]),
                ("mlx-engine-models", &["mlx-sys", "mlx-rs", "mlx-engine-core"]),
                ("mlx-engine-engine", &["?mlx-engine-models", "mlx-engine-text"]),
                ("mlx-engine", &["mlx-engine-engine", "mlx-engine-registry"]),
                ("mlx-engine-cli", &["mlx-engine", "clap"]),
                ("xtask", &["clap", "mlx-engine-kernels"]),
            ],
            &[],
        );
    }

    #[test]
    fn a_layer_above_is_forbidden_even_where_optional() {
        check(
            &[
                ("mlx-engine-core", &["?mlx-engine-registry"]),
                ("mlx-engine-registry", &[]),
            ],
            &["mlx-engine-core depends on mlx-engine-registry: that is a layer above"],
        );
        check(
            &[
                ("mlx-engine-monitor", &["mlx-engine-resilience"]),
                ("mlx-engine-resilience", &[]),
            ],
            &["a layer above"],
        );
    }

    #[test]
    fn mlx_is_reached_from_models_only() {
        check(
            &[
                ("mlx-engine-engine", &["mlx-rs", "mlx-sys"]),
                ("mlx-engine-kernels", &["mlx-sys"]),
                ("mlx-sys", &[]),
            ],
            &[
                "engine depends on mlx-rs",
                "engine depends on mlx-sys",
                "kernels depends on mlx-sys",
            ],
        );
    }

    #[test]
    fn text_and_checkpoint_stand_alone() {
        check(
            &[
                ("mlx-engine-text", &["mlx-engine-core"]),
                ("mlx-engine-checkpoint", &["mlx-engine-core"]),
                ("mlx-engine-core", &[]),
            ],
            &[
                "text depends on mlx-engine-core: it must depend on no",
                "checkpoint depends on mlx-engine-core",
            ],
        );
    }

    #[test]
    fn the_command_sees_the_facade_alone() {
        check(
            &[
                ("mlx-engine-cli", &["mlx-engine", "mlx-engine-core"]),
                ("mlx-engine", &[]),
                ("mlx-engine-core", &[]),
            ],
            &["cli depends on mlx-engine-core: it must see the facade"],
        );
    }

    #[test]
    fn tests_may_use_what_they_like() {
        check(
            &[
                ("mlx-engine-text", &["dev:mlx-engine-checkpoint"]),
                ("mlx-engine-checkpoint", &[]),
            ],
            &[],
        );
    }

    #[test]
    fn a_crate_without_a_layer_is_named() {
        check(
            &[
                ("mlx-engine-extra", &["mlx-engine-core"]),
                ("mlx-engine-core", &[]),
            ],
            &["extra is in no layer", "above"],
        );
    }
}
