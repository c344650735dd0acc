//! A hub on this machine that answers as the real one does, and badly when it is told to.
//!
//! Large files are handed on to another host, as the real hub hands them to its CDN: the same server under the name
//! `localhost`, which is another origin than `127.0.0.1`.

#![expect(
    clippy::unwrap_used,
    reason = "clippy takes only the tests themselves for tests"
)]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use serde_json::{Value, json};
use sha1::Digest;

pub(crate) const COMMIT: &str = "95d09f2b10159347eece71399a7e2e907ea3df4f";

/// How the next answer about something is bad.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// A status with headers and a body.
    Status(u16, Vec<(&'static str, String)>, String),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// A body that is shorter than the file, and says so.
    Short(usize),
    /// More than the file has.
    Long,
    /// The whole file, though a part was asked for.
    IgnoreRange,
    /// Another part than the one that was asked for.
    WrongRange,
    /// Bytes of the right number that are others.
    WrongBytes,
    /// Nothing more after so many bytes, with the connection open.
    Stall(usize),
    /// A byte at a time, in packets of their own.
    Drip,
    /// Another hash than the file has.
    Etag(String),
    /// Leads elsewhere.
    Redirect(String),
    /// Waits until [`HubServer::open_gate`] before the rest behind so many bytes.
    Gate(usize),
}

/// A request as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) host: String,
    pub(crate) path: String,
    /// Where the wanted range begins.
    pub(crate) from: Option<usize>,
    pub(crate) token: Option<String>,
}

struct File {
    content: Vec<u8>,
    /// Whether it lies outside of git.
    large: bool,
}

impl File {
    fn hash(&self) -> String {
        if self.large {
            return format!("{:x}", sha2::Sha256::digest(&self.content));
        }
        let header = format!("blob {}\0", self.content.len());
        format!(
            "{:x}",
            sha1::Sha1::new()
                .chain_update(header)
                .chain_update(&self.content)
                .finalize()
        )
    }
}

#[derive(Default)]
struct State {
    /// By id and commit.
    repos: BTreeMap<(String, String), BTreeMap<String, File>>,
    refs: HashMap<(String, String), String>,
    faults: HashMap<String, VecDeque<Fault>>,
    seen: Vec<Seen>,
}

struct Shared {
    address: SocketAddr,
    state: Mutex<State>,
    stop: AtomicBool,
    gate: (Mutex<bool>, Condvar),
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

/// The server. It ends with this value.
pub(crate) struct HubServer {
    shared: Arc<Shared>,
}

impl HubServer {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let shared = Arc::new(Shared {
            address: listener.local_addr().unwrap(),
            state: Mutex::default(),
            stop: AtomicBool::new(false),
            gate: (Mutex::new(false), Condvar::new()),
        });
        let server = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if server.stop.load(Ordering::Relaxed) {
                    return;
                }
                let shared = Arc::clone(&server);
                // A client that goes away is what half of the tests are about.
                std::thread::spawn(move || stream.and_then(|stream| shared.serve(stream)));
            }
        });
        Self { shared }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.shared.address)
    }

    /// Adds a file to a repository's commit, and has `main` point at it.
    pub(crate) fn add(&self, repo: &str, commit: &str, path: &str, content: impl Into<Vec<u8>>) {
        let large = is_large(path);
        let content = content.into();
        let mut state = self.shared.state();
        let files = state
            .repos
            .entry((repo.to_owned(), commit.to_owned()))
            .or_default();
        files.insert(path.to_owned(), File { content, large });
        state
            .refs
            .insert((repo.to_owned(), "main".to_owned()), commit.to_owned());
    }

    /// A small model: its configuration, a tokenizer, weights of `size` bytes, and what nobody wants.
    pub(crate) fn add_model(&self, repo: &str, commit: &str, size: usize) {
        self.add(repo, commit, "config.json", r#"{"model_type": "llama"}"#);
        self.add(repo, commit, "tokenizer.json", "{}");
        self.add(repo, commit, "README.md", "# A model");
        self.add(repo, commit, "pytorch_model.bin", "a pickle");
        self.add(repo, commit, "model.safetensors", weights(size));
    }

    /// The next answer about a file (by its name), or about `info`, `tree` or `search`, is bad.
    pub(crate) fn fault(&self, about: &str, fault: Fault) {
        self.shared
            .state()
            .faults
            .entry(about.to_owned())
            .or_default()
            .push_back(fault);
    }

    /// Lets what waits at the gate go on.
    pub(crate) fn open_gate(&self) {
        *self.shared.gate.0.lock().unwrap() = true;
        self.shared.gate.1.notify_all();
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.shared.state().seen.clone()
    }

    pub(crate) fn forget(&self) {
        self.shared.state().seen.clear();
    }

    /// The hash of a file, as the hub names it.
    pub(crate) fn hash(&self, repo: &str, commit: &str, path: &str) -> String {
        self.shared.state().repos[&(repo.to_owned(), commit.to_owned())][path].hash()
    }

    /// Requests for the content of a file, after every redirect.
    pub(crate) fn content_requests(&self, repo: &str, commit: &str, path: &str) -> Vec<Seen> {
        let hash = self.hash(repo, commit, path);
        let place = format!("/{repo}/resolve/{commit}/{path}");
        let mut seen = self.seen();
        let large = is_large(path);
        seen.retain(|seen| {
            seen.method == "GET" && (seen.path == format!("/cdn/{hash}") || (!large && seen.path == place))
        });
        seen
    }
}

