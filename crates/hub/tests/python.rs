//! The same cache, the same variables, the same names and the same locks as Python's `huggingface_hub`.
//!
//! Set-up brings the package and tells its place in `MLX_ENGINE_TEST_PYTHONPATH`.
#![cfg(feature = "oracle")]
#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only the tests themselves for tests"
)]

#[expect(dead_code, reason = "its faults are for the other tests")]
mod server;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use mlx_engine_hub::{
    Environment, FetchEvent, FileSelection, Hub, HubCache, HubOptions, HubReference, RepoId, SnapshotRequest,
};
use serde_json::{Value, json};
use server::{COMMIT, HubServer, weights};

const REPO: &str = "owner/model";
const NEWER: &str = "2222222222222222222222222222222222222222";

/// Python with `huggingface_hub`, a home of its own and some variables.
fn python(home: &Path, variables: &[(&str, &str)], task: &Value) -> (Child, impl FnMut() -> Value + use<>) {
    let path = std::env::var_os("MLX_ENGINE_TEST_PYTHONPATH").expect("cargo xtask test sets it");
    let mut child = Command::new("python3")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python.py"))
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("PYTHONPATH", path)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        .env("HF_HUB_DISABLE_TELEMETRY", "1")
        .env("HOME", home)
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is here");
    writeln!(child.stdin.as_mut().unwrap(), "{task}").unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let next = move || serde_json::from_str(&lines.next().expect("Python ends well").unwrap()).unwrap();
    (child, next)
}

/// What Python answers.
fn ask(home: &Path, variables: &[(&str, &str)], task: &Value) -> Value {
    let (mut child, mut answer) = python(home, variables, task);
    let answer = answer();
    assert!(child.wait().unwrap().success());
    answer
}

struct World {
    server: HubServer,
    home: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let server = HubServer::start();
        server.add_model(REPO, COMMIT, 50_000);
        Self {
            server,
            home: tempfile::tempdir().unwrap(),
        }
    }

    fn ask(&self, task: &Value) -> Value {
        let home = self.home.path().to_str().unwrap();
        let variables = [("HF_HOME", home), ("HF_ENDPOINT", &*self.server.endpoint())];
        ask(self.home.path(), &variables, task)
    }

    fn hub(&self) -> Hub {
        let mut environment = Environment::from_lookup(|_| None);
        environment.cache = Some(self.home.path().join("hub"));
        environment.endpoint = self.server.endpoint();
        Hub::with_options(HubOptions::new(environment)).unwrap()
    }

    fn cache(&self) -> HubCache {
        HubCache::new(self.home.path().join("hub"))
    }
}

/// What the cache holds, in the form of Python's scan.
fn scanned(cache: &HubCache) -> Value {
    let mut repos = BTreeMap::new();
    for repo in cache.repositories().unwrap() {
        let revisions: BTreeMap<_, _> = repo
            .revisions
            .iter()
            .map(|revision| {
                let files: BTreeMap<_, _> = revision
                    .files
                    .iter()
                    .map(|file| (file.path.as_str(), &file.blob))
                    .collect();
                let about = json!({"bytes": revision.bytes, "refs": revision.refs, "files": files});
                (&revision.commit, about)
            })
            .collect();
        repos.insert(
            repo.repo.to_string(),
            json!({"bytes": repo.bytes, "revisions": revisions}),
        );
    }
    json!({"repos": repos, "warnings": []})
}

#[tokio::test]
async fn what_python_fetched_is_found_here() {
    let world = World::new();
    let request = SnapshotRequest::new(REPO.parse().unwrap());
    let folder = world.ask(&json!({"do": "fetch", "repo": REPO, "allow_patterns": ["*.json"]}));
    assert!(
        world.cache().find(&request.reference).is_err(),
        "without weights it is no model"
    );
    assert_eq!(world.ask(&json!({"do": "fetch", "repo": REPO})), folder);
    let found = world.cache().find(&request.reference).unwrap();
    assert_eq!(found.to_str(), folder.as_str());
    assert_eq!(
        fs::read(found.join("model.safetensors")).unwrap(),
        weights(50_000)
    );
    let snapshot = world.hub().fetch(&request, &|_| {}).await.unwrap();
    assert_eq!((snapshot.path, snapshot.fetched_bytes), (found, 0));
    assert!(
        world
            .hub()
            .repair(&request.reference, &|_| {})
            .await
            .unwrap()
            .found
            .is_sound()
    );
    assert_eq!(scanned(&world.cache()), world.ask(&json!({"do": "scan"})));
}

