//! Fetching, from a hub that answers well and badly.
#![cfg(feature = "fetch")]
#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only the tests themselves for tests"
)]

mod server;

use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt};
use mlx_engine_hub::{
    Environment, FetchEvent, FileSelection, Hub, HubError, HubOptions, HubQuery, HubReference, HubSort,
    HubSystem, Snapshot, SnapshotRequest, Token,
};
use proptest::prelude::*;
use server::{COMMIT, Fault, HubServer, weights};
use tokio::sync::Notify;

/// How long a server may be silent; the system below knows the wait by it.
const IDLE: Duration = Duration::from_secs(12_345);
const REPO: &str = "owner/model";
const SIZE: usize = 100_000;

/// A machine whose waits are over at once and written down, but for the one for a silent server.
#[derive(Debug)]
struct TestSystem {
    origin: Instant,
    slept: Mutex<Vec<Duration>>,
    silence_is_over: Arc<Notify>,
    room: AtomicU64,
}

impl HubSystem for TestSystem {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn time_of_day(&self) -> SystemTime {
        // Sun, 06 Nov 1994 08:49:37 GMT
        SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777)
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        if time == IDLE {
            let notify = Arc::clone(&self.silence_is_over);
            return Box::pin(async move { notify.notified().await });
        }
        self.slept.lock().unwrap().push(time);
        Box::pin(tokio::task::yield_now())
    }

    fn seed(&self) -> u64 {
        7
    }

    fn available_space(&self, _folder: &Path) -> io::Result<u64> {
        Ok(self.room.load(Ordering::Relaxed))
    }
}

/// A hub, its server and an empty cache.
struct World {
    server: HubServer,
    home: tempfile::TempDir,
    system: Arc<TestSystem>,
    events: Mutex<Vec<FetchEvent>>,
}

impl World {
    fn new() -> Self {
        let world = Self::empty();
        world.server.add_model(REPO, COMMIT, SIZE);
        world
    }

    fn empty() -> Self {
        Self {
            server: HubServer::start(),
            home: tempfile::tempdir().unwrap(),
            system: Arc::new(TestSystem {
                origin: Instant::now(),
                slept: Mutex::default(),
                silence_is_over: Arc::default(),
                room: AtomicU64::new(u64::MAX),
            }),
            events: Mutex::default(),
        }
    }

    fn options(&self) -> HubOptions {
        let mut environment = Environment::from_lookup(|_| None);
        environment.cache = Some(self.home.path().join("hub"));
        environment.endpoint = self.server.endpoint();
        environment.token = Token::new("hf_secret");
        let mut options = HubOptions::new(environment);
        options.idle_timeout = IDLE;
        options.system = Arc::clone(&self.system) as Arc<dyn HubSystem>;
        options
    }

    fn hub(&self) -> Hub {
        Hub::with_options(self.options()).unwrap()
    }

    async fn fetch(&self) -> Result<Snapshot, HubError> {
        self.fetch_with(&self.hub(), REPO).await
    }

    async fn fetch_with(&self, hub: &Hub, reference: &str) -> Result<Snapshot, HubError> {
        let request = SnapshotRequest::new(reference.parse().unwrap());
        hub.fetch(&request, &|event| self.events.lock().unwrap().push(event))
            .await
    }

    fn requests(&self, path: &str) -> Vec<Option<usize>> {
        let seen = self.server.content_requests(REPO, COMMIT, path);
        seen.into_iter().map(|seen| seen.from).collect()
    }

    fn blobs(&self) -> std::path::PathBuf {
        self.home.path().join("hub/models--owner--model/blobs")
    }

    fn weights_blob(&self) -> std::path::PathBuf {
        self.blobs()
            .join(self.server.hash(REPO, COMMIT, "model.safetensors"))
    }

    fn half_made(&self) -> std::path::PathBuf {
        let mut path = self.weights_blob().into_os_string();
        path.push(".incomplete");
        path.into()
    }

    /// The weights are right and whole, and nothing is left of their making.
    #[track_caller]
    fn check(&self, snapshot: &Snapshot) {
        assert_eq!(
            fs::read(snapshot.path.join("model.safetensors")).unwrap(),
            weights(SIZE)
        );
        assert_eq!(fs::read(self.weights_blob()).unwrap(), weights(SIZE));
        assert!(!self.half_made().exists());
    }

    /// No file has a name that it does not deserve: whatever blob is there is right.
    #[track_caller]
    fn check_nothing_wrong(&self) {
        assert!(!self.weights_blob().exists());
        let snapshot = self.home.path().join(format!(
            "hub/models--owner--model/snapshots/{COMMIT}/model.safetensors"
        ));
        assert!(!snapshot.exists());
        assert!(self.hub().cache().find(&REPO.parse().unwrap()).is_err());
    }

    fn retries(&self) -> usize {
        let events = self.events.lock().unwrap();
        events
            .iter()
            .filter(|event| matches!(event, FetchEvent::Retrying { .. }))
            .count()
    }
}

#[track_caller]
fn says(error: &HubError, message: &str, hint: &str) {
    let text = error.to_string();
    assert!(text.contains(message), "{text}");
    let found = error.hint().unwrap_or_default();
    assert!(found.contains(hint), "{found}");
}

