//! The worker over the mock, one turn after the other, at times that the test decides.

#[cfg(feature = "mlx")]
mod distribution;
mod reading;
mod scoring;
mod speculation;

use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use mlx_engine_core::{
    FinishReason, GenerateParams, GenerationEvent, Priority, SpeculationReport, TokenInfo,
};
use proptest::prelude::*;

use super::*;
use crate::config::PrefixCacheConfig;
use crate::gauges::Gauges;
use crate::mock::{MockFault, MockModel, MockScript, Pace};
use crate::speculation::{DraftConfig, LookupConfig, SpeculationConfig};

/// A clock that a test moves.
#[derive(Clone)]
struct ManualClock {
    start: Instant,
    milliseconds: Arc<AtomicU64>,
}

impl ManualClock {
    fn advance(&self, milliseconds: u64) {
        self.milliseconds.fetch_add(milliseconds, Ordering::Relaxed);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.milliseconds.load(Ordering::Relaxed))
    }
}

type Events = mpsc::UnboundedReceiver<Result<GenerationEvent, EngineError>>;

/// A worker, and what its requests have got so far.
struct Bench<M: TokenModel = MockModel> {
    worker: Worker<M, ManualClock>,
    clock: ManualClock,
    requests: Vec<Sent>,
}

/// A request, and what came back.
struct Sent {
    prompt: String,
    params: GenerateParams,
    at: Instant,
    events: Option<Events>,
    text: String,
    tokens: Vec<TokenInfo>,
    /// Once its prompt was begun.
    cached: Option<u32>,
    /// What its summary says of guesses.
    speculation: Option<SpeculationReport>,
    /// How it ended, and when.
    ends: Vec<(Result<FinishReason, EngineError>, Instant)>,
    refused: bool,
}

impl Bench {
    fn new(script: MockScript, config: &EngineConfig) -> Self {
        let drafts = matches!(config.speculation, SpeculationConfig::Draft(_));
        let draft = drafts.then(|| script.draft().load().expect("the mock loads"));
        Self::of((script.load().expect("the mock loads"), draft), config)
    }

    /// Has steps take so many milliseconds, and so many for each of their tokens.
    fn with_pace(mut self, (step, token): (u64, u64)) -> Self {
        let clock = Arc::clone(&self.clock.milliseconds);
        self.worker.model.pace = Some(Pace {
            clock,
            step,
            token,
            eager: false,
            steps: Vec::new(),
            run: 0,
        });
        self
    }
}

impl<M: TokenModel> Bench<M> {
    /// Tokens are the mock's, bytes and an end.
    fn of(models: (M, Option<M>), config: &EngineConfig) -> Self {
        let clock = ManualClock {
            start: Instant::now(),
            milliseconds: Arc::default(),
        };
        let identity = Identity {
            model: "tiny".into(),
            backend: Backend::Mock,
            device: Device::Cpu,
            load_s: 0.0,
            load: 1,
        };
        let gauges = Arc::new(Gauges::new(clock.start));
        let tokenizer = MockScript::default()
            .tokenizer()
            .expect("the mock has a tokenizer");
        Self {
            worker: Worker::new(models, tokenizer, identity, config, clock.clone(), gauges)
                .expect("the folder is there"),
            clock,
            requests: Vec::new(),
        }
    }

    fn submit(&mut self, prompt: &str, params: GenerateParams) -> Result<usize, EngineError> {
        self.submit_tokens(prompt, prompt.bytes().map(u32::from).collect(), params)
    }

    fn submit_tokens(
        &mut self,
        prompt: &str,
        tokens: Vec<u32>,
        params: GenerateParams,
    ) -> Result<usize, EngineError> {
        let (events, receiver) = mpsc::unbounded_channel();
        let at = self.clock.now();
        let request = Request {
            tokens,
            params: params.clone(),
            walk: None,
            parser: None,
            events,
            submitted: at,
        };
        let result = self.worker.submit(request);
        self.requests.push(Sent {
            prompt: prompt.to_owned(),
            params,
            at,
            events: Some(receiver),
            text: String::new(),
            tokens: Vec::new(),
            cached: None,
            speculation: None,
            ends: Vec::new(),
            refused: result.is_err(),
        });
        result.map(|()| self.requests.len() - 1)
    }

