//! The decisions, one by one. What they add up to is tested over the mock.

mod edges;

use super::*;

fn limits() -> Limits {
    Limits {
        max_batch: 2,
        max_queue: 2,
        prefill_chunk: 10,
        available: None,
    }
}

/// A part of a prompt of 25 tokens.
fn chunk(id: Id, from: usize, to: usize) -> Chunk {
    let last = to == 25;
    Chunk { id, from, to, last }
}

struct Script {
    scheduler: Scheduler,
    start: Instant,
}

impl Script {
    fn new(limits: Limits) -> Self {
        Self {
            scheduler: Scheduler::new(limits),
            start: Instant::now(),
        }
    }

    fn ask(&self, id: Id, second: u64) -> Ask {
        Ask {
            id,
            prompt: 25,
            cuts: Vec::new(),
            work: Work::Answer(4),
            bytes: 100,
            priority: Priority::Normal,
            arrived: self.at(second),
            queue_limit: None,
            limit: None,
        }
    }

    fn at(&self, second: u64) -> Instant {
        self.start + Duration::from_secs(second)
    }

    fn submit(&mut self, ask: Ask) {
        self.scheduler.submit(ask).expect("there is room");
    }

    /// Admits what may run.
    fn admitted(&mut self) -> Vec<Id> {
        let admitted = std::iter::from_fn(|| self.scheduler.admit());
        let run = admitted.map(|admission| match admission {
            Admission::Run(id) => id,
            Admission::TooLarge { id, .. } => panic!("{id} was not taken"),
        });
        run.collect()
    }
}

#[test]
fn a_prompt_is_fed_in_chunks_while_answers_go_on() {
    let mut script = Script::new(limits());
    let scheduler = &mut script.scheduler;
    assert!(scheduler.is_idle() && scheduler.turn() == Turn::default());
    script.submit(script.ask(1, 0));
    script.submit(script.ask(2, 0));
    assert_eq!(script.admitted(), [1, 2]);
    let scheduler = &mut script.scheduler;
    assert_eq!(
        (scheduler.unknown(), scheduler.turn()),
        (Some(1), Turn::default())
    );
    scheduler.reused(1, 0);
    // The one that came first is fed first, all of it.
    for (from, to) in [(0, 10), (10, 20)] {
        assert_eq!(scheduler.unknown(), None, "there is no room for the other");
        let turn = scheduler.turn();
        assert_eq!((turn.chunks, turn.decode), (vec![chunk(1, from, to)], Vec::new()));
        scheduler.fed(chunk(1, from, to));
    }
    // Its rest leaves room for the beginning of the other.
    assert_eq!(scheduler.unknown(), Some(2));
    scheduler.reused(2, 0);
    assert_eq!(scheduler.turn().chunks, [chunk(1, 20, 25), chunk(2, 0, 5)]);
    scheduler.fed(chunk(1, 20, 25));
    scheduler.fed(chunk(2, 0, 5));
    // Then its answer goes on beside the other's prompt.
    let turn = scheduler.turn();
    assert_eq!((turn.chunks, turn.decode), (vec![chunk(2, 5, 15)], vec![1]));
    scheduler.reused(2, 25);
    let rest = chunk(2, 24, 25);
    assert_eq!(
        scheduler.turn().chunks,
        [rest],
        "the last token is fed in any case"
    );
    scheduler.fed(rest);
    assert_eq!(scheduler.turn().decode, [1, 2]);
    scheduler.finish(1);
    scheduler.cancel(2);
    assert!(scheduler.is_idle());
}

#[test]
fn the_queue_is_bounded_and_says_when_a_place_is_free() {
    let mut script = Script::new(limits());
    for id in 0..4 {
        script.submit(script.ask(id, 0));
    }
    assert_eq!(script.admitted(), [0, 1]);
    let scheduler = &mut script.scheduler;
    scheduler.fed(chunk(0, 0, 25));
    scheduler.took(Steps {
        prompt_tokens: 25,
        answers: 0,
        spent: Duration::from_millis(2500),
    });
    scheduler.generated(0);
    scheduler.took(Steps {
        prompt_tokens: 0,
        answers: 1,
        spent: Duration::from_millis(300),
    });
    // The first has three tokens to go; the second its prompt and four.
    let refused = script.scheduler.submit(script.ask(4, 0)).unwrap_err();
    assert_eq!(
        refused,
        Refusal::Full {
            retry_after: Duration::from_millis(900)
        }
    );
    script.scheduler.finish(0);
    script.submit(script.ask(5, 0));
    assert_eq!(
        (script.scheduler.waiting.len(), script.scheduler.running.len()),
        (3, 1)
    );
    let refused = script.scheduler.submit(script.ask(6, 0)).unwrap_err();
    // 25 tokens at a tenth of a second, and one token, as the answer before had.
    assert_eq!(
        refused,
        Refusal::Full {
            retry_after: Duration::from_millis(2800)
        }
    );
}

