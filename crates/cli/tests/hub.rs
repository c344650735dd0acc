//! Models of the hub from outside: fetching, interrupting, killing, and looking after what came.
#![cfg(all(feature = "hub", unix))]
#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only the tests themselves for tests"
)]

#[expect(dead_code, reason = "most of its faults are for the tests of the hub's crate")]
#[path = "../../hub/tests/server/mod.rs"]
mod server;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use server::{COMMIT, Fault, HubServer, weights};

const REPO: &str = "owner/model";
const SIZE: usize = 400_000;

/// A hub and an empty cache.
struct World {
    server: HubServer,
    home: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let server = HubServer::start();
        server.add_model(REPO, COMMIT, SIZE);
        Self {
            server,
            home: tempfile::tempdir().unwrap(),
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mlx-engine"));
        command
            .args(args)
            .env("HF_HOME", self.home.path())
            .env("HF_ENDPOINT", self.server.endpoint())
            .env("HF_TOKEN", "hf_secret")
            .env_remove("HF_HUB_CACHE")
            .env_remove("HF_HUB_OFFLINE")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs the command and returns its exit code, stdout and stderr.
    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let output = self.command(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code().unwrap(),
            text(output.stdout),
            text(output.stderr),
        )
    }

    fn json(&self, args: &[&str]) -> Value {
        let (code, out, err) = self.run(args);
        assert_eq!(code, 0, "{err}");
        serde_json::from_str(&out).unwrap()
    }

    fn blob(&self) -> PathBuf {
        let hash = self.server.hash(REPO, COMMIT, "model.safetensors");
        self.home.path().join("hub/models--owner--model/blobs").join(hash)
    }

    /// Starts to pull, and returns when half of the weights are on the disk.
    fn half(&self) -> Child {
        self.server.fault("model.safetensors", Fault::Gate(SIZE / 2));
        let mut child = self.command(&["models", "pull", REPO]).spawn().unwrap();
        let half = self.blob().with_extension("incomplete");
        while fs::metadata(&half).map_or(0, |meta| meta.len()) < SIZE as u64 / 2 {
            assert_eq!(child.try_wait().unwrap(), None, "it waits at the gate");
            std::thread::yield_now();
        }
        child
    }

    /// Nothing has its name yet, and the next pull goes on where the last one was.
    fn check_that_it_goes_on(&self) {
        assert!(!self.blob().exists());
        self.server.open_gate();
        self.server.forget();
        let (code, out, err) = self.run(&["models", "pull", REPO]);
        assert_eq!(code, 0, "{err}");
        assert_eq!(
            fs::read(PathBuf::from(out.trim()).join("model.safetensors")).unwrap(),
            weights(SIZE)
        );
        let from: Vec<_> = self
            .server
            .content_requests(REPO, COMMIT, "model.safetensors")
            .iter()
            .map(|seen| seen.from)
            .collect();
        assert_eq!(from, [Some(SIZE / 2)], "what had come did not come again");
    }
}

