//! Where limits end, and what is forgotten when one leaves.

use super::*;

/// As [`limits`], for as many as come.
fn many() -> Limits {
    Limits {
        max_batch: 9,
        max_queue: 9,
        ..limits()
    }
}

#[test]
fn who_waits_and_who_runs_is_something_to_do() {
    let mut script = Script::new(limits());
    assert!(script.scheduler.is_idle());
    script.submit(script.ask(1, 0));
    assert!(!script.scheduler.is_idle(), "one waits");
    script.admitted();
    assert!(!script.scheduler.is_idle(), "it runs");
    script.submit(script.ask(2, 0));
    script.scheduler.cancel(1);
    assert!(!script.scheduler.is_idle(), "another waits");
    script.scheduler.cancel(2);
    assert!(script.scheduler.is_idle());
}

#[test]
fn memory_is_used_to_the_last_byte_and_no_further() {
    let mut script = Script::new(Limits {
        available: Some(200),
        ..many()
    });
    let with = |script: &Script, id, bytes| Ask {
        bytes,
        ..script.ask(id, 0)
    };
    let whole = with(&script, 1, 200);
    script.submit(whole);
    assert_eq!(script.admitted(), [1], "it takes all there is");
    script.scheduler.cancel(1);
    for (id, bytes) in [(2, 100), (3, 100), (4, 1)] {
        let ask = with(&script, id, bytes);
        script.submit(ask);
    }
    assert_eq!(script.admitted(), [2, 3]);
    assert_eq!(script.scheduler.reserved(), 200);
    // What something else takes is nobody's here, and what it gives back is.
    script.scheduler.finish(2);
    script.scheduler.set_taken(100);
    assert!(script.admitted().is_empty());
    script.scheduler.set_taken(99);
    assert_eq!(script.admitted(), [4]);
    // More may be taken than there was.
    script.scheduler.cancel_running();
    script.scheduler.set_taken(1000);
    let refused = script.scheduler.submit(with(&script, 5, 1));
    let (required, available) = (1, 0);
    assert_eq!(refused, Err(Refusal::TooLarge { required, available }));
}

#[test]
fn one_that_waits_and_would_just_fit_alone_waits_on() {
    let mut script = Script::new(many());
    for id in 1..3 {
        script.submit(script.ask(id, 0));
    }
    script.scheduler.set_available(Some(100));
    assert_eq!(script.admitted(), [1], "both have a hundred bytes");
    script.scheduler.set_available(Some(99));
    let refused = Admission::TooLarge {
        id: 2,
        required: 100,
        available: 99,
    };
    assert_eq!(script.scheduler.admit(), Some(refused));
    script.scheduler.set_available(None);
    script.submit(Ask {
        bytes: u64::MAX,
        ..script.ask(3, 0)
    });
    assert_eq!(script.admitted(), [3], "nobody counts");
    assert_eq!(script.scheduler.reserved(), u64::MAX);
}

#[test]
fn other_limits_hold_from_now_on() {
    let mut script = Script::new(limits());
    for id in 0..4 {
        script.submit(script.ask(id, 0));
    }
    assert_eq!(script.admitted(), [0, 1]);
    script.scheduler.set_limits(many());
    assert_eq!(script.admitted(), [2, 3]);
    let most = many().max_batch + many().max_queue;
    for id in 4..most as Id {
        script.submit(script.ask(id, 0));
    }
    assert!(script.scheduler.submit(script.ask(99, 0)).is_err());
    assert_eq!(script.admitted(), [4, 5, 6, 7, 8]);
    // What runs beyond them goes on.
    script.scheduler.set_limits(limits());
    assert_eq!(script.scheduler.running.len(), 9);
    assert!(script.admitted().is_empty());
    script.scheduler.cancel_running();
    assert_eq!(
        (script.scheduler.reserved(), script.scheduler.running.len()),
        (0, 0)
    );
    assert_eq!(script.admitted(), [9, 10]);
}