#[test]
fn priorities_decide_who_is_next_and_waiting_makes_up_for_them() {
    let mut script = Script::new(Limits {
        max_queue: 9,
        max_batch: 1,
        ..limits()
    });
    let with = |script: &Script, id, second, priority| Ask {
        priority,
        ..script.ask(id, second)
    };
    for (id, second, priority) in [
        (1, 0, Priority::Low),
        (2, 0, Priority::Normal),
        (3, 1, Priority::Normal),
        (4, 9, Priority::High),
        // Ten seconds later: the normal one that came first has waited long enough, the low one not.
        (5, 11, Priority::High),
        (6, 21, Priority::High),
    ] {
        let ask = with(&script, id, second, priority);
        script.submit(ask);
    }
    let mut order = Vec::new();
    while let [id] = script.admitted()[..] {
        order.push(id);
        script.scheduler.finish(id);
    }
    assert_eq!(order, [4, 2, 3, 5, 1, 6]);
}

#[test]
fn an_urgent_prompt_is_fed_before_one_that_has_begun() {
    let mut script = Script::new(limits());
    script.submit(script.ask(1, 0));
    script.submit(Ask {
        priority: Priority::High,
        ..script.ask(2, 1)
    });
    assert_eq!(script.admitted(), [2, 1]);
    assert_eq!(script.scheduler.unknown(), Some(2));
    script.scheduler.reused(2, 0);
    script.scheduler.reused(1, 0);
    assert_eq!(script.scheduler.turn().chunks, [chunk(2, 0, 10)]);
}

#[test]
fn memory_is_reserved_and_the_first_that_waits_is_not_passed_by() {
    let mut script = Script::new(Limits {
        available: Some(250),
        max_batch: 9,
        ..limits()
    });
    let with = |script: &Script, id, bytes| Ask {
        bytes,
        ..script.ask(id, 0)
    };
    let refused = script.scheduler.submit(with(&script, 0, 251)).unwrap_err();
    assert_eq!(
        refused,
        Refusal::TooLarge {
            required: 251,
            available: 250
        }
    );
    for (id, bytes) in [(1, 100), (2, 200), (3, 10)] {
        let ask = with(&script, id, bytes);
        script.submit(ask);
    }
    assert_eq!(script.admitted(), [1]);
    assert_eq!(script.scheduler.reserved(), 100);
    script.scheduler.cancel(1);
    script.scheduler.set_taken(60);
    let refused = Admission::TooLarge {
        id: 2,
        required: 200,
        available: 190,
    };
    assert_eq!(script.scheduler.admit(), Some(refused));
    assert_eq!(script.admitted(), [3]);
}

#[test]
fn time_is_over_where_the_request_said() {
    let mut script = Script::new(Limits {
        max_batch: 1,
        ..limits()
    });
    let (short, long) = (Duration::from_secs(5), Duration::from_secs(8));
    let limited = |script: &Script, id| Ask {
        queue_limit: Some(short),
        limit: Some(long),
        ..script.ask(id, 1)
    };
    script.submit(limited(&script, 1));
    script.submit(limited(&script, 2));
    assert_eq!(script.admitted(), [1]);
    script.scheduler.reused(1, 0);
    let [before, queue, total] = [5, 6, 9].map(|second| script.at(second));
    let scheduler = &mut script.scheduler;
    assert_eq!(scheduler.expire(before), None);
    assert_eq!(scheduler.expire(queue), Some((2, short)));
    assert_eq!(scheduler.expire(queue), None, "what runs is not in the queue");
    assert_eq!(scheduler.expire(total), Some((1, long)));
    assert!(scheduler.is_idle());
}

