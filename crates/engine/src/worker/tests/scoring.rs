//! Texts that are scored: they hold a place and take memory as requests do. The mock has no probabilities, and says so when a
//! text comes to its turn.

use tokio::sync::oneshot;

use super::*;
use crate::engine::Score;

type Reply = oneshot::Receiver<Result<Score, EngineError>>;

impl Bench {
    fn score(&mut self, text: &str) -> Reply {
        let (reply, scored) = oneshot::channel();
        let tokens = text.bytes().map(u32::from).collect();
        self.worker.accept(Command::Score { tokens, reply });
        scored
    }

    fn counts(&self) -> (u64, u64) {
        let statistics = self.worker.gauges.read(self.clock.now());
        (statistics.queued, statistics.running)
    }
}

/// What a text hears, which has to be there.
#[track_caller]
fn refusal(reply: &mut Reply) -> EngineError {
    let heard = reply.try_recv().expect("it was answered");
    heard.expect_err("the mock scores nothing")
}

#[track_caller]
fn came_to_its_turn(reply: &mut Reply) {
    let error = refusal(reply);
    assert!(matches!(error, EngineError::Unsupported { .. }), "{error}");
}

fn one_place() -> EngineConfig {
    EngineConfig {
        max_batch: 1,
        max_queue: 1,
        ..config()
    }
}

#[test]
fn a_text_waits_for_a_place_and_one_too_many_is_refused_with_a_hint() {
    let mut bench = Bench::new(MockScript::default(), &one_place());
    let request = bench.submit("a request", params(5)).unwrap();
    bench.turn();
    let mut waits = bench.score("a text");
    assert_eq!(bench.counts(), (1, 1));
    let refused = refusal(&mut bench.score("another"));
    assert!(
        matches!(refused, EngineError::QueueFull { retry_after } if !retry_after.is_zero()),
        "{refused}"
    );
    assert!(bench.submit("no request either", params(5)).is_err());
    bench.finish_one(request);
    assert!(waits.try_recv().is_err(), "it has not come to its turn");
    bench.turn();
    came_to_its_turn(&mut waits);
    assert!(bench.worker.is_idle() && bench.worker.scheduler.reserved() == 0);
    assert_eq!(bench.counts(), (0, 0));
}

#[test]
fn who_has_gone_holds_no_place() {
    let mut bench = Bench::new(MockScript::default(), &one_place());
    bench.submit("a request", params(5)).unwrap();
    bench.turn();
    drop(bench.score("a text"));
    let mut next = bench.score("another");
    bench.finish();
    came_to_its_turn(&mut next);
}

#[test]
fn memory_is_asked_for_before_a_text_is_computed() {
    let config = EngineConfig {
        memory_limit: Some(1000),
        ..config()
    };
    let script = MockScript::default().with_bytes_per_token(10);
    let mut bench = Bench::new(script, &config);
    // A hundred tokens fit, and it may come to have ninety.
    let request = bench.submit("0123456789", params(80)).unwrap();
    bench.turn();
    let refused = refusal(&mut bench.score(&"x".repeat(101)));
    assert!(
        matches!(
            refused,
            EngineError::InsufficientMemory {
                required: 1010,
                available: 1000
            }
        ),
        "{refused}"
    );
    let mut waits = bench.score("as many as this");
    let mut fits = bench.score("short");
    bench.turn();
    assert!(
        waits.try_recv().is_err() && fits.try_recv().is_err(),
        "one that fits does not overtake"
    );
    bench.finish_one(request);
    bench.turn();
    came_to_its_turn(&mut waits);
    came_to_its_turn(&mut fits);
}

#[test]
fn what_ends_all_that_runs_ends_texts_too() {
    let mut bench = Bench::new(MockScript::default(), &one_place());
    bench.submit("a request", params(5)).unwrap();
    bench.turn();
    let mut waits = bench.score("a text");
    bench.worker.end_running(&EngineError::OutOfMemory);
    assert!(waits.try_recv().is_err(), "it does not run");
    bench.worker.fail_all(&EngineError::Cancelled);
    assert!(matches!(refusal(&mut waits), EngineError::Cancelled));
    assert!(bench.worker.is_idle());
}