impl Drop for HubServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.open_gate();
        // The listener looks at the flag when someone comes.
        let _ = TcpStream::connect(self.shared.address);
    }
}

/// Whether the hub keeps a file outside of git.
fn is_large(path: &str) -> bool {
    Path::new(path)
        .extension()
        .is_some_and(|extension| extension == "safetensors" || extension == "gguf")
}

/// Bytes that are different everywhere.
pub(crate) fn weights(size: usize) -> Vec<u8> {
    (0..size as u32)
        .map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

/// An answer without its faults.
struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Reply {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
        }
    }

    fn json(value: &Value) -> Self {
        Self::new(200, value.to_string()).with("Content-Type", "application/json")
    }

    fn missing(code: &str) -> Self {
        Self::new(404, json!({"error": "not found"}).to_string()).with("X-Error-Code", code)
    }

    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

/// How a body is sent.
#[derive(Clone, Copy)]
enum Sending {
    Whole,
    Cut(usize),
    Stall(usize),
    Gate(usize),
    Drip,
}

impl Shared {
    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let mut words = line.split_whitespace();
        let method = words.next().unwrap_or_default().to_owned();
        let target = words.next().unwrap_or_default().to_owned();
        let mut headers = HashMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else {
                break;
            };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let from = headers
            .get("range")
            .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        self.state().seen.push(Seen {
            method: method.clone(),
            host: headers.get("host").cloned().unwrap_or_default(),
            path: path.to_owned(),
            from,
            token: headers
                .get("authorization")
                .and_then(|value| value.strip_prefix("Bearer ").map(str::to_owned)),
        });
        let (reply, sending) = self.answer(&method, path, query, from);
        let mut head = format!(
            "HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {}\r\n",
            reply.status,
            reply.body.len()
        );
        for (name, value) in &reply.headers {
            write!(head, "{name}: {value}\r\n").unwrap();
        }
        stream.write_all(format!("{head}\r\n").as_bytes())?;
        if method == "HEAD" {
            return Ok(());
        }
        stream.set_nodelay(true)?;
        match sending {
            Sending::Whole => stream.write_all(&reply.body),
            Sending::Cut(after) => stream.write_all(&reply.body[..after.min(reply.body.len())]),
            Sending::Drip => reply.body.iter().try_for_each(|byte| stream.write_all(&[*byte])),
            Sending::Gate(after) | Sending::Stall(after) => {
                let after = after.min(reply.body.len());
                stream.write_all(&reply.body[..after])?;
                let open = self.gate.0.lock().unwrap();
                drop(self.gate.1.wait_while(open, |open| !*open).unwrap());
                match sending {
                    Sending::Gate(_) => stream.write_all(&reply.body[after..]),
                    _ => Ok(()),
                }
            }
        }
    }

    fn answer(&self, method: &str, path: &str, query: &str, from: Option<usize>) -> (Reply, Sending) {
        let parts: Vec<String> = path.split('/').skip(1).map(unescape).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        match &parts[..] {
            ["api", "models"] => self.faulty("search", from, |state| search(state, query)),
            ["api", "models", owner, name, "tree", revision] => {
                let id = format!("{owner}/{name}");
                self.faulty("tree", from, |state| tree(state, &id, revision))
            }
            ["api", "models", owner, name] => {
                let id = format!("{owner}/{name}");
                self.faulty("info", from, |state| info(state, &id, "main"))
            }
            ["api", "models", owner, name, "revision", revision] => {
                let id = format!("{owner}/{name}");
                self.faulty("info", from, |state| info(state, &id, revision))
            }
            ["cdn", hash] => {
                let name = self
                    .state()
                    .repos
                    .values()
                    .flatten()
                    .find(|(_, file)| file.hash() == *hash)
                    .map(|(name, _)| name.clone());
                let name = name.unwrap_or_default();
                self.faulty(&name, from, |state| {
                    let file = state
                        .repos
                        .values()
                        .flat_map(BTreeMap::values)
                        .find(|file| file.hash() == *hash);
                    file.map_or_else(
                        || Reply::missing("EntryNotFound"),
                        |file| Reply::new(200, file.content.clone()),
                    )
                })
            }
            [owner, name, "resolve", revision, rest @ ..] => {
                let (id, file_name) = (format!("{owner}/{name}"), rest.join("/"));
                let found = |state: &State| {
                    file(
                        state,
                        &id,
                        revision,
                        &file_name,
                        &format!("http://localhost:{}", self.address.port()),
                    )
                };
                // Python asks for the head first, of which nothing is bad; a large file is bad where it lies.
                let about = if method == "HEAD" { "head" } else { &file_name };
                let redirects = found(&self.state()).status == 302;
                let about = if redirects {
                    format!("hub:{about}")
                } else {
                    about.to_owned()
                };
                self.faulty(&about, from, found)
            }
            _ => (Reply::missing("RepoNotFound"), Sending::Whole),
        }
    }

    /// An answer, made as bad as the next fault says.
    fn faulty(&self, about: &str, from: Option<usize>, make: impl Fn(&State) -> Reply) -> (Reply, Sending) {
        let (fault, mut reply) = {
            let mut state = self.state();
            let fault = state.faults.get_mut(about).and_then(VecDeque::pop_front);
            (fault, make(&state))
        };
        let mut from = from.filter(|_| reply.status == 200);
        let size = reply.body.len();
        let mut sending = Sending::Whole;
        match fault {
            Some(Fault::Status(status, headers, body)) => {
                reply = Reply::new(status, body);
                for (name, value) in headers {
                    reply = reply.with(name, value);
                }
                return (reply, sending);
            }
            Some(Fault::Redirect(to)) => return (Reply::new(302, "").with("Location", to), sending),
            Some(Fault::Cut(after)) => sending = Sending::Cut(after),
            Some(Fault::Stall(after)) => sending = Sending::Stall(after),
            Some(Fault::Gate(after)) => sending = Sending::Gate(after),
            Some(Fault::Drip) => sending = Sending::Drip,
            Some(Fault::IgnoreRange) => from = None,
            Some(Fault::WrongRange) => from = from.map(|_| 0),
            Some(Fault::WrongBytes) => reply.body.iter_mut().for_each(|byte| *byte ^= 1),
            Some(Fault::Long) => reply.body.push(0),
            Some(Fault::Etag(ref etag)) => {
                reply
                    .headers
                    .retain(|(name, _)| !name.contains("tag") && !name.contains("Tag"));
                reply = reply.with("X-Linked-Etag", format!("\"{etag}\""));
            }
            Some(Fault::Short(_)) | None => {}
        }
        if let Some(from) = from {
            if from >= size && size > 0 {
                return (
                    Reply::new(416, "").with("Content-Range", format!("bytes */{size}")),
                    sending,
                );
            }
            reply.status = 206;
            reply.body.drain(..from.min(size));
            reply = reply.with(
                "Content-Range",
                format!("bytes {from}-{}/{size}", size.saturating_sub(1)),
            );
        }
        if let Some(Fault::Short(length)) = fault {
            reply.body.truncate(length);
        }
        (reply, sending)
    }
}

