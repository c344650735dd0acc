//! Guesses: what is counted of them, and when there are none.

use mlx_engine_core::SpeculationOff;

use super::*;
use crate::speculation::look_up;

fn guessing(lookup: &LookupConfig) -> EngineConfig {
    EngineConfig {
        speculation: SpeculationConfig::Lookup(lookup.clone()),
        ..config()
    }
}

/// What is guessed and what of it is right when the answer is known, as steps verify it: drafted and accepted tokens, and
/// steps that were fed guesses.
fn counted(prompt: &[u32], answer: &[u32], max_tokens: usize, lookup: &LookupConfig) -> (u32, u32, u32) {
    let (mut known, mut fed) = (prompt.to_vec(), Vec::new());
    let mut left = answer.iter();
    let (mut drafted, mut accepted, mut steps) = (0, 0, 0);
    // Before a step without guesses the next was begun where nothing was to be guessed.
    let mut ahead = false;
    // Few are guessed until some were right: two, and two more for each that was, those before counting less each time.
    let mut right = 0.0;
    loop {
        let most = |known: &Vec<u32>, right: f64| {
            lookup
                .max_tokens
                .min((max_tokens + prompt.len()).saturating_sub(known.len() + 1))
                .min(2 + (2.0 * right) as usize)
        };
        if fed.is_empty() {
            ahead = look_up(&known, lookup, most(&known, right)).is_empty();
        }
        let (guessed, before) = (!fed.is_empty(), accepted);
        for guess in std::mem::take(&mut fed).into_iter().map(Some).chain([None]) {
            let Some(&token) = left.next() else {
                return (drafted, accepted, steps);
            };
            known.push(token);
            if guess != Some(token) {
                break;
            }
            accepted += 1;
        }
        if guessed {
            right = 0.9 * right + f64::from(accepted - before);
        }
        if left.as_slice().is_empty() {
            return (drafted, accepted, steps);
        }
        if !std::mem::take(&mut ahead) {
            fed = look_up(&known, lookup, most(&known, right));
            drafted += fed.len() as u32;
            steps += u32::from(!fed.is_empty());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_is_counted_is_what_a_count_of_the_known_answer_gives(
        prompt in "[ab]{0,3}[a-c]{1,40}",
        reply in prop::option::of("[a-c]{0,40}"),
        max_tokens in 1_u32..50,
        lookup in lookup(),
    ) {
        let script = reply.clone().map_or_else(MockScript::default, MockScript::reply);
        let mut bench = Bench::new(script, &guessing(&lookup));
        // A plain step is known to take no time, and so does any.
        bench.worker.speculation.costs.note(1, 0.0);
        bench.submit(&prompt, params(max_tokens)).unwrap();
        bench.finish();
        let sent = &bench.requests[0];
        let expected = reply.unwrap_or_else(|| prompt.clone());
        prop_assert!(expected.starts_with(&sent.text));
        prop_assert_eq!(sent.text.len(), expected.len().min(max_tokens as usize));
        let ids = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
        let answer: Vec<u32> = ids(&expected).into_iter().chain([256]).take(max_tokens as usize).collect();
        let report = sent.speculation.unwrap();
        let (drafted, accepted, steps) = counted(&ids(&prompt), &answer, max_tokens as usize, &lookup);
        prop_assert_eq!(
            report,
            SpeculationReport {
                steps,
                drafted_tokens: drafted,
                accepted_tokens: accepted,
                paused_steps: 0,
                off: None,
            }
        );
        let statistics = bench.worker.gauges.read(bench.clock.now());
        prop_assert_eq!(
            (statistics.drafted_tokens, statistics.accepted_tokens),
            (drafted.into(), accepted.into())
        );
        prop_assert_eq!(statistics.generated_tokens, answer.len() as u64);
    }
}

/// A device that runs a step when it is fed is measured as one that does not.
#[test]
fn steps_that_run_when_they_are_fed_are_measured_too() {
    // Nothing is gained: a token costs a whole step.
    let prompt = "to be or not to be that is the question ".repeat(6);
    let guessed = |eager| {
        let mut bench = Bench::new(
            MockScript::reply(prompt.clone()),
            &guessing(&LookupConfig::default()),
        )
        .with_pace((0, 10));
        if let Some(pace) = &mut bench.worker.model.pace {
            pace.eager = eager;
        }
        bench.submit(&prompt, params(200)).unwrap();
        bench.finish();
        bench.requests[0].speculation.unwrap()
    };
    let report = guessed(true);
    assert!(
        report.paused_steps > 100 && report.steps < 10,
        "{report:?} {:?}",
        guessed(false)
    );
}

/// An answer that repeats the prompt takes fewer turns where a token more costs little, and as many where it costs a step.
#[test]
fn guesses_are_made_where_they_pay() {
    let prompt = "to be or not to be that is the question ".repeat(6);
    let turns = |config: &EngineConfig, pace| {
        let mut bench = Bench::new(MockScript::reply(prompt.clone()), config).with_pace(pace);
        bench.submit(&prompt, params(200)).unwrap();
        let mut turns = 0;
        while !bench.worker.is_idle() {
            bench.turn();
            turns += 1;
        }
        assert_eq!(bench.requests[0].text, prompt[..200]);
        (
            turns,
            bench.clock.milliseconds.load(Ordering::Relaxed),
            bench.requests[0].speculation,
        )
    };
    let plain = turns(&config(), (10, 1));
    assert_eq!(plain.2, None);
    let guessed = turns(&guessing(&LookupConfig::default()), (10, 1));
    assert!(
        guessed.0 * 4 < plain.0 && guessed.1 * 3 < plain.1,
        "{plain:?} {guessed:?}"
    );
    assert!(guessed.2.unwrap().acceptance().unwrap() > 0.8, "{guessed:?}");
    // All the time is that of tokens: nothing can be gained, and little is lost in finding that out.
    let (plain, guessed) = (
        turns(&config(), (0, 10)),
        turns(&guessing(&LookupConfig::default()), (0, 10)),
    );
    let report = guessed.2.unwrap();
    assert!(report.paused_steps > 100, "{report:?}");
    assert!(guessed.1 * 1000 < plain.1 * 1025, "{plain:?} {guessed:?}");
}

/// Milliseconds that steps take until a request is answered.
fn milliseconds_of_steps(bench: &mut Bench, prompt: &str, max_tokens: u32) -> u64 {
    bench.submit(prompt, params(max_tokens)).unwrap();
    let mut between = 0;
    while !bench.worker.is_idle() {
        bench.turn();
        between += 1;
    }
    bench.clock.milliseconds.load(Ordering::Relaxed) - between
}

/// An answer, and what guesses for it and its steps take.
#[derive(Clone, Debug)]
struct Guessed {
    /// New letters, and how many of the prompt follow them.
    parts: Vec<(String, usize)>,
    /// Milliseconds of a step and of each token in it.
    pace: (u64, u64),
    /// Milliseconds of a step of the draft model, and what it says before it says the answer.
    drafted: Option<(u64, String)>,
    eager: bool,
    min_ngram: usize,
}

impl Guessed {
    /// What the answer takes at least, with guesses, and at most.
    fn takes(&self) -> (f64, f64, f64) {
        let prompt = "to be or not to be that is the question whether it is nobler ".to_owned();
        let mut reply = String::new();
        for (new, copied) in &self.parts {
            reply.push_str(new);
            reply.push_str(&prompt[..*copied]);
        }
        let take = |speculation| {
            let config = EngineConfig {
                speculation,
                ..config()
            };
            let said = |new: &str| format!("{reply}{new}").split_off(new.len());
            let draft = self
                .drafted
                .as_ref()
                .map_or_else(String::new, |(_, wrong)| said(wrong));
            let script = MockScript::reply(reply.clone()).with_draft(MockScript::reply(draft));
            let mut bench = Bench::new(script, &config).with_pace(self.pace);
            if let Some(pace) = &mut bench.worker.model.pace {
                pace.eager = self.eager;
            }
            if let (Some((step, _)), false) = (&self.drafted, config.speculation.is_off()) {
                let clock = Arc::clone(&bench.clock.milliseconds);
                let pace = Pace {
                    clock,
                    step: *step,
                    token: 0,
                    eager: true,
                    steps: Vec::new(),
                    run: 0,
                };
                bench.worker.speculation.draft_mut().pace = Some(pace);
            }
            let spent = milliseconds_of_steps(&mut bench, &prompt, 600);
            assert_eq!(bench.requests[0].text, reply);
            spent as f64
        };
        let plain = take(SpeculationConfig::Off);
        let (guessed, first) = match &self.drafted {
            None => {
                let lookup = LookupConfig {
                    min_ngram: self.min_ngram,
                    ..LookupConfig::default()
                };
                (take(SpeculationConfig::Lookup(lookup)), 0)
            }
            // Its reading of the prompt, and a step of guesses.
            Some((step, _)) => (
                take(SpeculationConfig::Draft(DraftConfig::new("draft"))),
                12 * step,
            ),
        };
        let (step, token) = self.pace;
        (plain, guessed, plain * 1.01 + (step + token + first) as f64 + 1.0)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// However often guesses are right and whatever they cost, an answer takes no longer than without but by a hundredth and a
    /// step, and what it takes to find out how long the draft model takes.
    #[test]
    fn guesses_cost_an_answer_next_to_nothing(
        parts in prop::collection::vec(("[a-j]{1,40}", 0_usize..50), 1..8),
        pace in (0_u64..40, 1_u64..40),
        drafted in prop::option::of((0_u64..20, "[a-j]{0,60}")),
        eager in any::<bool>(),
        min_ngram in 1_usize..3,
    ) {
        let (plain, guessed, most) = Guessed { parts, pace, drafted, eager, min_ngram }.takes();
        prop_assert!(guessed <= most, "{guessed} {plain}");
    }
}

/// What a draft model has missed in a pause costs the answer too.
#[test]
fn catching_up_is_accounted_for() {
    let part = |new: &str, copied| (new.to_owned(), copied);
    let answer = Guessed {
        parts: vec![
            part("aaaaa", 14),
            part("aaaaaaacaaaaaaaaaaaa", 4),
            part("aaa", 38),
            part("ccaaaaaaaaaaaaaaaaaaaaaaaafaaaaac", 19),
            part("aa", 33),
        ],
        pace: (16, 1),
        drafted: Some((1, "abbaaacaaaaaaaaaaaaaaaaaaaaaaaaaaaaa".to_owned())),
        eager: false,
        min_ngram: 1,
    };
    let (plain, guessed, most) = answer.takes();
    assert!(guessed <= most, "{guessed} {plain}");
}

/// Letters of which one of ten at random follows the last that went alike.
fn letters(count: usize) -> String {
    let mut random = 7_u64;
    std::iter::repeat_with(|| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        char::from(b'a' + (random >> 33) as u8 % 10)
    })
    .take(count)
    .collect()
}

/// Guesses that are always wrong are given up, and tried again now and then.
#[test]
fn wrong_guesses_are_paused() {
    let reply = letters(600);
    let lookup = LookupConfig {
        min_ngram: 1,
        ..LookupConfig::default()
    };
    let mut bench = Bench::new(MockScript::reply(reply.clone()), &guessing(&lookup)).with_pace((10, 4));
    bench.submit("abcdefghij", params(600)).unwrap();
    bench.finish();
    assert_eq!(bench.requests[0].text, reply);
    let report = bench.requests[0].speculation.unwrap();
    assert!(report.paused_steps > 10 * report.steps, "{report:?}");
    assert!(report.steps >= 2, "{report:?}");
}

/// A request whose guesses are paused costs what it costs without: no step is fed more than its token, and the draft model
/// is fed nothing.
#[test]
fn a_pause_does_no_work() {
    let answer = letters(600);
    for draft in [false, true] {
        let config = EngineConfig {
            speculation: if draft {
                SpeculationConfig::Draft(DraftConfig::new("draft"))
            } else {
                SpeculationConfig::Lookup(LookupConfig {
                    min_ngram: 1,
                    ..LookupConfig::default()
                })
            },
            ..config()
        };
        // What is guessed is hardly ever right.
        let script = MockScript::reply(answer.clone()).with_draft(MockScript::reply("0".repeat(600)));
        let mut bench = Bench::new(script, &config).with_pace((10, 4));
        bench.submit("abcdefghij", params(500)).unwrap();
        let drafts = |bench: &Bench| {
            bench
                .worker
                .speculation
                .draft()
                .map_or(0, |draft| draft.fed.len())
        };
        let (mut paused, mut last) = (0, 0);
        while !bench.worker.is_idle() {
            let before = (bench.worker.model.fed.len(), drafts(&bench));
            bench.turn();
            let report = bench
                .worker
                .active
                .first()
                .map(|active| active.guesses.report)
                .or(bench.requests[0].speculation)
                .unwrap();
            if report.paused_steps > last {
                let fed = &bench.worker.model.fed[before.0..];
                assert!(fed.iter().all(|step| *step == [1]), "{fed:?}");
                assert_eq!(drafts(&bench), before.1);
                paused += 1;
            }
            last = report.paused_steps;
        }
        assert_eq!(bench.requests[0].text, answer[..500]);
        let rows: usize = bench.worker.model.fed.iter().flatten().sum();
        // Few tokens are fed that are wrong, of all that are fed.
        assert!(paused > 440 && rows < 560, "{paused} {rows}");
        // What it guessed before a pause is no part of what the draft model reads behind it.
        assert_eq!(bench.requests[0].speculation.unwrap().off, None);
    }
}

/// What the draft model has read of a conversation it does not read again, and requests that run together are guessed for in
/// the same steps.
#[test]
fn a_draft_model_keeps_what_it_read_and_guesses_for_all_at_once() {
    let config = EngineConfig {
        speculation: SpeculationConfig::Draft(DraftConfig::new("draft")),
        ..EngineConfig::default()
    };
    let reply = "abcdefghijklmnopqrstuvwxyz";
    let script = MockScript::reply(reply).with_batch_limit(16);
    let mut bench = Bench::new(script.clone().with_draft(script), &config);
    (1..9).for_each(|rows| bench.worker.speculation.costs.note(rows, 0.0));
    let fed = |bench: &mut Bench| std::mem::take(&mut bench.worker.speculation.draft_mut().fed);
    let prompt = "a long prompt that nobody reads twice ".repeat(4);
    bench.submit(&prompt, params(30)).unwrap();
    bench.finish();
    let first = fed(&mut bench);
    assert!(first[0][0] > prompt.len(), "{first:?}");
    bench.submit(&format!("{prompt}and more"), params(30)).unwrap();
    bench.finish();
    let second = fed(&mut bench);
    assert!(second.iter().flatten().all(|&rows| rows < 16), "{second:?}");
    for index in 0..3 {
        bench.submit(&format!("{index} of three"), params(30)).unwrap();
    }
    bench.finish();
    let together = fed(&mut bench);
    assert!(
        together.iter().filter(|step| step.len() == 3).count() >= 4,
        "{together:?}"
    );
    assert!(together.iter().all(|step| step.len() >= 2), "{together:?}");
    assert!(bench.requests.iter().all(|sent| sent.text == reply));
}

#[test]
fn what_cannot_be_taken_back_is_not_guessed() {
    let script = MockScript::default().with_whole_sequences();
    let mut bench = Bench::new(script, &guessing(&LookupConfig::default()));
    bench.submit("abababababab", params(30)).unwrap();
    bench.finish();
    let report = bench.requests[0].speculation.unwrap();
    let expected = SpeculationReport {
        off: Some(SpeculationOff::Uncuttable),
        ..SpeculationReport::default()
    };
    assert_eq!(
        (report, bench.requests[0].text.as_str()),
        (expected, "abababababab")
    );
}

/// What a draft model guesses is counted as it is, and a draft model that fails costs no answer.
#[test]
fn a_draft_model_guesses() {
    let config = EngineConfig {
        speculation: SpeculationConfig::Draft(DraftConfig::new("draft")),
        ..config()
    };
    let run = |draft: MockScript| {
        let script = MockScript::reply("abcdefghijklmnopqrstuvwxyz").with_draft(draft);
        let mut bench = Bench::new(script, &config);
        // A plain step is known to take no time, and so does any.
        bench.worker.speculation.costs.note(1, 0.0);
        bench
            .submit("a prompt that is longer than a chunk", params(40))
            .unwrap();
        bench.finish();
        assert_eq!(bench.requests[0].text, "abcdefghijklmnopqrstuvwxyz");
        bench.worker.prefixes.clear();
        assert_eq!(bench.worker.speculation.draft().unwrap().alive(), 0);
        bench.requests[0].speculation.unwrap()
    };
    // The draft model has two chunks and a rest of the prompt to read before it guesses the first; 27 tokens with the end, of
    // which each step gives four right guesses and one more.
    let right = run(MockScript::reply("abcdefghijklmnopqrstuvwxyz"));
    // Guesses behind the end are not read.
    assert!(right.accepted_tokens + 3 >= right.drafted_tokens, "{right:?}");
    assert!((4..=6).contains(&right.steps), "{right:?}");
    let wrong = run(MockScript::reply("0".repeat(60)));
    assert_eq!((wrong.accepted_tokens, wrong.off), (0, None), "{wrong:?}");
    let fails = run(MockScript::reply("abcdefghijklmnopqrstuvwxyz").with_fault(14, MockFault::Panic));
    assert_eq!(fails.off, Some(SpeculationOff::DraftFailed), "{fails:?}");
    assert!(fails.accepted_tokens > 0, "{fails:?}");
}
