//! What an engine's process is told: frames that nobody meant end the connection, and requests get an answer each.
#![no_main]

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::thread;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};
use libfuzzer_sys::fuzz_target;
use mlx_engine_core::{EngineError, EventStream, GenerateParams, LlmEngine, Prompt};
use mlx_engine_resilience::{Service, serve};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Builder::new_current_thread().enable_time().build().unwrap());

/// Both sides have to be of one version, which is that of the workspace.
static VERSION: LazyLock<&str> = LazyLock::new(|| {
    let manifest = include_str!("../../Cargo.toml");
    let line = manifest.lines().find_map(|line| line.strip_prefix("version = \""));
    line.and_then(|rest| rest.strip_suffix('"')).unwrap()
});

/// Takes every request and says nothing.
struct Silent;

impl LlmEngine for Silent {
    fn stream(&self, _: Prompt, params: GenerateParams) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        async move {
            params.validate()?;
            Ok(stream::empty().boxed())
        }
        .boxed()
    }
}

impl Service for Silent {}

fn frame(bytes: &mut Vec<u8>, json: &[u8]) {
    bytes.extend_from_slice(&u32::try_from(json.len()).unwrap().to_le_bytes());
    bytes.extend_from_slice(json);
}

fuzz_target!(|data: &[u8]| {
    let mut bytes = Vec::new();
    let load = serde_json::json!({"load": {"version": *VERSION, "setup": null}});
    frame(&mut bytes, load.to_string().as_bytes());
    match data.split_first() {
        // As they are, lengths and all.
        Some((0, raw)) => bytes.extend_from_slice(raw),
        // A frame a line.
        _ => data.split(|byte| *byte == b'\n').for_each(|line| frame(&mut bytes, line)),
    }
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut heard = near.try_clone().unwrap();
    let hear = thread::spawn(move || io::copy(&mut heard, &mut io::sink()));
    let said = RUNTIME.block_on(async {
        let serving = serve(far, |_: Value, _| async { Ok(Silent) });
        let tell = thread::spawn(move || {
            // The other side may have hung up.
            let _ = near.write_all(&bytes);
            let _ = near.shutdown(Shutdown::Write);
        });
        let said = serving.await;
        tell.join().unwrap();
        said
    });
    said.unwrap();
    let _ = hear.join().unwrap();
});