    fn turn(&mut self) {
        self.clock.advance(1);
        self.worker.turn();
        self.collect();
    }

    /// Reads what came back.
    fn collect(&mut self) {
        let now = self.clock.now();
        for sent in &mut self.requests {
            while let Some(Ok(event)) = sent.events.as_mut().map(mpsc::UnboundedReceiver::try_recv) {
                let tokens = event.iter().flat_map(GenerationEvent::tokens);
                sent.tokens.extend(tokens.cloned());
                match event {
                    Ok(GenerationEvent::Text { text, .. }) => sent.text.push_str(&text),
                    Ok(GenerationEvent::Finished(summary)) => {
                        sent.speculation = summary.speculation;
                        sent.ends.push((Ok(summary.finish_reason), now));
                    }
                    Ok(GenerationEvent::Started { cached_tokens, .. }) => sent.cached = Some(cached_tokens),
                    Ok(_) => {}
                    Err(error) => sent.ends.push((Err(error), now)),
                }
            }
        }
    }

    /// Turns until a request has ended.
    fn finish_one(&mut self, index: usize) {
        while self.requests[index].ends.is_empty() {
            self.turn();
        }
    }

    /// Turns until nothing is left to do.
    fn finish(&mut self) {
        for _ in 0..100_000 {
            if self.worker.is_idle() {
                return;
            }
            self.turn();
        }
        panic!("a request never ends");
    }
}

fn params(max_tokens: u32) -> GenerateParams {
    GenerateParams::default().with_max_tokens(max_tokens)
}

fn config() -> EngineConfig {
    EngineConfig {
        prefill_chunk: Some(16),
        ..EngineConfig::default()
    }
}

#[test]
fn a_long_prompt_stops_no_answer_for_longer_than_a_chunk() {
    let mut bench = Bench::new(MockScript::default(), &config());
    let running = bench.submit("the answer that runs", params(20)).unwrap();
    bench.turn();
    bench.turn();
    let long = "a prompt of sixteen chunks ".repeat(10)[..256].to_owned();
    bench.submit(&long, params(2)).unwrap();
    for turn in 0..16 {
        let before = bench.requests[running].text.len();
        bench.turn();
        assert_eq!(bench.requests[running].text.len(), before + 1, "turn {turn}");
    }
    assert!(bench.requests[1].text.is_empty(), "its prompt has just been fed");
    bench.finish();
}

#[test]
fn short_prompts_are_fed_in_one_step_and_with_answers() {
    let config = EngineConfig {
        prefill_chunk: Some(100),
        ..EngineConfig::default()
    };
    let mut bench = Bench::new(MockScript::default().with_batch_limit(8), &config);
    let prompts: Vec<String> = (0..5)
        .map(|index| format!("{index} {}", "x".repeat(20)))
        .collect();
    for prompt in &prompts {
        bench.submit(prompt, params(40)).unwrap();
    }
    bench.turn();
    bench.turn();
    bench.turn();
    // 22 tokens each: four prompts, the beginning of the fifth, its rest with the second tokens of the answers, and from
    // then on a token of each.
    let steps = &bench.worker.model.fed;
    assert_eq!(
        steps[..3],
        [vec![22, 22, 22, 22, 12], vec![1, 1, 1, 1, 10], vec![1; 5]]
    );
    bench.finish();
    for (sent, prompt) in bench.requests.iter().zip(&prompts) {
        assert_eq!(sent.text, *prompt);
    }
    assert_eq!(
        bench.worker.model.fed.len(),
        25,
        "a step for each token, and one for the rest"
    );
}

/// A step holds no more tokens of prompts than a chunk, however many there are.
#[test]
fn prompts_together_are_no_longer_than_a_chunk() {
    let mut bench = Bench::new(MockScript::default().with_batch_limit(32), &config());
    bench.submit("the answer that runs", params(60)).unwrap();
    (0..3).for_each(|_| bench.turn());
    for index in 0..9 {
        bench.submit(&format!("{index} of nine"), params(3)).unwrap();
    }
    bench.finish();
    let steps = &bench.worker.model.fed;
    let prompts = steps[3..]
        .iter()
        .map(|step| step.iter().filter(|&&rows| rows > 1).sum::<usize>());
    let most = prompts.max();
    assert_eq!(most, Some(16));
    assert!(bench.requests.iter().all(|sent| sent.ends.len() == 1));
}

