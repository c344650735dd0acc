//! Answers of the hub: whatever it says, and in whatever order, nothing is written outside of the cache.
#![no_main]

use std::collections::VecDeque;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use futures::StreamExt;
use libfuzzer_sys::fuzz_target;
use mlx_engine_hub::{Environment, FileSelection, Hub, HubOptions, HubQuery, HubReference, SnapshotRequest};
use tokio::runtime::{Builder, Runtime};

/// What is between two answers of an input.
const NEXT: u8 = b'\x1e';

/// The answers that are left; the last one is given again and again.
static ANSWERS: Mutex<VecDeque<Vec<u8>>> = Mutex::new(VecDeque::new());

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
});

/// A hub that is served here.
static HUB: LazyLock<Hub> = LazyLock::new(|| {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            // Whoever asked may have gone.
            std::thread::spawn(move || drop(serve(&connection)));
        }
    });
    let mut environment = Environment::from_lookup(|_| None);
    environment.cache = Some(folder().join("cache"));
    environment.endpoint = format!("http://{address}");
    let mut options = HubOptions::new(environment);
    options.files_at_once = 1;
    options.retries = 0;
    options.idle_timeout = Duration::from_secs(5);
    options.max_files = 100;
    options.max_bytes = 1 << 20;
    Hub::with_options(options).expect("a hub")
});

fn folder() -> PathBuf {
    PathBuf::from(format!("target/hub-{}", std::process::id()))
}

/// Answers one request after the other.
fn serve(mut connection: &TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(connection.try_clone()?);
    loop {
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
        }
        let answer = {
            let mut answers = ANSWERS.lock().expect("no panic");
            let first = answers.pop_front().unwrap_or_default();
            if answers.is_empty() {
                answers.push_back(first.clone());
            }
            first
        };
        connection.write_all(&response(&answer))?;
    }
}

/// The first line of an answer is its status, then there are headers, and behind an empty line the body.
fn response(answer: &[u8]) -> Vec<u8> {
    let border = answer.windows(2).position(|two| two == b"\n\n");
    let (head, body) = border.map_or((answer, &[][..]), |at| (&answer[..at], &answer[at + 2..]));
    let head = String::from_utf8_lossy(head);
    let mut lines = head.lines();
    let status: u16 = lines.next().and_then(|status| status.parse().ok()).unwrap_or(200);
    // Others say that there is no body, or that there is more to come.
    let status = if (200..600).contains(&status) && ![204, 205, 304].contains(&status) {
        status
    } else {
        200
    };
    let mut bytes = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n", body.len()).into_bytes();
    for line in lines {
        let framing = ["content-length", "transfer-encoding", "connection", "upgrade"];
        let name = line.split(':').next().unwrap_or_default().to_ascii_lowercase();
        let is_name = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        if line.contains(':') && !name.is_empty() && is_name && !framing.contains(&&*name) {
            bytes.extend(line.bytes().filter(|byte| !byte.is_ascii_control()));
            bytes.extend(b"\r\n");
        }
    }
    bytes.extend(b"\r\n");
    bytes.extend(body);
    bytes
}

fn answer_with(answers: &[u8]) {
    let answers = answers.split(|byte| *byte == NEXT).map(<[u8]>::to_vec);
    *ANSWERS.lock().expect("no panic") = answers.collect();
}

/// Searches, looks a repository up with a file of it, and fetches all of it.
async fn ask(answers: &[u8]) {
    answer_with(answers);
    let query = HubQuery {
        limit: Some(100),
        ..HubQuery::default()
    };
    let found = HUB
        .search(&query)
        .expect("a search")
        .take(200)
        .collect::<Vec<_>>()
        .await;
    assert!(found.len() <= 101, "no more than was asked for");

    answer_with(answers);
    let reference: HubReference = "a/b".parse().expect("a name");
    if let Ok(info) = HUB.info(&reference).await {
        let _ = info.bytes();
        if let Some(file) = info.files.first() {
            let _ = HUB.read(&info, &file.path).await;
        }
    }

    answer_with(answers);
    let request = SnapshotRequest::new(reference).with_files(FileSelection::All);
    if let Ok(snapshot) = HUB.fetch(&request, &|_| {}).await {
        for file in &snapshot.files {
            let bytes = fs::metadata(snapshot.path.join(file.to_path()))
                .expect("a file")
                .len();
            assert!(bytes <= snapshot.bytes);
        }
    }
}

fuzz_target!(|answers: &[u8]| {
    let _ = fs::remove_dir_all(folder());
    fs::create_dir_all(folder()).expect("a folder");
    RUNTIME.block_on(ask(answers));
    let beside = fs::read_dir(folder()).expect("the folder").flatten();
    assert!(
        beside.map(|entry| entry.file_name()).all(|name| name == "cache"),
        "something was written beside the cache"
    );
});