#[test]
fn a_model_is_pulled_listed_and_removed() {
    let world = World::new();
    let (code, out, err) = world.run(&["models", "pull", REPO]);
    assert_eq!(code, 0, "{err}");
    assert!(
        err.contains("fetching 400.02 kB of 400.02 kB in 3 files"),
        "{err}"
    );
    let folder = PathBuf::from(out.trim());
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights(SIZE));
    let again = world.json(&["models", "pull", &format!("{REPO}@main"), "--json"]);
    assert_eq!(
        (&again["fetched_bytes"], &again["commit"]),
        (&0.into(), &COMMIT.into())
    );

    let list = world.json(&["models", "list", "--cached", "--json"]);
    assert_eq!(list[0]["revisions"][0]["refs"], serde_json::json!(["main"]));
    let (_, out, _) = world.run(&["models", "list", "--cached"]);
    assert!(out.lines().nth(1).unwrap().starts_with(" owner/model"), "{out}");
    let usage = world.json(&["models", "du", "--json"]);
    assert_eq!(usage["bytes"], SIZE + 25);
    let (_, out, _) = world.run(&["models", "du"]);
    assert!(out.contains("400.02 kB") && out.contains("total"), "{out}");
    assert_eq!(
        world.json(&["models", "prune", "--json"])["freed"],
        serde_json::json!([])
    );

    let (code, out, _) = world.run(&["models", "rm", REPO]);
    assert_eq!(
        (code, out.as_str()),
        (0, "owner/model: removed, 400.02 kB are free again\n")
    );
    let (code, _, err) = world.run(&["models", "rm", REPO]);
    assert_eq!(code, 1);
    assert!(
        err.contains("`owner/model` is not in the cache at") && err.contains("hint: fetch it first"),
        "{err}"
    );
    let (_, out, err) = world.run(&["models", "list", "--cached"]);
    assert_eq!((out.as_str(), err.as_str()), ("", "no model is in the cache\n"));
}

#[test]
fn damage_is_found_and_repaired() {
    let world = World::new();
    world.json(&["models", "pull", REPO, "--json"]);
    let (code, out, _) = world.run(&["models", "verify", REPO]);
    assert_eq!((code, out.as_str()), (0, "owner/model: 3 of 3 files are sound\n"));
    let mut damaged = weights(SIZE);
    damaged[SIZE / 2] ^= 4;
    fs::write(world.blob(), damaged).unwrap();
    let (code, out, err) = world.run(&["models", "verify", REPO]);
    assert_eq!(code, 1);
    assert!(out.contains("model.safetensors: damaged, its hash is "), "{out}");
    assert!(err.contains("verify --repair owner/model"), "{err}");
    world.server.forget();
    let repaired = world.json(&["models", "verify", REPO, "--repair", "--json"]);
    assert_eq!(repaired["fetched_bytes"], SIZE);
    assert_eq!(fs::read(world.blob()).unwrap(), weights(SIZE));
    assert_eq!(world.run(&["models", "verify", REPO]).0, 0);
}

#[test]
fn a_pull_that_is_killed_goes_on() {
    let world = World::new();
    let mut child = world.half();
    // SIGKILL: nothing of it runs any more.
    child.kill().unwrap();
    child.wait().unwrap();
    world.check_that_it_goes_on();
}