#[test]
fn a_turn_has_as_many_tokens_of_prompts_as_a_chunk_may_have() {
    let mut script = Script::new(many());
    for id in 1..4 {
        script.submit(script.ask(id, id));
    }
    script.admitted();
    let scheduler = &mut script.scheduler;
    scheduler.reused(1, 20);
    // Five of the first; the second has to be known for the other five, the third not.
    assert_eq!(scheduler.unknown(), Some(2));
    scheduler.reused(2, 20);
    assert_eq!(scheduler.unknown(), None);
    assert_eq!(scheduler.turn().chunks, [chunk(1, 20, 25), chunk(2, 20, 25)]);
    // One that was told is not asked for again, and one that nobody knows is not changed.
    scheduler.reused(77, 3);
    scheduler.wait_behind(77, 1, 3);
    scheduler.generated(77);
    scheduler.fed(Chunk {
        id: 77,
        ..chunk(1, 20, 25)
    });
    assert_eq!(scheduler.turn().chunks.len(), 2);
    assert!(scheduler.turn().decode.is_empty());
}

#[test]
fn who_waits_behind_another_is_let_go_when_that_has_been_fed_just_enough() {
    let mut script = Script::new(many());
    for id in 1..3 {
        script.submit(script.ask(id, id));
    }
    script.admitted();
    let scheduler = &mut script.scheduler;
    scheduler.reused(1, 0);
    scheduler.wait_behind(2, 1, 10);
    assert_eq!(scheduler.unknown(), None);
    scheduler.fed(chunk(1, 0, 9));
    assert_eq!(scheduler.unknown(), None, "one token is missing");
    assert_eq!(scheduler.turn().chunks, [chunk(1, 9, 19)], "it waits meanwhile");
    scheduler.fed(chunk(1, 9, 10));
    // Ten of the first take the whole chunk.
    assert_eq!(scheduler.unknown(), None);
    scheduler.fed(chunk(1, 10, 20));
    assert_eq!(scheduler.unknown(), Some(2));
    assert_eq!(scheduler.fed_before(2), [(1, 20)]);
    scheduler.fed(chunk(1, 20, 25));
    assert!(scheduler.fed_before(2).is_empty(), "an answer is not fed");
    assert_eq!(scheduler.unknown(), Some(2));
}

#[test]
fn a_place_is_free_when_the_first_of_those_that_run_has_ended() {
    let mut script = Script::new(limits());
    let full = |script: &mut Script| {
        let ask = script.ask(9, 0);
        match script.scheduler.submit(ask) {
            Err(Refusal::Full { retry_after }) => retry_after,
            other => panic!("{other:?}"),
        }
    };
    for id in 0..4 {
        script.submit(script.ask(id, 0));
    }
    // Nothing runs: a step is thought to take a tenth of a second.
    assert_eq!(full(&mut script), Duration::from_millis(100));
    assert_eq!(script.admitted(), [0, 1]);
    let scheduler = &mut script.scheduler;
    // A token of a prompt takes 20 ms, a step without any 100 ms.
    scheduler.took(Steps {
        prompt_tokens: 15,
        answers: 0,
        spent: Duration::from_millis(300),
    });
    scheduler.took(Steps {
        prompt_tokens: 0,
        answers: 2,
        spent: Duration::from_millis(100),
    });
    // 25 tokens and four of an answer; the other's prompt comes behind that.
    assert_eq!(full(&mut script), Duration::from_millis(500 + 400));
    script.scheduler.reused(0, 15);
    assert_eq!(
        full(&mut script),
        Duration::from_millis(200 + 400),
        "ten are left"
    );
    // The second has been fed: nothing is before it any more, and it has three to go.
    script.scheduler.fed(chunk(1, 0, 25));
    script.scheduler.generated(1);
    assert_eq!(full(&mut script), Duration::from_millis(300));
    script.scheduler.generated(1);
    assert_eq!(full(&mut script), Duration::from_millis(200));
    // One that is cancelled says nothing of how long answers are; one that ended does.
    script.scheduler.cancel(1);
    script.submit(script.ask(4, 0));
    assert_eq!(full(&mut script), Duration::from_millis(200 + 400));
    script.scheduler.fed(chunk(0, 15, 25));
    script.scheduler.generated(0);
    script.scheduler.finish(0);
    script.submit(script.ask(5, 0));
    assert_eq!(script.admitted(), [2, 3]);
    assert_eq!(
        full(&mut script),
        Duration::from_millis(500 + 100),
        "answers have one token"
    );
}
