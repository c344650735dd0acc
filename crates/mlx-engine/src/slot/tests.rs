//! A load in place of an engine that cannot be unloaded.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;

use mlx_engine_resilience::{ChildState, Launch, Process, Supervised, SupervisorConfiguration};
use serde_json::Value;

use super::*;
use crate::BackendChoice;

/// Starts one process, which says that it is ready, and panics over the next.
struct Once(bool);

/// What has said all that it says. Its connection ends when it is killed.
struct Silent(Option<UnixStream>);

impl Launch for Once {
    fn launch(&mut self, mut connection: UnixStream) -> io::Result<Box<dyn Process>> {
        assert!(!std::mem::replace(&mut self.0, true), "told to panic");
        let ready = br#"{"ready":{"backend":"mock","model":null,"details":null,"statistics":null}}"#;
        connection.write_all(&(ready.len() as u32).to_le_bytes())?;
        connection.write_all(ready)?;
        Ok(Box::new(Silent(Some(connection))))
    }
}

impl Process for Silent {
    fn id(&self) -> Option<u32> {
        None
    }

    fn kill(&mut self) -> io::Result<()> {
        self.0 = None;
        Ok(())
    }

    fn wait(&mut self) -> io::Result<String> {
        Ok("killed".to_owned())
    }
}

/// An engine whose supervisor has panicked, which its unloading tells.
async fn broken() -> Served {
    let configuration = SupervisorConfiguration::default();
    let engine = Supervised::start(Once(false), Value::Null, configuration, None).await;
    let engine = engine.expect("it is ready");
    engine.abandon();
    while engine.status().state != ChildState::Unloaded {
        tokio::task::yield_now().await;
    }
    Served::from(engine)
}

#[tokio::test]
async fn an_engine_that_cannot_be_unloaded_is_in_nobodys_way() {
    let error = broken().await.unload().await.unwrap_err();
    assert!(matches!(error, EngineError::Internal { .. }), "{error}");

    let slot = Slot::default();
    *slot.state() = State::Loaded {
        engine: broken().await,
        fallback_reason: None,
    };
    let settings = Settings {
        choice: BackendChoice::Mock,
        ..Settings::default()
    };
    let loaded = slot.load("tiny", &settings, None).await.unwrap();
    assert_eq!(loaded.id, "tiny");
    let output = slot
        .generate(Prompt::text("Hi"), GenerateParams::default())
        .await
        .unwrap();
    assert_eq!(
        (output.text.as_str(), slot.backend()),
        ("Hi", Some(Backend::Mock))
    );
    slot.unload().await.unwrap();
}
