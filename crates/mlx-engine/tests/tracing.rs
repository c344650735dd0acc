//! What a subscriber of `tracing` sees of requests and of health. One test, alone in its program: which spans are of interest is
//! global.

use std::fmt;
use std::sync::{Arc, Mutex};

use mlx_engine::MockScript;
use mlx_engine::prelude::*;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Names of spans, and messages of events.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    fn note(&self, text: String) {
        self.0.lock().expect("not poisoned").push(text);
    }

    fn has(&self, text: &str) -> bool {
        let seen = self.0.lock().expect("not poisoned");
        seen.iter().any(|one| one == text)
    }
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

impl Subscriber for Seen {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        self.note(span.metadata().name().to_owned());
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut message = Message(String::new());
        event.record(&mut message);
        self.note(message.0);
    }

    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn requests_are_spans_and_changes_of_health_events_where_the_feature_asks_for_them() {
    let seen = Seen::default();
    tracing::subscriber::with_default(seen.clone(), || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let engine = InferenceEngine::new()
                .with_backend(BackendChoice::Mock)
                .with_mock(MockScript::reply("Paris"));
            engine.load_model("tiny").await.expect("it loads");
            engine
                .generate("Where?", GenerateParams::default())
                .await
                .expect("an answer");
        });
    });
    let asked = cfg!(feature = "tracing");
    assert_eq!(seen.has("gen_ai.request"), asked);
    // From nothing to a mock that poses as a model.
    assert_eq!(seen.has("health changed"), asked);
}