#[test]
fn a_chunk_ends_where_the_request_wants_it() {
    let mut script = Script::new(limits());
    script.submit(Ask {
        cuts: vec![4, 12],
        ..script.ask(1, 0)
    });
    script.admitted();
    script.scheduler.reused(1, 0);
    let mut ends = Vec::new();
    while let Some(&chunk) = script.scheduler.turn().chunks.first() {
        ends.push(chunk.to);
        script.scheduler.fed(chunk);
    }
    assert_eq!(ends, [4, 12, 22, 25]);
}

#[test]
fn short_prompts_are_fed_together() {
    let mut script = Script::new(Limits {
        max_batch: 9,
        max_queue: 9,
        prefill_chunk: 64,
        available: None,
    });
    for id in 0..4 {
        script.submit(script.ask(id, id));
    }
    script.admitted();
    // Of the third there is a part in the turn, and of the fourth nothing that would have to be known.
    let mut known = Vec::new();
    while let Some(id) = script.scheduler.unknown() {
        known.push(id);
        script.scheduler.reused(id, 0);
    }
    assert_eq!(known, [0, 1, 2]);
    let turn = script.scheduler.turn();
    assert_eq!(turn.chunks, [chunk(0, 0, 25), chunk(1, 0, 25), chunk(2, 0, 14)]);
}

#[test]
fn who_needs_what_another_computes_waits_for_it_and_for_no_more() {
    let mut script = Script::new(Limits {
        max_batch: 9,
        max_queue: 9,
        ..limits()
    });
    for id in 1..4 {
        script.submit(script.ask(id, id));
    }
    script.admitted();
    let scheduler = &mut script.scheduler;
    scheduler.reused(1, 5);
    assert_eq!(
        (scheduler.fed_before(1), scheduler.fed_before(2)),
        (vec![], vec![(1, 5)])
    );
    scheduler.wait_behind(2, 1, 22);
    assert_eq!(scheduler.turn().chunks, [chunk(1, 5, 15)]);
    scheduler.fed(chunk(1, 5, 15));
    // What is left of the chunk is the third's, which waits for nobody.
    scheduler.reused(1, 21);
    assert_eq!(scheduler.unknown(), Some(3));
    scheduler.reused(3, 0);
    assert_eq!(scheduler.turn().chunks, [chunk(1, 21, 25), chunk(3, 0, 6)]);
    scheduler.fed(chunk(1, 21, 25));
    assert_eq!(scheduler.unknown(), Some(2), "it is there now");
    // Who waits for one that ends waits no longer.
    scheduler.reused(2, 3);
    scheduler.wait_behind(3, 2, 20);
    assert_eq!(scheduler.unknown(), None);
    scheduler.cancel(2);
    assert_eq!(scheduler.unknown(), Some(3));
}

#[test]
fn texts_are_scored_in_parts_beside_prompts_and_answers() {
    let mut script = Script::new(Limits {
        max_batch: 3,
        prefill_chunk: 200,
        ..limits()
    });
    let text = Ask {
        prompt: 300,
        work: Work::Score,
        ..script.ask(1, 0)
    };
    script.submit(text);
    script.submit(script.ask(2, 0));
    assert_eq!(script.admitted(), [1, 2]);
    let scheduler = &mut script.scheduler;
    assert_eq!(scheduler.reserved(), 200);
    assert_eq!(scheduler.unknown(), Some(2), "nothing is looked up for a text");
    scheduler.reused(2, 0);
    let part = |from, to| Chunk {
        id: 1,
        from,
        to,
        last: to == 300,
    };
    let turn = scheduler.turn();
    assert_eq!(
        (turn.scored, turn.chunks),
        (vec![part(0, 128)], vec![chunk(2, 0, 25)])
    );
    scheduler.scored(part(0, 128));
    scheduler.fed(chunk(2, 0, 25));
    let turn = scheduler.turn();
    assert_eq!((turn.scored, turn.decode), (vec![part(128, 256)], vec![2]));
    // What a prompt that came before it takes is not there for it.
    let urgent = Ask {
        prompt: 180,
        priority: Priority::High,
        ..script.ask(3, 0)
    };
    script.submit(urgent);
    assert_eq!(script.admitted(), [3]);
    let scheduler = &mut script.scheduler;
    scheduler.reused(3, 0);
    let turn = scheduler.turn();
    assert_eq!(turn.scored, [part(128, 148)]);
    scheduler.scored(part(128, 300));
    scheduler.cancel(2);
    scheduler.cancel(3);
    assert!(scheduler.is_idle(), "the last part ends it");
}
