//! What the two halves of an engine in a process of its own say to each other: whatever one of them hears, it says how that
//! ended, and what it says itself can be read.
#![no_main]

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;

use futures::future::BoxFuture;
use futures::{StreamExt, stream};
use libfuzzer_sys::fuzz_target;
use mlx_engine_core::{
    Backend, Device, EngineError, EventStream, FinishReason, GenerateParams, GenerateSummary,
    GenerationEvent, LlmEngine, LoadProgress, ModelConfiguration, Prompt, Timings, Usage,
};
use mlx_engine_resilience::{Launch, Process, Service, Supervised, SupervisorConfiguration, serve};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

/// What the first byte of an input says: that the program hears it, and not the engine's process.
const TO_PROGRAM: u8 = 1;
/// That each line is a frame; else the bytes are heard as they are.
const LINES: u8 = 2;
/// That the other half has said before what it says when all is well.
const READY: u8 = 4;

/// The number of a request of our own.
const LAST: u64 = u64::MAX;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime")
});

/// What a program says first, as one of this version says it.
static LOAD: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let (said, heard) = channel();
    let started = RUNTIME.block_on(supervise(Peer {
        said: Vec::new(),
        ready: false,
        load: Some(said),
    }));
    assert!(started.is_err(), "nobody said that it was ready");
    heard.recv().expect("the first frame")
});

fn frame(json: &[u8]) -> Vec<u8> {
    let length = u32::try_from(json.len()).expect("a length");
    [&length.to_le_bytes(), json].concat()
}

/// The bytes of the next frame, its length with them.
fn read_frame(connection: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 4];
    connection.read_exact(&mut length)?;
    let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
    connection.read_exact(&mut bytes)?;
    Ok([&length[..], &bytes].concat())
}

/// The engine's process, as a thread that says what it is told to.
struct Peer {
    said: Vec<u8>,
    ready: bool,
    /// Who wants to know what it was to load.
    load: Option<Sender<Vec<u8>>>,
}

impl Peer {
    fn speak(&self, connection: &mut UnixStream) -> io::Result<()> {
        let load = read_frame(connection)?;
        if let Some(who) = &self.load {
            let _ = who.send(load);
        }
        if self.ready {
            let ready =
                json!({"ready": {"backend": "mock", "model": null, "details": null, "statistics": null}});
            connection.write_all(&frame(ready.to_string().as_bytes()))?;
            // The request.
            read_frame(connection)?;
        }
        connection.write_all(&self.said)
    }
}

impl Launch for Peer {
    fn launch(&mut self, connection: UnixStream) -> io::Result<Box<dyn Process>> {
        let peer = Self {
            said: std::mem::take(&mut self.said),
            ready: self.ready,
            load: self.load.take(),
        };
        let mut line = connection.try_clone()?;
        let thread = std::thread::spawn(move || {
            // The other half may hang up in the middle.
            let _ = peer.speak(&mut line);
            let _ = line.shutdown(Shutdown::Both);
        });
        Ok(Box::new(Spoken {
            connection,
            thread: Some(thread),
        }))
    }
}

struct Spoken {
    connection: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Process for Spoken {
    fn id(&self) -> Option<u32> {
        None
    }

    fn kill(&mut self) -> io::Result<()> {
        let _ = self.connection.shutdown(Shutdown::Both);
        Ok(())
    }

    fn wait(&mut self) -> io::Result<String> {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it does not panic");
        }
        Ok("it has said all".to_owned())
    }
}

async fn supervise(peer: Peer) -> Result<Supervised, EngineError> {
    let configuration = SupervisorConfiguration {
        max_restarts: 0,
        ..SupervisorConfiguration::default()
    };
    let progress = Box::new(|stage: LoadProgress| assert!((0.0..=1.0).contains(&stage.fraction())));
    Supervised::start(peer, Value::Null, configuration, Some(progress)).await
}