/// What one of several prompts that are fed together cannot do costs the others nothing.
#[test]
fn a_fault_in_a_step_of_several_is_its_own() {
    let script = MockScript::default()
        .with_batch_limit(8)
        .with_fault(3, MockFault::Device);
    let mut bench = Bench::new(script, &config());
    for prompt in ["one", "two", "six"] {
        bench.submit(prompt, params(9)).unwrap();
    }
    bench.finish();
    let failed: Vec<bool> = bench
        .requests
        .iter()
        .map(|sent| sent.ends[0].0.is_err())
        .collect();
    assert_eq!(failed, [true, false, false]);
    assert_eq!(
        (&*bench.requests[1].text, &*bench.requests[2].text),
        ("two", "six")
    );
}

#[test]
fn requests_that_begin_alike_and_come_together_compute_it_once() {
    let cached = |prefill_chunk, alike: &str| {
        let config = EngineConfig {
            prefill_chunk: Some(prefill_chunk),
            ..EngineConfig::default()
        };
        let mut bench = Bench::new(MockScript::default().with_batch_limit(8), &config);
        for index in 0..5 {
            bench.submit(&format!("{alike}{index}"), params(8)).unwrap();
        }
        bench.finish();
        let steps = bench.worker.model.fed.len();
        let cached: Vec<u32> = bench.requests.iter().filter_map(|sent| sent.cached).collect();
        (cached, steps)
    };
    let long = "a system prompt that all of them have in common, and that is long ".repeat(4);
    // All of it is in one chunk: the others wait for that, and are fed what is theirs in one step with the first answer.
    assert_eq!(cached(1000, &long), (vec![0, 264, 264, 264, 264], 9));
    // The last chunk of the first has room for the second, for which no turn is lost.
    assert_eq!(cached(16, &long).0, [0, 256, 264, 264, 264]);
    // What is short is computed by all at once.
    assert_eq!(cached(1000, "short "), (vec![0; 5], 8));
}

#[test]
fn a_conversation_on_a_model_that_cannot_cut_begins_where_messages_end() {
    let script = MockScript::reply("ok").with_whole_sequences();
    let mut bench = Bench::new(script, &config());
    // The mock ends a message by its end token, which the template does not write: tokens are given as they are.
    let end = 256;
    let tokens = |text: &str| text.bytes().map(u32::from).chain([end]).collect::<Vec<u32>>();
    let send = |bench: &mut Bench, tokens: &[u32]| {
        let index = bench.submit_tokens("", tokens.to_vec(), params(4)).unwrap();
        bench.finish();
        bench.requests[index].cached.unwrap() as usize
    };
    let (system, first, second) = (tokens("be brief"), tokens("who are you"), tokens("what is this"));
    let conversation = |parts: &[&Vec<u32>]| {
        parts
            .iter()
            .flat_map(|part| part.iter().copied())
            .chain([58])
            .collect::<Vec<_>>()
    };
    assert_eq!(send(&mut bench, &conversation(&[&system, &first])), 0);
    // Another question after the same system prompt.
    assert_eq!(send(&mut bench, &conversation(&[&system, &second])), system.len());
    // The same question with its answer and one more.
    let answer = tokens("ok");
    let mut longer = conversation(&[&system, &first]);
    let before = longer.len();
    longer.extend(answer);
    longer.extend(conversation(&[&second]));
    assert!(send(&mut bench, &longer) >= before);
}