#[tokio::test]
async fn a_model_comes_whole_and_only_once() {
    let world = World::new();
    let snapshot = world.fetch().await.unwrap();
    world.check(&snapshot);
    let files: Vec<_> = snapshot
        .files
        .iter()
        .map(mlx_engine_hub::RepoPath::as_str)
        .collect();
    assert_eq!(files, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(snapshot.commit.as_deref(), Some(COMMIT));
    assert_eq!(snapshot.fetched_bytes, snapshot.bytes);
    let root = world.home.path().join("hub/models--owner--model");
    assert_eq!(fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(snapshot.path, root.join("snapshots").join(COMMIT));
    assert_eq!(
        world.hub().cache().find(&REPO.parse().unwrap()).unwrap(),
        snapshot.path
    );

    world.server.forget();
    let again = world.fetch().await.unwrap();
    assert_eq!((again.path, again.fetched_bytes), (snapshot.path, 0));
    assert_eq!(world.server.seen().len(), 1, "the list of files alone");
}

#[tokio::test]
async fn progress_is_told_in_bytes_and_ends_at_the_end() {
    let world = World::new();
    let snapshot = world.fetch().await.unwrap();
    let events = world.events.lock().unwrap();
    assert!(
        matches!(&events[0], FetchEvent::Planned { files: 3, bytes, present: 0 } if *bytes == snapshot.bytes)
    );
    let steps: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            FetchEvent::Progress(progress) => Some(progress),
            _ => None,
        })
        .collect();
    assert!(steps.windows(2).all(|pair| pair[0].done <= pair[1].done));
    assert_eq!(steps.last().unwrap().done, snapshot.bytes);
    assert!(
        steps
            .iter()
            .any(|step| step.file.as_str() == "model.safetensors" && step.file_done == SIZE as u64)
    );
    let fetched = events
        .iter()
        .filter(|event| matches!(event, FetchEvent::Fetched { .. }))
        .count();
    assert_eq!(fetched, 3);
}

#[tokio::test]
async fn the_token_stays_with_the_hub() {
    let world = World::new();
    world.fetch().await.unwrap();
    let seen = world.server.seen();
    let (elsewhere, hub): (Vec<_>, Vec<_>) = seen.iter().partition(|seen| seen.host.starts_with("localhost"));
    assert!(
        hub.iter().all(|seen| seen.token.as_deref() == Some("hf_secret")),
        "{hub:?}"
    );
    assert_eq!(elsewhere.len(), 1, "the weights are somewhere else");
    assert_eq!(elsewhere[0].token, None);
    assert!(!format!("{:?}", world.hub()).contains("hf_secret"));
}