/// The program hears it: a request ends, and a call does.
async fn heard_by_the_program(said: Vec<u8>, ready: bool) {
    let Ok(engine) = supervise(Peer {
        said,
        ready,
        load: None,
    })
    .await
    else {
        return;
    };
    if let Ok(mut events) = engine
        .stream(Prompt::text("hello"), GenerateParams::default())
        .await
    {
        let mut last = None;
        while let Some(event) = events.next().await {
            last = Some(event);
        }
        assert!(
            matches!(last, Some(Err(_) | Ok(GenerationEvent::Finished(_)))),
            "a stream that ends says how: {last:?}"
        );
    }
    let _ = engine.call("name", Value::Null).await;
    engine.unload().await.expect("it ends");
}

/// Says the prompt back.
struct Echo;

impl LlmEngine for Echo {
    fn stream(
        &self,
        prompt: Prompt,
        params: GenerateParams,
    ) -> BoxFuture<'_, Result<EventStream, EngineError>> {
        Box::pin(async move {
            params.validate()?;
            let text = format!("{prompt:?}");
            let events = [
                GenerationEvent::Started {
                    prompt_tokens: 1,
                    cached_tokens: 0,
                },
                GenerationEvent::Text {
                    text,
                    tokens: vec![1.into()],
                },
                GenerationEvent::Finished(GenerateSummary {
                    model: "echo".to_owned(),
                    backend: Backend::Mock,
                    device: Device::Cpu,
                    finish_reason: FinishReason::Stop,
                    usage: Usage::default(),
                    timings: Timings::default(),
                    peak_memory_bytes: 0,
                    speculation: None,
                }),
            ];
            Ok(stream::iter(events.map(Ok)).boxed())
        })
    }

    fn backend(&self) -> Option<Backend> {
        Some(Backend::Mock)
    }

    fn model(&self) -> Option<Arc<ModelConfiguration>> {
        None
    }

    fn unload(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async { Ok(()) })
    }
}

impl Service for Echo {
    fn call(&self, method: String, argument: Value) -> BoxFuture<'_, Result<Value, EngineError>> {
        Box::pin(async move { Ok(json!([method, argument])) })
    }
}

/// The engine's process hears it: it ends, and what it says until then can be read.
async fn heard_by_the_process(said: Vec<u8>, ready: bool, whole: bool) {
    let (mut ours, theirs) = UnixStream::pair().expect("a connection");
    let program = std::thread::spawn(move || -> io::Result<()> {
        if ready {
            ours.write_all(&LOAD)?;
            // That it is ready: what comes before is not heard.
            read_frame(&mut ours)?;
        }
        ours.write_all(&said)?;
        // Where all frames are whole, a last one tells that those before it were heard.
        if ready && whole {
            let last = json!({"call": {"id": LAST, "method": "last", "argument": null}});
            ours.write_all(&frame(last.to_string().as_bytes()))?;
        } else {
            ours.shutdown(Shutdown::Write)?;
        }
        loop {
            let said = read_frame(&mut ours)?;
            let said: Value = serde_json::from_slice(&said[4..]).expect("it can be read");
            if said["answer"]["id"] == LAST {
                return ours.shutdown(Shutdown::Write);
            }
        }
    });
    // Whatever it says, it ends.
    let _ = serve(theirs, |_, _| async { Ok(Echo) }).await;
    // It hangs up at what it cannot read.
    let _ = program.join().expect("it does not panic");
}

fuzz_target!(|input: (u8, &[u8])| {
    let (kind, said) = input;
    let whole = kind & LINES != 0;
    let bytes = if whole {
        said.split(|byte| *byte == b'\n').flat_map(frame).collect()
    } else {
        said.to_vec()
    };
    let ready = kind & READY != 0;
    if kind & TO_PROGRAM != 0 {
        RUNTIME.block_on(heard_by_the_program(bytes, ready));
        return;
    }
    // Another request of the number of our own would have its answer.
    let number = LAST.to_string();
    if said.windows(number.len()).any(|part| part == number.as_bytes()) {
        return;
    }
    LazyLock::force(&LOAD);
    RUNTIME.block_on(heard_by_the_process(bytes, ready, whole));
});