#[tokio::test]
async fn what_was_fetched_here_is_found_by_python() {
    let world = World::new();
    let hub = world.hub();
    let request = SnapshotRequest::new(REPO.parse().unwrap());
    let snapshot = hub.fetch(&request, &|_| {}).await.unwrap();
    let here = snapshot.path.to_str().unwrap();
    world.server.forget();
    assert_eq!(
        world.ask(&json!({"do": "fetch", "repo": REPO, "local_files_only": true})),
        here
    );
    assert_eq!(
        world.ask(&json!({"do": "fetch", "repo": REPO, "revision": COMMIT, "local_files_only": true})),
        here
    );
    assert!(world.server.seen().is_empty(), "nobody was asked");
    // With the network, it fetches what we did not want and nothing else.
    assert_eq!(world.ask(&json!({"do": "fetch", "repo": REPO})), here);
    assert!(
        world
            .server
            .content_requests(REPO, COMMIT, "model.safetensors")
            .is_empty()
    );
    assert_eq!(world.server.content_requests(REPO, COMMIT, "README.md").len(), 1);

    // A second revision, a file in a folder, another repository, and one that was begun.
    world.server.add_model(REPO, NEWER, 60_000);
    world.server.add(REPO, NEWER, "deep/er/notes.txt", "notes");
    world.server.add_model("gpt/two", COMMIT, 100);
    let everything = request.clone().with_files(FileSelection::All);
    hub.fetch(&everything, &|_| {}).await.unwrap();
    let other: HubReference = "gpt/two".parse().unwrap();
    hub.fetch(&SnapshotRequest::new(other), &|_| {}).await.unwrap();
    let found = world.ask(&json!({"do": "scan"}));
    assert_eq!(scanned(&world.cache()), found);
    assert_eq!(found["repos"][REPO]["revisions"][NEWER]["refs"], json!(["main"]));

    // What is left after a removal is still a cache to Python.
    let old: HubReference = format!("{REPO}@{COMMIT}").parse().unwrap();
    world.cache().remove(&old, false).unwrap();
    let found = world.ask(&json!({"do": "scan"}));
    assert_eq!(scanned(&world.cache()), found);
    assert_eq!(found["repos"][REPO]["revisions"].as_object().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_of_python_is_waited_for() {
    let world = World::new();
    let hash = world.server.hash(REPO, COMMIT, "model.safetensors");
    let lock = world
        .home
        .path()
        .join(format!("hub/.locks/models--owner--model/{hash}.lock"));
    let (mut child, mut answer) = python(world.home.path(), &[], &json!({"do": "lock", "path": lock}));
    assert_eq!(answer(), "locked");
    let error = {
        fs::create_dir_all(world.home.path().join("hub/models--owner--model")).unwrap();
        world
            .cache()
            .remove(&REPO.parse().unwrap(), true)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(error, "`owner/model` is being used by another program");
    let release = Mutex::new(child.stdin.take());
    let waited = Mutex::new(None);
    let request = SnapshotRequest::new(REPO.parse().unwrap());
    let hub = world.hub();
    let tell = |event| {
        if let FetchEvent::Waiting { file, holder } = event {
            *waited.lock().unwrap() = Some((file, holder));
            // Python ends at the end of its input.
            drop(release.lock().unwrap().take());
        }
    };
    let snapshot = hub.fetch(&request, &tell).await.unwrap();
    assert_eq!(
        fs::read(snapshot.path.join("model.safetensors")).unwrap(),
        weights(50_000)
    );
    let waited = waited.lock().unwrap().clone();
    assert_eq!(
        waited,
        Some(("model.safetensors".to_owned(), "another program".to_owned()))
    );
    assert_eq!(answer(), "released");
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_variables_mean_the_same() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().to_str().unwrap();
    fs::create_dir_all(home.path().join(".cache/huggingface")).unwrap();
    fs::write(home.path().join(".cache/huggingface/token"), "hf_file\n").unwrap();
    fs::write(home.path().join("elsewhere"), " hf_other ").unwrap();
    let other = home.path().join("elsewhere");
    for variables in [
        vec![],
        vec![("XDG_CACHE_HOME", "/x")],
        vec![("HF_HOME", "/f"), ("HF_TOKEN", " hf_x\n")],
        vec![("HF_HOME", "~/f"), ("HF_TOKEN_PATH", other.to_str().unwrap())],
        vec![
            ("HF_HUB_CACHE", "/c"),
            ("HUGGINGFACE_HUB_CACHE", "/o"),
            ("HF_HUB_OFFLINE", "yes"),
        ],
        vec![
            ("HUGGINGFACE_HUB_CACHE", "/o"),
            ("TRANSFORMERS_OFFLINE", "1"),
            ("HUGGING_FACE_HUB_TOKEN", "hf_old"),
        ],
        vec![("HF_ENDPOINT", "http://mirror:8080/"), ("HF_HUB_OFFLINE", "0")],
    ] {
        let found = ask(home.path(), &variables, &json!({"do": "environment"}));
        let all: Vec<_> = [("HOME", folder)].into_iter().chain(variables.clone()).collect();
        let here = Environment::from_lookup(|name| {
            let set = all.iter().find(|(variable, _)| *variable == name)?;
            Some(set.1.into())
        });
        assert_eq!(
            found["cache"].as_str(),
            here.cache.as_ref().unwrap().to_str(),
            "{variables:?}"
        );
        assert_eq!(found["endpoint"], here.endpoint, "{variables:?}");
        assert_eq!(found["offline"], here.offline, "{variables:?}");
        let token = found["token"].as_str();
        assert_eq!(token.is_some(), here.token.is_some(), "{variables:?}");
    }
}

#[test]
fn ids_that_python_takes_are_taken() {
    let names = [
        "gpt2",
        "a/b",
        "a/b/c",
        "",
        "a/",
        "/b",
        "a/.b",
        "a/b.",
        "a/-b",
        "a--b/c",
        "a/b..c",
        "a/b--c",
        "A_1/x.y-z",
        "a b/c",
        "a/b\n",
        "datasets/a/b",
        "a/é",
        "..",
        "a/..",
        "a\\b",
        &"x".repeat(96),
        &"x".repeat(97),
    ];
    let home = tempfile::tempdir().unwrap();
    let valid = ask(home.path(), &[], &json!({"do": "valid", "names": names}));
    for (name, valid) in names.iter().zip(valid.as_array().unwrap()) {
        assert_eq!(valid, name.parse::<RepoId>().is_ok(), "{name:?}");
    }
}

#[tokio::test]
async fn patterns_choose_what_python_chooses() {
    let files = [
        "a.json",
        "b.txt",
        "deep/a.json",
        "deep/er/model.safetensors",
        "model.safetensors",
        "x{1}.md",
        "x1.md",
        "[z].md",
    ];
    let patterns: [(&[&str], &[&str]); 9] = [
        (&["*.json"], &[]),
        (&["model*"], &[]),
        (&["deep/"], &[]),
        (&["deep/*"], &["*.json"]),
        (&["?.json", "x{1}.md"], &[]),
        (&["[ab].*"], &[]),
        (&["[!a]*"], &["deep/**"]),
        (&[], &["*.md", "*.json"]),
        (&["[[]z].md"], &[]),
    ];
    let world = World::new();
    let hub = world.hub();
    for file in files {
        world.server.add("owner/files", COMMIT, file, file);
    }
    let chosen = world.ask(&json!({"do": "filter", "files": files, "patterns": patterns}));
    for ((allow, ignore), chosen) in patterns.into_iter().zip(chosen.as_array().unwrap()) {
        let owned = |patterns: &[&str]| patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        let selection = FileSelection::Patterns {
            allow: owned(allow),
            ignore: owned(ignore),
        };
        let request = SnapshotRequest::new("owner/files".parse().unwrap()).with_files(selection);
        let snapshot = hub.fetch(&request, &|_| {}).await.unwrap();
        let mut expected: Vec<&str> = chosen
            .as_array()
            .unwrap()
            .iter()
            .map(|file| file.as_str().unwrap())
            .collect();
        expected.sort_unstable();
        let found: Vec<&str> = snapshot
            .files
            .iter()
            .map(mlx_engine_hub::RepoPath::as_str)
            .collect();
        assert_eq!(found, expected, "{allow:?} {ignore:?}");
    }
}