fn unescape(part: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = part.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'%' && tail.len() >= 2 {
            bytes.push(u8::from_str_radix(std::str::from_utf8(&tail[..2]).unwrap(), 16).unwrap());
            rest = &tail[2..];
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).unwrap()
}

fn commit_of(state: &State, id: &str, revision: &str) -> Result<String, Reply> {
    if !state.repos.keys().any(|(repo, _)| repo == id) {
        return Err(Reply::missing("RepoNotFound"));
    }
    if let Some(commit) = state.refs.get(&(id.to_owned(), revision.to_owned())) {
        return Ok(commit.clone());
    }
    let known = state.repos.contains_key(&(id.to_owned(), revision.to_owned()));
    known
        .then(|| revision.to_owned())
        .ok_or_else(|| Reply::missing("RevisionNotFound"))
}

fn info(state: &State, id: &str, revision: &str) -> Reply {
    let commit = match commit_of(state, id, revision) {
        Ok(commit) => commit,
        Err(reply) => return reply,
    };
    let files = &state.repos[&(id.to_owned(), commit.clone())];
    let siblings: Vec<Value> = files
        .iter()
        .map(|(path, file)| {
            let size = file.content.len();
            if file.large {
                json!({"rfilename": path, "size": size, "blobId": "0".repeat(40),
                               "lfs": {"sha256": file.hash(), "size": size, "pointerSize": 134}})
            } else {
                json!({"rfilename": path, "size": size, "blobId": file.hash()})
            }
        })
        .collect();
    Reply::json(&json!({
        "_id": "1", "id": id, "modelId": id, "sha": commit, "siblings": siblings, "private": false, "gated": false,
        "tags": ["mlx"], "pipeline_tag": "text-generation", "library_name": "mlx", "downloads": 12, "likes": 3,
        "lastModified": "2026-01-02T03:04:05.000Z", "createdAt": "2026-01-02T03:04:05.000Z",
    }))
}

