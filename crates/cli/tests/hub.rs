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
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

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

/// A hub behind TLS on `localhost`, with a certificate of an authority that nobody knows; it ends with the process.
/// Returns its address.
fn behind_tls(server: &HubServer, certificate: &Path) -> String {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    fs::write(certificate, made.cert.pem()).unwrap();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    let (config, plain) = (Arc::new(config), server.endpoint().replace("http://", ""));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (config, plain) = (Arc::clone(&config), plain.clone());
            // Who does not trust the certificate goes away.
            std::thread::spawn(move || hand_on(stream, config, &plain));
        }
    });
    format!("https://localhost:{port}")
}

/// Hands one request on, and what is answered back.
fn hand_on(stream: TcpStream, config: Arc<rustls::ServerConfig>, plain: &str) -> std::io::Result<()> {
    let connection = rustls::ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut tls = rustls::StreamOwned::new(connection, stream);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        tls.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let mut plain = TcpStream::connect(plain)?;
    plain.write_all(&head)?;
    std::io::copy(&mut plain, &mut tls)?;
    tls.conn.send_close_notify();
    tls.flush()
}

#[test]
fn a_hub_behind_tls_is_believed_by_its_certificate_alone() {
    let world = World::new();
    let certificate = world.home.path().join("authority.pem");
    let endpoint = behind_tls(&world.server, &certificate);
    let pull = |endpoint: &str, trusted: Option<&Path>, include: &str| {
        let mut command = world.command(&["models", "pull", REPO, "--include", include, "--json"]);
        command
            .env("HF_ENDPOINT", endpoint)
            .env_remove("SSL_CERT_DIR")
            .env_remove("SSL_CERT_FILE");
        if let Some(path) = trusted {
            command.env("SSL_CERT_FILE", path);
        }
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code().unwrap(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    let (code, out, err) = pull(&endpoint, Some(&certificate), "*.json");
    assert_eq!(code, 0, "{err}");
    let snapshot: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(snapshot["fetched_bytes"], 25);
    let token = |seen: &server::Seen| seen.token.as_deref() == Some("hf_secret");
    assert!(
        world.server.seen().iter().all(token),
        "over TLS the hub gets its token"
    );

    // What comes from the hub in secret is not fetched in the open.
    let (code, _, err) = pull(&endpoint, Some(&certificate), "*.safetensors");
    assert!(
        code == 1 && err.contains("is not followed: it leaves https"),
        "{err}"
    );

    // Nobody answers for it, or it answers for another name.
    world.server.forget();
    let other = endpoint.replace("localhost", "127.0.0.1");
    for (endpoint, trusted) in [(&endpoint, None), (&other, Some(&*certificate))] {
        let (code, _, err) = pull(endpoint, trusted, "config.json");
        assert!(code == 1 && err.to_lowercase().contains("certificate"), "{err}");
        assert!(
            err.contains("could not be reached safely")
                && err.contains("hint: ")
                && !err.contains("again in"),
            "{err}"
        );
    }
    assert!(
        world.server.seen().is_empty(),
        "who is not believed is told nothing"
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

#[test]
fn what_the_hub_has_is_shown_before_it_is_fetched() {
    let world = World::new();
    let config = include_str!("../../registry/tests/fixtures/published/Qwen3-8B.json");
    world.server.add(REPO, COMMIT, "config.json", config);
    world.server.add(REPO, COMMIT, "model.Q4_0.gguf", weights(1000));
    let shown = world.json(&["models", "show", REPO, "--json"]);
    assert_eq!(shown["hub"]["commit"], COMMIT);
    assert_eq!(shown["estimate"]["parameters"], 8_190_735_360_u64);
    assert_eq!(shown["files"].as_array().unwrap().len(), 6);
    assert!(shown["path"].is_null());
    assert!(
        !world.home.path().join("hub").exists(),
        "nothing was fetched into the cache"
    );
    let (code, out, err) = world.run(&["models", "show", &format!("{REPO}@main")]);
    assert_eq!(code, 0, "{err}");
    for line in [
        &format!("repository    {REPO} at {COMMIT}"),
        "task          text-generation",
        "here          no; `mlx-engine models pull owner/model@main` fetches it",
        "parameters    8190735360",
        "context       40960 tokens",
        " model.safetensors  400.00 kB",
    ] {
        assert!(out.contains(line), "{line}: {out}");
    }
    let file = world.json(&["models", "show", "hf:owner/model/model.Q4_0.gguf", "--json"]);
    assert_eq!(
        file["files"],
        serde_json::json!([{"path": "model.Q4_0.gguf", "bytes": 1000}])
    );
    let (code, _, err) = world.run(&["models", "show", "hf:owner/model/other.gguf"]);
    assert_eq!(code, 1);
    assert!(
        err.contains("`models show owner/model` lists those that it has"),
        "{err}"
    );

    // A configuration that nobody may read, or that says nothing, costs the estimate and not the page.
    for fault in [
        Fault::Status(403, vec![], r#"{"error": "terms"}"#.to_owned()),
        Fault::Status(404, vec![], String::new()),
    ] {
        world.server.fault("config.json", fault);
        let (code, out, _) = world.run(&["models", "show", REPO]);
        assert!(code == 0 && out.contains("estimate      none: the hub "), "{out}");
    }
    // What is here is shown where the hub cannot be asked.
    let pulled = world.json(&["models", "pull", REPO, "--json"]);
    world.server.forget();
    let output = world
        .command(&["models", "show", REPO, "--json"])
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&shown["path"], &shown["hub"]), (&pulled["path"], &Value::Null));
    assert_eq!(shown["estimate"]["parameters"], 8_190_735_360_u64);
    assert!(world.server.seen().is_empty());
}

#[test]
fn one_file_is_verified_and_removed() {
    let world = World::new();
    let files = ["a.gguf", "b.gguf"].map(|file| format!("hf:owner/model/{file}"));
    for (file, seed) in files.iter().zip([100, 200]) {
        let name = file.rsplit('/').next().unwrap();
        world.server.add(REPO, COMMIT, name, weights(seed));
        world.json(&["models", "pull", file, "--json"]);
    }
    let (code, out, _) = world.run(&["models", "verify", &files[0]]);
    assert_eq!((code, out.as_str()), (0, "owner/model: 1 of 1 files are sound\n"));
    assert_eq!(world.json(&["models", "rm", &files[0], "--json"])["bytes"], 100);
    assert_eq!(world.run(&["models", "verify", &files[0]]).0, 1);
    assert_eq!(
        world.run(&["models", "verify", &files[1]]).0,
        0,
        "the other is there"
    );
}

#[test]
fn orders_belong_to_the_hub_or_to_the_registry() {
    let world = World::new();
    world.json(&["models", "search", "--hub", "--sort", "likes", "--json"]);
    for args in [
        &["models", "search", "--sort", "likes"][..],
        &["models", "search", "--hub", "--sort", "context"],
        &["models", "search", "--hub", "--fits", "4GB"],
        &["models", "search", "--max-size", "4XB"],
    ] {
        assert_eq!(world.run(args).0, 2, "{args:?}");
    }
}

/// A tokenizer of three words.
#[cfg(feature = "mlx")]
const TOKENIZER: &str = r#"{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "?": 2}, "unk_token": "?"},
    "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}"#;

#[cfg(feature = "mlx")]
#[test]
fn what_encodes_is_fetched_without_the_weights() {
    let world = World::new();
    world.server.add(REPO, COMMIT, "tokenizer.json", TOKENIZER);
    world.server.add(REPO, COMMIT, "onnx/large.json", vec![b' '; 100]);
    let tokenize = |offline: &str| {
        let mut child = world
            .command(&["tokenize", "--model", REPO])
            .env("HF_HUB_OFFLINE", offline)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(b"a c b").unwrap();
        let output = child.wait_with_output().unwrap();
        (
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (out, err) = tokenize("1");
    assert!(out.is_empty() && err.contains("unset HF_HUB_OFFLINE"), "{err}");
    assert_eq!(tokenize("0").0, "0 2 1\n");
    for file in ["model.safetensors", "onnx/large.json"] {
        assert!(
            world.server.content_requests(REPO, COMMIT, file).is_empty(),
            "{file}"
        );
    }
    world.server.forget();
    assert_eq!(tokenize("1").0, "0 2 1\n", "what came the first time is enough");
    assert!(world.server.seen().is_empty());
}

#[cfg(feature = "mlx")]
#[test]
fn a_model_that_is_not_here_is_fetched_when_it_is_converted() {
    let world = World::new();
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tests/fixtures/tiny/llama");
    for file in ["config.json", "model.safetensors"] {
        let content = fs::read(PathBuf::from(tiny).join(file)).unwrap();
        world.server.add("owner/tiny", COMMIT, file, content);
    }
    let out = world.home.path().join("out");
    let convert = [
        "convert",
        "--model",
        "owner/tiny@main",
        "--out",
        out.to_str().unwrap(),
        "--json",
    ];
    let (code, told, err) = world.run(&convert);
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("fetching ") && err.contains("in 2 files"), "{err}");
    let report: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(
        (&report["base_model"], &report["exact"]),
        (&"owner/tiny".into(), &true.into())
    );
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(
        card.lines()
            .any(|line| line.starts_with("base_model:") && line.contains("owner/tiny")),
        "{card}"
    );

    // Who else is at the same model is named, and Ctrl-C ends the wait.
    world
        .server
        .add("owner/tiny", COMMIT, "model.safetensors", weights(SIZE));
    fs::remove_dir_all(world.home.path().join("hub")).unwrap();
    world.server.fault("model.safetensors", Fault::Gate(10));
    let mut first = world.command(&["models", "pull", "owner/tiny"]).spawn().unwrap();
    let mut said = BufReader::new(first.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    let folder = world.home.path().join("again");
    let mut second = world
        .command(&[
            "convert",
            "--model",
            "owner/tiny",
            "--out",
            folder.to_str().unwrap(),
        ])
        .spawn()
        .unwrap();
    let mut err = BufReader::new(second.stderr.take().unwrap());
    let waits = format!("waiting for process {}", first.id());
    line.clear();
    while !line.contains(&waits) {
        line.clear();
        assert!(err.read_line(&mut line).unwrap() > 0, "it says on whom it waits");
    }
    let sent = Command::new("kill")
        .args(["-INT", &second.id().to_string()])
        .status()
        .unwrap();
    assert!(sent.success());
    assert_eq!(second.wait().unwrap().code(), Some(130));
    assert!(!folder.exists(), "nothing is left of it");
    first.kill().unwrap();
    first.wait().unwrap();
}

/// A list of the user's own is looked in by every command.
#[test]
fn the_users_own_models_have_names() {
    let world = World::new();
    let list = world.home.path().join("models.toml");
    fs::write(
        &list,
        "[[model]]\nid = \"owner/model\"\nmodel_type = \"chat\"\naliases = [\"mine\"]\n",
    )
    .unwrap();
    let run = |args: &[&str]| {
        let output = world
            .command(args)
            .env("MLX_ENGINE_MODELS", &list)
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code().unwrap(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    let (code, _, err) = run(&["models", "pull", "mine"]);
    assert_eq!(code, 0, "{err}");
    assert_eq!(
        run(&["models", "verify", "mine"]).1,
        "owner/model: 3 of 3 files are sound\n"
    );
    assert!(run(&["models", "show", "mine"]).1.contains("(owner/model)"));
    assert_eq!(run(&["models", "rm", "mine"]).0, 0);
    fs::write(&list, "[[model]]\nid = 7").unwrap();
    let (code, _, err) = run(&["models", "list"]);
    assert!(code == 1 && err.contains("models"), "{err}");
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