#[test]
fn a_pull_that_is_interrupted_says_so_and_goes_on() {
    let world = World::new();
    let child = world.half();
    let sent = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(sent.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(
        err.contains("interrupted; the same command again goes on from here"),
        "{err}"
    );
    assert!(output.stdout.is_empty());
    world.check_that_it_goes_on();
}

#[test]
fn two_processes_fetch_it_once() {
    let world = World::new();
    let first = world.half();
    let mut second = world.command(&["models", "pull", REPO]).spawn().unwrap();
    let mut err = BufReader::new(second.stderr.take().unwrap());
    let waits = format!(
        "waiting for process {}, which is at model.safetensors",
        first.id()
    );
    let mut line = String::new();
    while !line.contains(&waits) {
        line.clear();
        assert!(err.read_line(&mut line).unwrap() > 0, "it says on whom it waits");
    }
    // Nobody may remove what is being fetched.
    let (code, _, refused) = world.run(&["models", "rm", REPO]);
    assert_eq!(code, 1);
    assert!(
        refused.contains("`owner/model` is being used by process"),
        "{refused}"
    );
    world.server.open_gate();
    let first = first.wait_with_output().unwrap();
    let mut rest = String::new();
    err.read_to_string(&mut rest).unwrap();
    let second = second.wait_with_output().unwrap();
    assert!(first.status.success() && second.status.success(), "{rest}");
    assert_eq!(first.stdout, second.stdout);
    assert_eq!(
        world
            .server
            .content_requests(REPO, COMMIT, "model.safetensors")
            .len(),
        1
    );
    assert_eq!(fs::read(world.blob()).unwrap(), weights(SIZE));
}

#[test]
fn a_refusal_says_what_to_do_and_shows_no_token() {
    let world = World::new();
    let body = r#"{"error": "Access to this model is restricted"}"#;
    world
        .server
        .fault("info", Fault::Status(403, vec![], body.to_owned()));
    let (code, out, err) = world.run(&["models", "pull", REPO]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(
        err.contains("error: the hub does not give `owner/model` (status 403): Access to this"),
        "{err}"
    );
    assert!(err.contains("hint: accept the model's terms"), "{err}");
    assert!(!err.contains("hf_secret"));
    let (code, _, err) = world.run(&["models", "pull", "./no/such"]);
    assert_eq!(code, 1);
    assert!(err.contains("there is no such file or folder"), "{err}");
    let here = world.home.path().to_str().unwrap();
    assert_eq!(world.run(&["models", "pull", here]).0, 2, "a path is not pulled");
    assert_eq!(
        world
            .run(&["models", "pull", "hf:owner/model/x.gguf", "--include", "*"])
            .0,
        2
    );
}

#[test]
fn the_hub_is_searched() {
    let world = World::new();
    world.server.add("owner/other", COMMIT, "config.json", "{}");
    let found = world.json(&["models", "search", "--hub", "other", "--json"]);
    assert_eq!(
        (found[0]["id"].as_str(), found.as_array().unwrap().len()),
        (Some("owner/other"), 1)
    );
    let (_, out, _) = world.run(&["models", "search", "--hub", "--author", "owner", "--tag", "mlx"]);
    assert!(
        out.contains("owner/model") && out.contains("owner/other") && out.contains("DOWNLOADS"),
        "{out}"
    );
    let (code, _, err) = world.run(&["models", "search", "--hub", "nothing"]);
    assert_eq!(
        (code, err.as_str()),
        (1, "error: no model of the hub is like that\n")
    );
}

#[test]
fn offline_nobody_is_asked() {
    let world = World::new();
    let offline = |args: &[&str]| {
        let output = world.command(args).env("HF_HUB_OFFLINE", "1").output().unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, err) = offline(&["models", "pull", REPO]);
    assert_eq!(code, 1);
    assert!(err.contains("hint: unset HF_HUB_OFFLINE"), "{err}");
    world.json(&["models", "pull", REPO, "--json"]);
    world.server.forget();
    assert_eq!(offline(&["models", "pull", REPO]).0, 0);
    assert!(world.server.seen().is_empty());
}

/// The real model, from the hub to the first tokens.
#[cfg(feature = "mlx")]
#[test]
fn a_model_that_is_not_here_is_fetched_when_it_is_loaded() {
    let world = World::new();
    let path = std::env::var_os("MLX_ENGINE_TEST_MODEL").unwrap();
    world
        .server
        .add("owner/smol", COMMIT, "smol.gguf", fs::read(path).unwrap());
    let prompt = "What is the capital of France?";
    let generate = [
        "generate",
        "--model",
        "hf:owner/smol/smol.gguf",
        "--prompt",
        prompt,
        "--temperature",
        "0",
        "--max-tokens",
        "8",
        "--exact",
        "--json",
    ];
    let answer = world.json(&generate);
    assert!(answer["text"].as_str().unwrap().contains("Paris"), "{answer}");
    assert_eq!(answer["backend"], "mlx");
    world.server.forget();
    assert_eq!(world.json(&generate)["text"], answer["text"]);
    assert!(world.server.seen().is_empty(), "the second time it is here");
    let (code, _, err) = world.run(&["generate", "--model", "owner/nothing", "--prompt", "x"]);
    assert_eq!(code, 1);
    assert!(
        err.contains("model `owner/nothing` not found") && err.contains("the hub has no `owner/nothing`"),
        "{err}"
    );
}