#[tokio::test]
async fn a_refusal_is_an_error_and_never_a_file() {
    let world = World::new();
    let denied = || Fault::Status(403, vec![], r#"{"error": "accept the terms first"}"#.to_owned());
    world.server.fault("model.safetensors", denied());
    let error = world.fetch().await.unwrap_err();
    says(
        &error,
        "`model.safetensors` (status 403): accept the terms first",
        "accept the model's terms",
    );
    world.check_nothing_wrong();

    world.server.fault("info", denied());
    says(
        &world.fetch().await.unwrap_err(),
        "`owner/model` (status 403)",
        "accept the model's terms",
    );
    let mut options = world.options();
    options.environment.token = None;
    world
        .server
        .fault("info", Fault::Status(401, vec![], "<html>".to_owned()));
    let hub = Hub::with_options(options).unwrap();
    let error = world.fetch_with(&hub, REPO).await.unwrap_err();
    says(&error, "(status 401)", "set HF_TOKEN");
    assert!(!error.to_string().contains("html"));

    // The next try is as good as a first one.
    world.check(&world.fetch().await.unwrap());
}

#[tokio::test]
async fn what_is_not_there_is_named() {
    let world = World::new();
    let hub = world.hub();
    let not_found = async |reference: &str| world.fetch_with(&hub, reference).await.unwrap_err();
    says(
        &not_found("owner/other").await,
        "the hub has no `owner/other`: not found",
        "spelling",
    );
    says(&not_found("owner/model@v9").await, "`owner/model@v9`", "spelling");
    says(
        &not_found("hf:owner/model/x.gguf").await,
        "`owner/model/x.gguf`: the repository has no",
        "spelling",
    );
    let code = vec![
        ("X-Error-Code", "RepoNotFound".to_owned()),
        ("X-Error-Message", "no such repo".to_owned()),
    ];
    world
        .server
        .fault("info", Fault::Status(401, code, String::new()));
    says(&not_found(REPO).await, "`owner/model`: no such repo", "spelling");
    world
        .server
        .fault("model.safetensors", Fault::Status(404, vec![], String::new()));
    says(
        &world.fetch().await.unwrap_err(),
        "the hub has no `model.safetensors`",
        "",
    );
    world.check_nothing_wrong();
}

#[tokio::test]
async fn a_server_that_wants_a_pause_gets_it() {
    let world = World::new();
    let limited = |after: &str| Fault::Status(429, vec![("Retry-After", after.to_owned())], String::new());
    world.server.fault("info", limited("3"));
    world
        .server
        .fault("model.safetensors", limited("Sun, 06 Nov 1994 08:50:37 GMT"));
    world
        .server
        .fault("model.safetensors", Fault::Status(503, vec![], String::new()));
    world.check(&world.fetch().await.unwrap());
    let slept = world.system.slept.lock().unwrap().clone();
    assert_eq!(slept[..2], [Duration::from_secs(3), Duration::from_mins(1)]);
    assert_eq!(slept.len(), 3, "{slept:?}");
}

#[tokio::test]
async fn a_server_that_wants_to_be_left_alone_for_long_is_told_of() {
    let world = World::new();
    world.server.fault(
        "info",
        Fault::Status(429, vec![("Retry-After", "3600".to_owned())], String::new()),
    );
    let error = world.fetch().await.unwrap_err();
    says(&error, "takes no more requests", "try again in 3600 s");
    assert_eq!(error.retry_after(), Some(Duration::from_hours(1)));
    for _ in 0..6 {
        world
            .server
            .fault("info", Fault::Status(500, vec![], "oops".to_owned()));
    }
    let error = world.fetch().await.unwrap_err();
    says(&error, "answered with status 500: oops", "try again later");
    assert_eq!(world.system.slept.lock().unwrap().len(), 5, "as often as was set");
}

#[tokio::test]
async fn a_short_body_is_taken_up_where_it_ended() {
    let world = World::new();
    world.server.fault("model.safetensors", Fault::Short(40_000));
    world.server.fault("model.safetensors", Fault::Cut(1));
    let snapshot = world.fetch().await.unwrap();
    world.check(&snapshot);
    let requests = world.requests("model.safetensors");
    assert_eq!(requests[..2], [None, Some(40_000)]);
    assert!(
        requests[2] == Some(40_001) || requests[2] == Some(40_000),
        "{requests:?}"
    );
    assert_eq!(world.retries(), 2);
}

#[tokio::test]
async fn wrong_bytes_get_no_name() {
    let world = World::new();
    world.server.fault("model.safetensors", Fault::WrongBytes);
    let error = world.fetch().await.unwrap_err();
    let hash = world.server.hash(REPO, COMMIT, "model.safetensors");
    says(
        &error,
        &format!("`model.safetensors` has the wrong content: expected {hash}, got "),
        "thrown away",
    );
    world.check_nothing_wrong();
    assert!(!world.half_made().exists());
    // A small file lies in git, under another kind of hash.
    let world = World::new();
    world.server.fault("config.json", Fault::WrongBytes);
    says(
        &world.fetch().await.unwrap_err(),
        "`config.json` has the wrong content",
        "thrown away",
    );
    let world = World::new();
    world.server.fault("model.safetensors", Fault::Long);
    says(
        &world.fetch().await.unwrap_err(),
        "expected 100000 bytes, got more",
        "thrown away",
    );
    world.check_nothing_wrong();
    world.check(&world.fetch().await.unwrap());
}

#[tokio::test]
async fn a_range_that_is_ignored_begins_the_file_anew() {
    for fault in [Fault::IgnoreRange, Fault::WrongRange] {
        let world = World::new();
        world.server.fault("model.safetensors", Fault::Cut(30_000));
        world.server.fault("model.safetensors", fault);
        world.check(&world.fetch().await.unwrap());
        let requests = world.requests("model.safetensors");
        assert_eq!(requests[0], None);
        assert!(requests[1].is_some());
    }
}

#[tokio::test]
async fn redirects_are_followed_within_reason() {
    let world = World::new();
    let path = format!("/owner/model/resolve/{COMMIT}/config.json");
    world.server.fault("config.json", Fault::Redirect(path.clone()));
    world.check(&world.fetch().await.unwrap());
    fs::remove_dir_all(world.home.path().join("hub")).unwrap();
    for _ in 0..20 {
        world.server.fault("config.json", Fault::Redirect(path.clone()));
    }
    let error = world.fetch().await.unwrap_err();
    says(&error, "it leads to more than 10 others", "");
    let world = World::new();
    for (to, why) in [
        ("file:///etc/passwd", "it leaves https"),
        ("http://", "its address is none"),
    ] {
        world.server.fault("config.json", Fault::Redirect(to.to_owned()));
        says(&world.fetch().await.unwrap_err(), why, "");
    }
}

#[tokio::test]
async fn a_connection_that_ends_at_every_tenth_still_brings_the_file() {
    let world = World::new();
    for _ in 0..9 {
        world.server.fault("model.safetensors", Fault::Cut(SIZE / 10));
    }
    let snapshot = world.fetch().await.unwrap();
    world.check(&snapshot);
    let requests = world.requests("model.safetensors");
    assert_eq!(requests.len(), 10, "{requests:?}");
    assert_eq!(snapshot.fetched_bytes, snapshot.bytes, "no byte came twice");
    assert_eq!(world.retries(), 9, "more than a request that gets nowhere has");
}

#[tokio::test]
async fn a_connection_that_brings_nothing_is_given_up() {
    let world = World::new();
    for _ in 0..6 {
        world.server.fault("model.safetensors", Fault::Cut(0));
    }
    let error = world.fetch().await.unwrap_err();
    says(
        &error,
        "could not be reached or went away",
        "what has come is kept",
    );
    assert!(!error.to_string().contains("signature"), "{error}");
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(!source.contains("signature"), "{source}");
    assert!(error.is_retryable());
}

#[tokio::test]
async fn bytes_that_drip_are_as_good_as_others() {
    let world = World::empty();
    world.server.add_model(REPO, COMMIT, 300);
    world.server.fault("model.safetensors", Fault::Drip);
    let snapshot = world.fetch().await.unwrap();
    assert_eq!(
        fs::read(snapshot.path.join("model.safetensors")).unwrap(),
        weights(300)
    );
    assert_eq!(world.retries(), 0);
}

#[tokio::test]
async fn a_server_that_falls_silent_is_asked_again() {
    let world = World::new();
    world.server.fault("model.safetensors", Fault::Stall(50_000));
    let silence = Arc::clone(&world.system.silence_is_over);
    let wait = async {
        // Until half of the weights are here.
        while fs::metadata(world.half_made()).map_or(0, |meta| meta.len()) < 50_000 {
            tokio::task::yield_now().await;
        }
        silence.notify_waiters();
    };
    let (snapshot, ()) = futures::join!(world.fetch(), wait);
    world.check(&snapshot.unwrap());
    assert_eq!(world.requests("model.safetensors"), [None, Some(50_000)]);
    let events = world.events.lock().unwrap();
    let reason = events.iter().find_map(|event| match event {
        FetchEvent::Retrying { reason, .. } => Some(reason.clone()),
        _ => None,
    });
    assert!(reason.unwrap().contains("sent nothing for 12345 s"));
}

#[tokio::test]
async fn a_file_that_changes_between_tries_is_not_mixed() {
    let world = World::new();
    let other = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    // Once: the list is asked for again, and what has come is taken up.
    world.server.fault("model.safetensors", Fault::Cut(20_000));
    world.server.fault("hub:model.safetensors", Fault::Drip);
    world
        .server
        .fault("hub:model.safetensors", Fault::Etag(other.to_owned()));
    world.check(&world.fetch().await.unwrap());
    let lists = world
        .server
        .seen()
        .iter()
        .filter(|seen| seen.path.contains("/revision/"))
        .count();
    assert_eq!(lists, 2);

    // For good: it is an error, and no file.
    let world = World::new();
    for _ in 0..2 {
        world
            .server
            .fault("hub:model.safetensors", Fault::Etag(other.to_owned()));
    }
    let error = world.fetch().await.unwrap_err();
    says(
        &error,
        &format!(
            "has changed on the hub meanwhile: expected {}",
            world.server.hash(REPO, COMMIT, "model.safetensors")
        ),
        "new commit",
    );
    world.check_nothing_wrong();
}

#[tokio::test]
async fn a_branch_that_moves_leaves_nothing_of_the_old_file_in_the_new() {
    let world = World::new();
    for _ in 0..6 {
        world.server.fault("model.safetensors", Fault::Cut(20_000));
    }
    let mut options = world.options();
    options.retries = 0;
    let hub = Hub::with_options(options).unwrap();
    assert!(world.fetch_with(&hub, REPO).await.is_err());
    let newer = "2222222222222222222222222222222222222222";
    let mut changed = weights(SIZE);
    changed.reverse();
    world.server.add_model(REPO, newer, SIZE);
    world
        .server
        .add(REPO, newer, "model.safetensors", changed.clone());
    let snapshot = world.fetch().await.unwrap();
    assert_eq!(snapshot.commit.as_deref(), Some(newer));
    assert_eq!(
        fs::read(snapshot.path.join("model.safetensors")).unwrap(),
        changed
    );
    // The old commit is still to be had, by its name.
    let old = world
        .fetch_with(&world.hub(), &format!("{REPO}@{COMMIT}"))
        .await
        .unwrap();
    world.check(&old);
    let refs = fs::read_to_string(world.home.path().join("hub/models--owner--model/refs/main")).unwrap();
    assert_eq!(refs, newer, "a commit moves no branch");
}

#[tokio::test]
async fn what_an_earlier_try_left_is_taken_up_or_thrown_away() {
    let world = World::new();
    fs::create_dir_all(world.blobs()).unwrap();
    fs::write(world.half_made(), &weights(SIZE)[..60_000]).unwrap();
    let snapshot = world.fetch().await.unwrap();
    world.check(&snapshot);
    assert_eq!(world.requests("model.safetensors"), [Some(60_000)]);
    assert_eq!(snapshot.bytes - snapshot.fetched_bytes, 60_000);
    assert!(matches!(
        world.events.lock().unwrap()[0],
        FetchEvent::Planned { present: 60_000, .. }
    ));

    for left in [vec![0; 60_000], vec![0; SIZE], vec![0; SIZE + 1]] {
        let world = World::new();
        fs::create_dir_all(world.blobs()).unwrap();
        fs::write(world.half_made(), left).unwrap();
        let snapshot = world.fetch().await.unwrap();
        world.check(&snapshot);
        assert_eq!(world.requests("model.safetensors").last(), Some(&None));
    }
    // All of it was there, and nothing had given it its name.
    let world = World::new();
    fs::create_dir_all(world.blobs()).unwrap();
    fs::write(world.half_made(), weights(SIZE)).unwrap();
    world.check(&world.fetch().await.unwrap());
    assert_eq!(world.requests("model.safetensors"), []);
}

#[tokio::test]
async fn a_blob_of_the_wrong_length_is_replaced() {
    let world = World::new();
    fs::create_dir_all(world.blobs()).unwrap();
    fs::write(world.weights_blob(), "short").unwrap();
    world.check(&world.fetch().await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_at_once_fetch_each_file_once() {
    let world = World::new();
    world.server.fault("model.safetensors", Fault::Gate(10_000));
    let (one, other) = (world.hub(), world.hub());
    let waiting = async {
        // The gate opens when one of them waits for the other.
        loop {
            let waits = |event: &FetchEvent| matches!(event, FetchEvent::Waiting { file, .. } if file == "model.safetensors");
            if world.events.lock().unwrap().iter().any(waits) {
                break;
            }
            tokio::task::yield_now().await;
        }
        world.server.open_gate();
    };
    let (first, second, ()) = futures::join!(
        world.fetch_with(&one, REPO),
        world.fetch_with(&other, REPO),
        waiting
    );
    let (first, second) = (first.unwrap(), second.unwrap());
    world.check(&first);
    assert_eq!(first.path, second.path);
    assert_eq!(world.requests("model.safetensors").len(), 1);
    let me = format!("process {}", std::process::id());
    let events = world.events.lock().unwrap();
    assert!(
        events
            .iter()
            .any(|event| matches!(event, FetchEvent::Waiting { holder, .. } if *holder == me))
    );
}

#[tokio::test]
async fn what_is_given_up_is_taken_up_later() {
    let world = World::new();
    world.server.fault("model.safetensors", Fault::Gate(50_000));
    {
        let hub = world.hub();
        let mut fetch = Box::pin(world.fetch_with(&hub, REPO));
        loop {
            tokio::select! {
                biased;
                () = tokio::task::yield_now() => {}
                done = &mut fetch => panic!("the gate is shut: {done:?}"),
            }
            if fs::metadata(world.half_made()).map_or(0, |meta| meta.len()) >= 50_000 {
                break;
            }
            // Let it go on.
            let _ = futures::poll!(&mut fetch);
        }
    }
    world.check_nothing_wrong();
    world.server.forget();
    let snapshot = world.fetch().await.unwrap();
    world.check(&snapshot);
    assert_eq!(world.requests("model.safetensors"), [Some(50_000)]);
}

#[tokio::test]
async fn offline_the_cache_is_all_there_is() {
    let world = World::new();
    let mut options = world.options();
    options.environment.offline = true;
    let offline = Hub::with_options(options).unwrap();
    let error = world.fetch_with(&offline, REPO).await.unwrap_err();
    says(
        &error,
        "`owner/model` is not in the cache at",
        "unset HF_HUB_OFFLINE",
    );
    assert!(matches!(
        offline.search(&HubQuery::default()),
        Err(HubError::Offline { .. })
    ));
    assert!(world.server.seen().is_empty(), "nobody was asked");
    let here = world.fetch().await.unwrap();
    world.server.forget();
    let found = world.fetch_with(&offline, REPO).await.unwrap();
    assert_eq!((found.path, found.commit), (here.path.clone(), None));
    let file = world
        .fetch_with(&offline, "hf:owner/model/config.json")
        .await
        .unwrap();
    assert_eq!(file.path, here.path.join("config.json"));
    assert!(
        world
            .fetch_with(&offline, "hf:owner/model/other.gguf")
            .await
            .is_err()
    );
    assert!(world.server.seen().is_empty());

    // A hub that is not there is as none.
    let mut options = world.options();
    options.environment.endpoint = "http://127.0.0.1:1".to_owned();
    let gone = Hub::with_options(options).unwrap();
    assert_eq!(world.fetch_with(&gone, REPO).await.unwrap().path, here.path);
    let events = world.events.lock().unwrap().clone();
    assert!(
        matches!(events.last(), Some(FetchEvent::FromCache { reason }) if reason.contains("could not be reached"))
    );
    let error = world.fetch_with(&gone, "owner/else").await.unwrap_err();
    says(&error, "could not be reached", "look at the network");
}

#[tokio::test]
async fn room_is_asked_for_first() {
    let world = World::new();
    world.system.room.store(50_000, Ordering::Relaxed);
    let error = world.fetch().await.unwrap_err();
    says(&error, "1 MB of disk space are needed in", "models prune");
    assert_eq!(
        world.requests("model.safetensors"),
        [],
        "before anything is fetched"
    );
    // What is here already needs none.
    fs::create_dir_all(world.blobs()).unwrap();
    fs::write(world.half_made(), &weights(SIZE)[..60_000]).unwrap();
    world.check(&world.fetch().await.unwrap());
}

#[tokio::test]
async fn a_repository_is_not_trusted() {
    let world = World::new();
    world.server.add(REPO, COMMIT, "../../../../escaped.json", "{}");
    let error = world.fetch().await.unwrap_err();
    says(
        &error,
        "file name `../../../../escaped.json` is refused: it would lead out of its folder",
        "",
    );
    assert!(!world.home.path().join("escaped.json").exists());

    let world = World::new();
    let mut options = world.options();
    options.max_files = 4;
    let error = world
        .fetch_with(&Hub::with_options(options).unwrap(), REPO)
        .await
        .unwrap_err();
    says(&error, "has 5 files, more than the 4 that are taken", "patterns");
    let mut options = world.options();
    options.max_bytes = 1000;
    let error = world
        .fetch_with(&Hub::with_options(options).unwrap(), REPO)
        .await
        .unwrap_err();
    says(&error, "bytes, more than the 1000 that are taken", "patterns");

    let nonsense = |body: &str| Fault::Status(200, vec![], body.to_owned());
    for (body, why) in [
        ("{", "EOF"),
        (r#"{"id": "owner/model", "sha": "../../.."}"#, "is no commit"),
        (
            r#"{"id": "owner/model", "sha": "1111111111111111111111111111111111111111",
             "siblings": [{"rfilename": "x.json", "size": 1, "blobId": "../x"}]}"#,
            "no length and hash for `x.json`",
        ),
        (
            r#"{"id": "owner/model", "sha": "1111111111111111111111111111111111111111"}"#,
            "no file that",
        ),
    ] {
        world.server.fault("info", nonsense(body));
        says(&world.fetch().await.unwrap_err(), why, "");
    }
    let other = r#"{"id": "owner/model", "sha": "1111111111111111111111111111111111111111"}"#;
    world.server.fault("info", nonsense(other));
    let pinned = world
        .fetch_with(&world.hub(), &format!("{REPO}@{COMMIT}"))
        .await
        .unwrap_err();
    says(&pinned, "it is about commit 1111", "");
}

#[tokio::test]
async fn files_are_chosen_by_patterns_and_pickles_never() {
    let world = World::new();
    world.server.add(REPO, COMMIT, "deep/er/notes.md", "notes");
    world.server.add(REPO, COMMIT, "tiny.gguf", weights(100));
    let hub = world.hub();
    let reference: HubReference = REPO.parse().unwrap();
    let request = SnapshotRequest::new(reference).with_files(FileSelection::Patterns {
        allow: vec!["*.md".to_owned(), "*.bin".to_owned()],
        ignore: vec!["README*".to_owned()],
    });
    let snapshot = hub.fetch(&request, &|_| {}).await.unwrap();
    let names =
        |paths: &[mlx_engine_hub::RepoPath]| paths.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(names(&snapshot.files), ["deep/er/notes.md"]);
    assert_eq!(names(&snapshot.refused), ["pytorch_model.bin"]);
    assert_eq!(
        fs::read_to_string(snapshot.path.join("deep/er/notes.md")).unwrap(),
        "notes"
    );

    let file = world.fetch_with(&hub, "hf:owner/model/tiny.gguf").await.unwrap();
    assert_eq!(fs::read(&file.path).unwrap(), weights(100));
    assert!(file.path.ends_with("tiny.gguf"));
}

#[tokio::test]
async fn models_are_found_page_by_page() {
    let world = World::empty();
    for name in ["a/one", "a/two", "a/three", "b/one", "a/four", "a/five"] {
        world.server.add(name, COMMIT, "config.json", "{}");
    }
    let hub = world.hub();
    let ids = async |query: &HubQuery| {
        let found = hub.search(query).unwrap().map_ok(|model| model.id);
        found.try_collect::<Vec<_>>().await
    };
    let mut query = HubQuery {
        author: Some("a".to_owned()),
        sort: Some(HubSort::Downloads),
        tags: vec!["mlx".to_owned()],
        ..HubQuery::default()
    };
    assert_eq!(
        ids(&query).await.unwrap(),
        ["a/five", "a/four", "a/one", "a/three", "a/two"]
    );
    assert_eq!(world.server.seen().len(), 3);
    query.limit = Some(3);
    assert_eq!(ids(&query).await.unwrap().len(), 3);
    query.text = Some("two".to_owned());
    assert_eq!(ids(&query).await.unwrap(), ["a/two"]);
    query.limit = Some(0);
    assert!(ids(&query).await.unwrap().is_empty());

    let link = vec![(
        "Link",
        "<http://localhost:9/api/models?skip=2>; rel=\"next\"".to_owned(),
    )];
    world.server.fault(
        "search",
        Fault::Status(200, link, r#"[{"id": "x/y"}]"#.to_owned()),
    );
    let error = hub
        .search(&HubQuery::default())
        .unwrap()
        .next()
        .await
        .unwrap()
        .unwrap_err();
    says(&error, "its next page is somewhere else", "");
}

#[tokio::test]
async fn info_tells_files_and_sizes() {
    let world = World::new();
    let info = world.hub().info(&REPO.parse().unwrap()).await.unwrap();
    assert_eq!(
        (info.id.as_str(), info.commit.as_str(), info.files.len()),
        (REPO, COMMIT, 5)
    );
    assert_eq!(
        info.bytes(),
        info.files.iter().map(|file| file.bytes).sum::<u64>()
    );
    assert_eq!(
        (info.gated, info.library.as_deref(), info.downloads),
        (false, Some("mlx"), Some(12))
    );
    let weights = info
        .files
        .iter()
        .find(|file| file.path.as_str() == "model.safetensors")
        .unwrap();
    assert_eq!(
        weights.hash.to_string(),
        world.server.hash(REPO, COMMIT, "model.safetensors")
    );
}

#[tokio::test]
async fn a_repair_fetches_only_what_is_damaged() {
    let world = World::new();
    let hub = world.hub();
    let reference: HubReference = REPO.parse().unwrap();
    let snapshot = world.fetch().await.unwrap();
    let sound = hub.repair(&reference, &|_| {}).await.unwrap();
    assert!(sound.found.is_sound() && sound.fetched_bytes == 0);
    let mut damaged = weights(SIZE);
    damaged[77] ^= 1;
    fs::write(world.weights_blob(), damaged).unwrap();
    let tokenizer = fs::canonicalize(snapshot.path.join("tokenizer.json")).unwrap();
    fs::remove_file(tokenizer).unwrap();
    world.server.forget();
    let repaired = hub.repair(&reference, &|_| {}).await.unwrap();
    let broken: Vec<_> = repaired.found.broken().map(ToString::to_string).collect();
    assert_eq!(broken, ["model.safetensors", "tokenizer.json"]);
    assert_eq!(repaired.fetched_bytes, SIZE as u64 + 2);
    assert_eq!(world.requests("config.json"), []);
    world.check(&snapshot);
    assert!(hub.repair(&reference, &|_| {}).await.unwrap().found.is_sound());
}

#[tokio::test]
async fn a_repair_takes_nothing_away_that_it_cannot_bring() {
    let world = World::new();
    let reference: HubReference = REPO.parse().unwrap();
    let snapshot = world.fetch().await.unwrap();
    fs::write(world.weights_blob(), "damaged").unwrap();
    // As Python would have it: a pickle, damaged too, and a file that somebody put there.
    let pickle = world
        .blobs()
        .join(world.server.hash(REPO, COMMIT, "pytorch_model.bin"));
    fs::write(&pickle, "another").unwrap();
    let link = Path::new("../../blobs").join(pickle.file_name().unwrap());
    #[cfg(unix)]
    std::os::unix::fs::symlink(link, snapshot.path.join("pytorch_model.bin")).unwrap();
    fs::write(snapshot.path.join("notes.json"), "{}").unwrap();

    let mut options = world.options();
    options.environment.offline = true;
    let offline = Hub::with_options(options).unwrap();
    let error = offline.repair(&reference, &|_| {}).await.unwrap_err();
    says(&error, "the network is to be left alone", "unset HF_HUB_OFFLINE");
    let refuse = Fault::Status(403, vec![], String::new());
    world.server.fault("info", refuse);
    assert!(world.hub().repair(&reference, &|_| {}).await.is_err());
    assert_eq!(fs::read_to_string(world.weights_blob()).unwrap(), "damaged");

    world.server.forget();
    let told = Mutex::new(0);
    let tell = |event| {
        if let FetchEvent::Checking { file, done, bytes } = event {
            assert!(file == REPO && done <= bytes);
            *told.lock().unwrap() = done;
        }
    };
    let repaired = world.hub().repair(&reference, &tell).await.unwrap();
    assert_eq!(repaired.fetched_bytes, SIZE as u64);
    assert!(*told.lock().unwrap() > 0, "reading is told");
    world.check(&snapshot);
    assert_eq!(fs::read_to_string(&pickle).unwrap(), "another");
    assert_eq!(
        fs::read_to_string(snapshot.path.join("notes.json")).unwrap(),
        "{}"
    );

    // The one file that is named, and no other.
    fs::write(world.weights_blob(), "damaged").unwrap();
    let one: HubReference = "hf:owner/model/tokenizer.json".parse().unwrap();
    assert!(world.hub().repair(&one, &|_| {}).await.unwrap().found.is_sound());
}

#[tokio::test]
async fn what_is_removed_while_it_waits_comes_again() {
    let world = World::new();
    world.fetch().await.unwrap();
    let locks = world.home.path().join("hub/.locks/models--owner--model");
    let lock = fs::File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(locks.join("repository.lock"))
        .unwrap();
    lock.lock().unwrap();
    let blob = world.weights_blob();
    let tell = |event| {
        if matches!(event, FetchEvent::Waiting { .. }) {
            fs::remove_file(&blob).unwrap();
            lock.unlock().unwrap();
        }
    };
    let request = SnapshotRequest::new(REPO.parse().unwrap());
    let snapshot = world.hub().fetch(&request, &tell).await.unwrap();
    assert_eq!(snapshot.fetched_bytes, SIZE as u64);
    world.check(&snapshot);
}

#[tokio::test]
async fn a_commit_whose_fetch_was_interrupted_is_not_whole() {
    let world = World::new();
    let mut options = world.options();
    options.files_at_once = 1;
    let hub = Hub::with_options(options).unwrap();
    let pinned = format!("{REPO}@{COMMIT}");
    // The weights are before it, and no branch has to be written down for a commit.
    let refuse = Fault::Status(403, vec![], String::new());
    world.server.fault("tokenizer.json", refuse);
    assert!(world.fetch_with(&hub, &pinned).await.is_err());
    assert_eq!(fs::read(world.weights_blob()).unwrap(), weights(SIZE));
    assert!(hub.cache().find(&pinned.parse().unwrap()).is_err());
    let snapshot = world.fetch_with(&hub, &pinned).await.unwrap();
    assert_eq!(hub.cache().find(&pinned.parse().unwrap()).unwrap(), snapshot.path);
    assert_eq!(world.requests("model.safetensors").len(), 1);
}

#[tokio::test]
async fn a_small_file_is_read_without_the_cache() {
    let world = World::new();
    world
        .server
        .add(REPO, COMMIT, "large.json", vec![b' '; (4 << 20) + 1]);
    let hub = world.hub();
    let info = hub.info(&REPO.parse().unwrap()).await.unwrap();
    let read = async |path: &str| hub.read(&info, &path.parse().unwrap()).await;
    let unavailable = Fault::Status(503, vec![], String::new());
    world.server.fault("config.json", unavailable);
    assert_eq!(read("config.json").await.unwrap(), br#"{"model_type": "llama"}"#);
    world.server.fault("config.json", Fault::WrongBytes);
    says(
        &read("config.json").await.unwrap_err(),
        "has the wrong content",
        "try again",
    );
    says(&read("other.json").await.unwrap_err(), "no such file", "spelling");
    says(
        &read("large.json").await.unwrap_err(),
        "more than the 4194304 that are taken",
        "",
    );
    world.server.fault("config.json", Fault::Long);
    assert!(read("config.json").await.is_err());
    assert!(!world.home.path().join("hub").exists(), "nothing is left of it");
}

#[tokio::test]
async fn a_hub_that_has_to_be_asked_again_is_told_of() {
    let world = World::new();
    let unavailable = || Fault::Status(503, vec![], "busy".to_owned());
    world.server.fault("info", unavailable());
    world.fetch().await.unwrap();
    let events = world.events.lock().unwrap().clone();
    assert!(
        matches!(&events[0], FetchEvent::Retrying { file, reason, .. } if file == REPO && reason.contains("503: busy")),
        "{:?}",
        events[0]
    );
    world.server.fault("search", unavailable());
    let told = Arc::new(Mutex::new(0));
    let heard = Arc::clone(&told);
    let tell = move |_| *heard.lock().unwrap() += 1;
    let found = world.hub().search_with(&HubQuery::default(), tell).unwrap();
    assert_eq!(found.try_collect::<Vec<_>>().await.unwrap().len(), 1);
    assert_eq!(*told.lock().unwrap(), 1);
}

#[test]
fn what_it_does_can_be_spawned() {
    fn check(_: &(impl Send + 'static)) {}
    let hub = World::empty().hub();
    check(&async move {
        let reference: HubReference = REPO.parse().unwrap();
        let request = SnapshotRequest::new(reference.clone());
        let fetched = hub.fetch(&request, &|_| {}).await.is_ok();
        (
            fetched,
            hub.info(&reference).await.is_ok(),
            hub.repair(&reference, &|_| {}).await.is_ok(),
        )
    });
}

#[test]
fn without_a_runtime_there_is_an_error_and_no_panic() {
    let world = World::new();
    let error = futures::executor::block_on(world.fetch()).unwrap_err();
    assert!(matches!(error, HubError::NoRuntime));
}

#[test]
fn an_endpoint_that_is_none_is_refused() {
    let world = World::empty();
    for (endpoint, why) in [
        ("huggingface.co", "relative URL"),
        ("ftp://h", "begin with https://"),
    ] {
        let mut options = world.options();
        options.environment.endpoint = endpoint.to_owned();
        says(&Hub::with_options(options).unwrap_err(), why, "HF_ENDPOINT");
    }
    let mut options = world.options();
    options.environment.cache = None;
    says(
        &Hub::with_options(options).unwrap_err(),
        "no folder for the cache",
        "HF_HUB_CACHE",
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_file_is_the_same_wherever_the_connection_ends(
        size in 1_usize..20_000,
        cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>(), 0_u8..4), 0..4),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let world = World::empty();
            world.server.add_model(REPO, COMMIT, size);
            for (cut, short, other) in cuts {
                let at = cut.index(size);
                world.server.fault("model.safetensors", if short { Fault::Short(at) } else { Fault::Cut(at) });
                if other == 0 {
                    world.server.fault("model.safetensors", Fault::IgnoreRange);
                }
            }
            let mut snapshot = world.fetch().await;
            // A request that gets nowhere is given up in the end; the next one goes on.
            for _ in 0..8 {
                if snapshot.is_err() {
                    snapshot = world.fetch().await;
                }
            }
            let path = snapshot.unwrap().path;
            assert_eq!(fs::read(path.join("model.safetensors")).unwrap(), weights(size));
        });
    }
}
