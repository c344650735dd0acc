//! The workspace's packages, as `cargo metadata` tells them.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value;

use crate::error::Result;
use crate::workspace;

/// A package of this workspace.
#[derive(Debug, Clone, Default)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) manifest: PathBuf,
    pub(crate) features: Vec<String>,
    /// Whether a registry may have it.
    pub(crate) published: bool,
    pub(crate) dependencies: Vec<Dependency>,
    pub(crate) targets: Vec<Target>,
}

/// A line of `[dependencies]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) optional: bool,
    /// Whether a path is all that says where it is.
    pub(crate) unversioned: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Normal,
    Build,
    Dev,
}

/// A library, program, test or bench.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) kinds: Vec<String>,
    pub(crate) source: PathBuf,
    pub(crate) required_features: Vec<String>,
}

/// The packages of this workspace and the folder that cargo builds in.
pub(crate) struct Workspace {
    pub(crate) packages: Vec<Package>,
    pub(crate) target: PathBuf,
}

/// Asks cargo.
pub(crate) fn read() -> Result<Workspace> {
    let answer =
        workspace::json(workspace::cargo().args(["metadata", "--format-version", "1", "--no-deps"]))?;
    Ok(Workspace {
        packages: list(&answer["packages"]).iter().map(package).collect(),
        target: path(&answer["target_directory"]),
    })
}

fn package(value: &Value) -> Package {
    Package {
        name: text(&value["name"]),
        manifest: path(&value["manifest_path"]),
        published: value["publish"].is_null(),
        features: value["features"]
            .as_object()
            .into_iter()
            .flat_map(|map| map.keys().cloned())
            .collect(),
        dependencies: list(&value["dependencies"]).iter().map(dependency).collect(),
        targets: list(&value["targets"]).iter().map(target).collect(),
    }
}

fn dependency(value: &Value) -> Dependency {
    Dependency {
        name: text(&value["name"]),
        kind: match value["kind"].as_str() {
            Some("dev") => Kind::Dev,
            Some("build") => Kind::Build,
            _ => Kind::Normal,
        },
        optional: value["optional"] == true,
        unversioned: value["path"].is_string() && value["req"] == "*",
    }
}

fn target(value: &Value) -> Target {
    let texts = |value: &Value| list(value).iter().map(text).collect();
    Target {
        name: text(&value["name"]),
        kinds: texts(&value["kind"]),
        source: path(&value["src_path"]),
        required_features: texts(&value["required-features"]),
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn path(value: &Value) -> PathBuf {
    PathBuf::from(text(value))
}

/// The packages that cannot be built without MLX, whatever their features.
pub(crate) fn bound_to_mlx(packages: &[Package]) -> BTreeSet<&str> {
    let mut bound = BTreeSet::from(["mlx-rs", "mlx-sys"]);
    loop {
        let more: Vec<&str> = packages
            .iter()
            .filter(|package| !bound.contains(package.name.as_str()))
            .filter(|package| {
                package
                    .dependencies
                    .iter()
                    .any(|d| !d.optional && bound.contains(d.name.as_str()))
            })
            .map(|package| package.name.as_str())
            .collect();
        if more.is_empty() {
            break;
        }
        bound.extend(more);
    }
    bound.retain(|name| packages.iter().any(|package| package.name == *name));
    bound
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A package with normal dependencies; `?` before a name makes it optional, `dev:` one of the tests.
    pub(crate) fn sample(name: &str, dependencies: &[&str]) -> Package {
        let dependencies = dependencies
            .iter()
            .map(|text| {
                let (kind, text) = text
                    .strip_prefix("dev:")
                    .map_or((Kind::Normal, *text), |rest| (Kind::Dev, rest));
                let optional = text.starts_with('?');
                Dependency {
                    name: text.trim_start_matches('?').to_owned(),
                    kind,
                    optional,
                    unversioned: false,
                }
            })
            .collect();
        Package {
            name: name.to_owned(),
            dependencies,
            ..Package::default()
        }
    }

    #[test]
    fn what_needs_mlx_is_found_through_others() {
        let packages = [
            sample("mlx-sys", &[]),
            sample("models", &["mlx-rs", "core"]),
            sample("engine", &["core", "?models"]),
            sample("example", &["models"]),
            sample("core", &[]),
        ];
        assert_eq!(
            bound_to_mlx(&packages),
            BTreeSet::from(["example", "mlx-sys", "models"])
        );
    }

    /// The tests of the engine, of the facade and of the command run without MLX too, which a dependency of their tests
    /// on it would end.
    #[test]
    fn two_crates_alone_are_bound_to_mlx() {
        let workspace = read().unwrap();
        assert_eq!(
            bound_to_mlx(&workspace.packages),
            BTreeSet::from(["mlx-engine-models", "mlx-sys"])
        );
    }

    #[test]
    fn this_workspace_can_be_read() {
        let workspace = read().unwrap();
        let xtask = workspace
            .packages
            .iter()
            .find(|package| package.name == "xtask")
            .unwrap();
        assert!(xtask.manifest.is_file());
        assert!(
            xtask
                .dependencies
                .iter()
                .any(|d| d.name == "tempfile" && d.kind == Kind::Dev)
        );
        assert!(
            xtask
                .targets
                .iter()
                .any(|target| target.kinds == ["bin"] && target.source.is_file())
        );
        assert!(workspace.target.is_absolute());
    }
}