fn tree(state: &State, id: &str, revision: &str) -> Reply {
    let commit = match commit_of(state, id, revision) {
        Ok(commit) => commit,
        Err(reply) => return reply,
    };
    let files = &state.repos[&(id.to_owned(), commit)];
    let entries: Vec<Value> = files
        .iter()
        .map(|(path, file)| {
            let size = file.content.len();
            if file.large {
                json!({"type": "file", "path": path, "size": size, "oid": "0".repeat(40),
                               "lfs": {"oid": file.hash(), "size": size, "pointerSize": 134}})
            } else {
                json!({"type": "file", "path": path, "size": size, "oid": file.hash()})
            }
        })
        .collect();
    Reply::json(&Value::Array(entries))
}

fn file(state: &State, id: &str, revision: &str, path: &str, cdn: &str) -> Reply {
    let commit = match commit_of(state, id, revision) {
        Ok(commit) => commit,
        Err(reply) => return reply,
    };
    let Some(file) = state.repos[&(id.to_owned(), commit.clone())].get(path) else {
        return Reply::missing("EntryNotFound");
    };
    let hash = file.hash();
    if !file.large {
        return Reply::new(200, file.content.clone())
            .with("ETag", format!("\"{hash}\""))
            .with("X-Repo-Commit", commit);
    }
    Reply::new(302, "")
        .with("X-Repo-Commit", commit)
        .with("X-Linked-Etag", format!("\"{hash}\""))
        .with("X-Linked-Size", file.content.len().to_string())
        .with("Location", format!("{cdn}/cdn/{hash}?signature=secret"))
}

/// Models by id, two on a page.
fn search(state: &State, query: &str) -> Reply {
    let pairs: Vec<(&str, &str)> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
    let get = |name: &str| {
        pairs
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| *value)
    };
    let mut ids: Vec<&String> = state.repos.keys().map(|(id, _)| id).collect();
    ids.dedup();
    ids.retain(|id| get("search").is_none_or(|text| id.contains(text)));
    ids.retain(|id| get("author").is_none_or(|author| id.starts_with(&format!("{author}/"))));
    let skip: usize = get("skip").map_or(0, |skip| skip.parse().unwrap());
    let page: Vec<Value> = ids
        .iter()
        .skip(skip)
        .take(2)
        .map(|id| json!({"id": id, "downloads": 12, "tags": ["mlx"], "gated": "auto"}))
        .collect();
    let reply = Reply::json(&Value::Array(page));
    if skip + 2 >= ids.len() {
        return reply;
    }
    let rest: Vec<String> = pairs
        .iter()
        .filter(|(key, _)| *key != "skip")
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    reply.with(
        "Link",
        format!("</api/models?{}&skip={}>; rel=\"next\"", rest.join("&"), skip + 2),
    )
}