#[test]
fn a_thousand_requests_that_are_dropped_anywhere_leave_nothing() {
    let config = EngineConfig {
        max_batch: 4,
        prefill_chunk: Some(8),
        prefix_cache: PrefixCacheConfig::of(4000),
        ..EngineConfig::default()
    };
    let mut bench = Bench::new(MockScript::default().with_bytes_per_token(10), &config);
    let (mut random, mut ended) = (7_u64, 0);
    let mut draw = |below: u64| {
        // Knuth's generator: any sequence will do, as long as it is the same each time.
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    for number in 0..1000_u64 {
        let prompt = format!(
            "{} and the words of request {number}",
            "alike ".repeat(draw(5) as usize)
        );
        bench.submit(&prompt, params(1 + draw(30) as u32)).unwrap();
        (0..draw(6)).for_each(|_| bench.turn());
        if bench.requests.len() > 5 && draw(2) == 0 {
            let at = draw(bench.requests.len() as u64) as usize;
            drop(bench.requests.remove(at));
        }
        ended += bench.requests.iter().filter(|sent| !sent.ends.is_empty()).count();
        bench.requests.retain(|sent| sent.ends.is_empty());
        while bench.requests.len() > 30 {
            bench.turn();
            ended += bench.requests.iter().filter(|sent| !sent.ends.is_empty()).count();
            bench.requests.retain(|sent| sent.ends.is_empty());
        }
        let worker = &bench.worker;
        assert!(worker.prefixes.bytes() <= 4000);
        assert_eq!(
            worker.model.alive(),
            worker.active.len() + worker.prefixes.entries().count()
        );
        assert!(worker.active.len() <= 4 && worker.waiting.len() <= 64);
    }
    bench.finish();
    assert!(ended > 300, "{ended}");
    bench.worker.prefixes.clear();
    assert_eq!(bench.worker.model.alive(), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Submit {
        prompt: String,
        max_tokens: u32,
        priority: Priority,
        queue_ms: Option<u32>,
        total_ms: Option<u32>,
    },
    Drop(prop::sample::Index),
    Turns(u8),
    Wait(u64),
    Pin(prop::sample::Index),
    Clear,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Few letters, so that prompts begin alike.
    let submit = (
        "[ab]{1,4}[a-d]{0,30}",
        1u32..40,
        prop::sample::select(Priority::ALL.to_vec()),
        prop::option::weighted(0.2, 1u32..60),
        prop::option::weighted(0.2, 1u32..120),
    );
    let submit = submit.prop_map(
        |(prompt, max_tokens, priority, queue_ms, total_ms)| Step::Submit {
            prompt,
            max_tokens,
            priority,
            queue_ms,
            total_ms,
        },
    );
    let step = prop_oneof![
        8 => submit,
        2 => any::<prop::sample::Index>().prop_map(Step::Drop),
        6 => (1u8..12).prop_map(Step::Turns),
        1 => (1u64..50).prop_map(Step::Wait),
        1 => any::<prop::sample::Index>().prop_map(Step::Pin),
        1 => Just(Step::Clear),
    ];
    prop::collection::vec(step, 1..50)
}

#[derive(Clone, Debug)]
struct Setting {
    max_batch: usize,
    max_queue: usize,
    prefill_chunk: usize,
    memory_limit: Option<u64>,
    max_bytes: Option<u64>,
    whole: bool,
    faults: Vec<(u64, MockFault)>,
    speculation: SpeculationConfig,
    /// What the draft model says; what the model says where `None`.
    drafted: Option<String>,
    draft_faults: Vec<(u64, MockFault)>,
    /// Milliseconds of a step, and of each token in it.
    pace: (u64, u64),
    /// Sequences that a step takes.
    batch_limit: usize,
}

fn lookup() -> impl Strategy<Value = LookupConfig> {
    (1usize..10, 1usize..4, 0usize..3).prop_map(|(max_tokens, min_ngram, more)| LookupConfig {
        max_tokens,
        min_ngram,
        max_ngram: min_ngram + more,
        ..LookupConfig::default()
    })
}

fn speculation() -> impl Strategy<Value = SpeculationConfig> {
    prop_oneof![
        1 => Just(SpeculationConfig::Off),
        2 => lookup().prop_map(SpeculationConfig::Lookup),
        2 => (1usize..10).prop_map(|max_tokens| SpeculationConfig::Draft(DraftConfig {
            max_tokens,
            ..DraftConfig::new("draft")
        })),
    ]
}

fn setting() -> impl Strategy<Value = Setting> {
    let fault = prop::sample::select(vec![MockFault::Device, MockFault::OutOfMemory, MockFault::Panic]);
    (
        (1usize..5, 0usize..8, 1usize..20),
        prop::option::of(200u64..2000),
        prop::option::of(0u64..1000),
        any::<bool>(),
        prop::collection::vec((0u64..30, fault.clone()), 0..3),
        (
            speculation(),
            (0u64..4, 0u64..3),
            prop::option::of("[a-d]{0,40}"),
            prop::collection::vec((0u64..30, fault), 0..2),
            1usize..6,
        ),
    )
        .prop_map(
            |(
                (max_batch, max_queue, prefill_chunk),
                memory_limit,
                max_bytes,
                whole,
                faults,
                (speculation, pace, drafted, draft_faults, batch_limit),
            )| Setting {
                max_batch,
                max_queue,
                prefill_chunk,
                memory_limit,
                max_bytes,
                whole,
                faults,
                speculation,
                drafted,
                draft_faults,
                pace,
                batch_limit,
            },
        )
}

/// What the mock says to a prompt when it is asked alone.
fn alone(sent: &Sent) -> (String, FinishReason) {
    let echo: String = sent
        .prompt
        .chars()
        .take(sent.params.max_tokens as usize)
        .collect();
    let reason = if sent.params.max_tokens as usize > sent.prompt.len() {
        FinishReason::Stop
    } else {
        FinishReason::Length
    };
    (echo, reason)
}

fn milliseconds(seconds: Option<f64>) -> Option<Duration> {
    seconds.map(Duration::from_secs_f64)
}

fn check(steps: Vec<Step>, setting: &Setting) -> Result<(), TestCaseError> {
    let Setting {
        max_batch, max_queue, ..
    } = *setting;
    let mut script = MockScript::default()
        .with_bytes_per_token(10)
        .with_batch_limit(setting.batch_limit);
    for &(number, fault) in &setting.faults {
        script = script.with_fault(number, fault);
    }
    if setting.whole {
        script = script.with_whole_sequences();
    }
    let mut draft = setting
        .drafted
        .clone()
        .map_or_else(MockScript::default, MockScript::reply)
        .with_bytes_per_token(3)
        .with_batch_limit(setting.batch_limit);
    for &(number, fault) in &setting.draft_faults {
        draft = draft.with_fault(number, fault);
    }
    script = script.with_draft(draft);
    let config = EngineConfig {
        max_batch,
        max_queue,
        prefill_chunk: Some(setting.prefill_chunk),
        memory_limit: setting.memory_limit,
        prefix_cache: setting
            .max_bytes
            .map_or_else(PrefixCacheConfig::default, PrefixCacheConfig::of),
        speculation: setting.speculation.clone(),
        ..EngineConfig::default()
    };
    let mut bench = Bench::new(script, &config).with_pace(setting.pace);
    for step in steps {
        match step {
            Step::Submit {
                prompt,
                max_tokens,
                priority,
                queue_ms,
                total_ms,
            } => {
                let seconds = |ms: Option<u32>| ms.map(|ms| f64::from(ms) / 1000.0);
                let params = GenerateParams {
                    priority,
                    queue_timeout_s: seconds(queue_ms),
                    timeout_s: seconds(total_ms),
                    ..params(max_tokens)
                };
                let result = bench.submit(&prompt, params);
                bench.collect();
                let live = |sent: &&Sent| sent.events.is_some() && sent.ends.is_empty() && !sent.refused;
                let there = bench.requests.iter().filter(live).count();
                match result {
                    Ok(_) => prop_assert!(there <= max_batch + max_queue),
                    Err(EngineError::QueueFull { retry_after }) => {
                        prop_assert!(retry_after > Duration::ZERO);
                        prop_assert!(there >= max_batch + max_queue);
                    }
                    Err(EngineError::InsufficientMemory { required, available }) => {
                        prop_assert!(required > available && available <= setting.memory_limit.unwrap());
                    }
                    Err(error) => prop_assert!(false, "{error}"),
                }
            }
            Step::Drop(index) if !bench.requests.is_empty() => {
                let at = index.index(bench.requests.len());
                bench.requests[at].events = None;
            }
            Step::Pin(index) if !bench.requests.is_empty() => {
                let at = index.index(bench.requests.len());
                let tokens: Vec<u32> = bench.requests[at].prompt.bytes().map(u32::from).collect();
                let (pinned, _) = tokio::sync::oneshot::channel();
                bench.worker.manage(PrefixCommand::Pin { tokens, pinned });
            }
            Step::Clear => {
                let (cleared, _) = tokio::sync::oneshot::channel();
                bench.worker.manage(PrefixCommand::Clear(cleared));
            }
            Step::Turns(turns) => (0..turns).for_each(|_| bench.turn()),
            Step::Wait(milliseconds) => bench.clock.advance(milliseconds),
            Step::Drop(_) | Step::Pin(_) => {}
        }
        if let Some(limit) = setting.memory_limit {
            let worker = &bench.worker;
            let taken = worker.scheduler.reserved() + worker.prefixes.bytes();
            prop_assert!(taken <= limit || worker.prefixes.pinned_bytes() > 0);
        }
        prop_assert!(bench.worker.active.len() <= max_batch);
    }
    bench.finish();
    let mut faults = 0;
    for sent in bench.requests.iter().filter(|sent| sent.events.is_some()) {
        prop_assert_eq!(
            sent.ends.len(),
            usize::from(!sent.refused),
            "it ends once: {}",
            sent.prompt
        );
        let (text, reason) = alone(sent);
        prop_assert!(text.starts_with(&sent.text), "{} begins {text}", sent.text);
        match sent.ends.first() {
            None => {}
            Some((Ok(found), _)) => prop_assert_eq!((&sent.text, *found), (&text, reason)),
            Some((Err(EngineError::DeadlineExceeded { limit }), at)) => {
                let limits = [
                    milliseconds(sent.params.queue_timeout_s),
                    milliseconds(sent.params.timeout_s),
                ];
                prop_assert!(limits.contains(&Some(*limit)) && *at - sent.at >= *limit);
            }
            Some((Err(EngineError::InsufficientMemory { required, available }), _)) => {
                prop_assert!(required > available, "what is pinned leaves no room");
            }
            Some((Err(error), _)) => {
                prop_assert!(error.is_retryable(), "{error}");
                faults += 1;
            }
        }
    }
    // Nobody can tell whose fault a panic in a step of several is.
    let ends = |(_, fault): &(u64, MockFault)| match fault {
        MockFault::Panic => setting.batch_limit,
        _ => 1,
    };
    prop_assert!(faults <= setting.faults.iter().map(ends).sum::<usize>());
    // All that was taken is given back.
    prop_assert_eq!(bench.worker.scheduler.reserved(), 0);
    let pinned: Vec<_> = bench
        .worker
        .prefixes
        .entries()
        .map(|(tokens, _)| tokens)
        .collect();
    prop_assert_eq!(bench.worker.model.alive(), pinned.len());
    for tokens in pinned {
        bench.worker.prefixes.unpin(&tokens);
    }
    bench.worker.prefixes.clear();
    prop_assert_eq!(
        (bench.worker.prefixes.bytes(), bench.worker.model.alive()),
        (0, 0)
    );
    let drafts = bench.worker.speculation.draft();
    prop_assert_eq!(drafts.map_or(0, MockModel::alive), 0);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Whatever comes together, every request ends once, for the right reason, with what it gets alone.
    #[test]
    fn every_request_ends_once_with_what_it_gets_alone(steps in steps(), setting in setting()) {
        check(steps, &setting)?;
    }
}

/// What answers have taken is theirs, and not taken for what steps take: there is as much for sequences after long answers
/// as before.
#[test]
fn long_answers_are_no_workspace() {
    let config = EngineConfig {
        memory_limit: Some(100_000),
        prefix_cache: PrefixCacheConfig {
            max_bytes: Some(0),
            ..PrefixCacheConfig::default()
        },
        ..config()
    };
    let script = MockScript::reply("a".repeat(900))
        .with_bytes_per_token(10)
        .with_workspace(1000, 1000);
    let mut bench = Bench::new(script, &config);
    for prompt in ["one", "two", "three"] {
        bench.submit(prompt, params(1000)).unwrap();
        bench.finish();
        assert_eq!(bench.worker.memory.available(), Some(99_000), "{prompt}");
    }
}
