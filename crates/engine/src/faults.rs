//! Faults on purpose, under a model of either kind: what the caller is told, what the neighbours get, and what comes after.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use futures::StreamExt;
use mlx_engine_core::{
    Device, EngineError, GenerateParams, GenerationEvent, LlmEngine, LoadProgress, Prompt, collect_events,
};
use mlx_engine_monitor::{EngineHealth, HealthConfiguration, Monitored};
use mlx_engine_resilience::{
    RecoveryConfiguration, RecoveryStep, Reloadable, ResilienceConfiguration, Resilient,
};

use crate::engine::{Engine, Loaded};
use crate::{Chosen, EngineConfig, Feed, FeedError, MockScript, TokenModel};

/// Where a fault comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    /// A chunk of a prompt that is not its end.
    Prefill,
    /// The token of this number is begun.
    Step(u64),
    /// A token is read.
    Read,
    /// The token of this number is read.
    ReadAt(u64),
    /// A sequence is cut for the cache, which is no step of a request.
    Truncate,
    /// The bytes of a request are asked for, before it is in the queue.
    Bytes,
}

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Device,
    OutOfMemory,
    Panic,
    /// Nothing comes until the gate opens, and then an error.
    Hang,
    /// Nothing comes until the gate opens, and then all goes on.
    Pause,
    /// A function inside MLX's graph fails, and the graph is evaluated.
    #[cfg(feature = "mlx")]
    HostOp,
    #[cfg(feature = "mlx")]
    HostOpPanic,
}

/// The parameters of a request that is to fail have this seed.
const VICTIM: u64 = 666;

/// What is to happen, and what did.
#[derive(Debug, Default)]
struct Plan {
    fault: Mutex<Option<(Point, Fault)>>,
    /// Whether the fault stays until the model is loaded again.
    stays: AtomicBool,
    /// Whether nobody can tell whose fault it is where several are fed.
    hides: AtomicBool,
    /// Whether nothing that a step has left can be taken back.
    forgets: AtomicBool,
    loads: Mutex<u32>,
    gate: (Mutex<bool>, Condvar),
    /// Told when something hangs.
    hangs: tokio::sync::Notify,
}

impl Plan {
    fn until_reload(point: Point, fault: Fault) -> Arc<Self> {
        Arc::new(Self {
            fault: Mutex::new(Some((point, fault))),
            stays: AtomicBool::new(true),
            ..Self::default()
        })
    }

    /// Ends what hangs.
    fn open(&self) {
        *self.gate.0.lock().expect("not poisoned") = true;
        self.gate.1.notify_all();
    }

    /// Until the gate opens.
    fn wait(&self) {
        self.hangs.notify_one();
        let closed = self.gate.0.lock().expect("not poisoned");
        drop(
            self.gate
                .1
                .wait_while(closed, |open| !*open)
                .expect("not poisoned"),
        );
    }

    /// The fault of this point, if there is one.
    fn due(&self, here: Point) -> Option<Fault> {
        let mut planned = self.fault.lock().expect("not poisoned");
        let (point, fault) = (*planned)?;
        if point != here {
            return None;
        }
        if !self.stays.load(Ordering::Relaxed) {
            *planned = None;
        }
        Some(fault)
    }

    fn meet(&self, here: Point) -> Result<(), EngineError> {
        match self.due(here) {
            None => Ok(()),
            Some(Fault::Device) => Err(EngineError::device("told to", "fail")),
            Some(Fault::OutOfMemory) => Err(EngineError::OutOfMemory),
            Some(Fault::Panic) => panic!("told to panic"),
            Some(Fault::Hang) => {
                self.wait();
                Err(EngineError::device("told to", "hang"))
            }
            Some(Fault::Pause) => {
                self.wait();
                Ok(())
            }
            #[cfg(feature = "mlx")]
            Some(Fault::HostOp) => Err(in_a_host_op(false)),
            #[cfg(feature = "mlx")]
            Some(Fault::HostOpPanic) => Err(in_a_host_op(true)),
        }
    }
}

/// The error of a graph whose node fails.
#[cfg(feature = "mlx")]
fn in_a_host_op(panics: bool) -> EngineError {
    use mlx_sys::{HostOp, HostOutput, mlx_dtype__MLX_FLOAT32};

    let op = HostOp::new(c"faulty", move |_, _| {
        assert!(!panics, "told to panic");
        Err("told to fail".to_owned())
    });
    let stream = mlx_rs::Stream::cpu();
    let outputs = [HostOutput::new(&[1], mlx_dtype__MLX_FLOAT32)];
    #[expect(unsafe_code, reason = "the graph is built through MLX's C interface")]
    // SAFETY: the handle of the stream is alive; the result is owned, and taken once.
    let array = unsafe {
        let mut results = op.call(&[], &outputs, stream.as_ptr()).expect("a node");
        mlx_rs::Array::from_ptr(results.remove(0))
    };
    let error = array.eval().expect_err("the node fails");
    crate::mlx::run_error(error.into())
}

/// A model that fails as planned.
struct Faulty<M> {
    model: M,
    plan: Arc<Plan>,
}

impl<M: TokenModel> TokenModel for Faulty<M> {
    type Sequence = M::Sequence;

    fn context_length(&self) -> usize {
        self.model.context_length()
    }

    fn open(&mut self) -> M::Sequence {
        self.model.open()
    }

    fn len(&self, sequence: &M::Sequence) -> usize {
        self.model.len(sequence)
    }

    fn truncate(&mut self, sequence: &mut M::Sequence, len: usize) -> bool {
        // There is no error to return: it can only panic.
        assert!(self.plan.due(Point::Truncate).is_none(), "told to panic");
        self.model.truncate(sequence, len)
    }

    fn undo(&mut self, sequence: &mut M::Sequence, len: usize) -> bool {
        !self.plan.forgets.load(Ordering::Relaxed) && self.model.undo(sequence, len)
    }

    fn fork(&mut self, sequence: &mut M::Sequence, len: usize) -> Result<Option<M::Sequence>, EngineError> {
        self.model.fork(sequence, len)
    }

    fn forks_anywhere(&self) -> bool {
        self.model.forks_anywhere()
    }

    fn takes_back(&self) -> usize {
        self.model.takes_back()
    }

    fn shared_bytes(&self, len: usize) -> u64 {
        self.model.shared_bytes(len)
    }

    fn can_look_ahead(&self, sequence: &M::Sequence) -> bool {
        self.model.can_look_ahead(sequence)
    }

    fn batch_limit(&self) -> usize {
        self.model.batch_limit()
    }

    fn feed(&mut self, batch: &mut [Feed<'_, M::Sequence>]) -> Result<(), FeedError> {
        for (index, feed) in batch.iter().enumerate() {
            let point = if feed.choices == 0 {
                Point::Prefill
            } else {
                Point::Step(feed.number)
            };
            if feed.params.seed == Some(VICTIM) {
                self.plan.meet(point).map_err(|error| FeedError {
                    error,
                    culprit: (!self.plan.hides.load(Ordering::Relaxed)).then_some(index),
                })?;
            }
        }
        self.model.feed(batch)
    }

    fn read(
        &mut self,
        sequence: &mut M::Sequence,
        params: &GenerateParams,
        tokens: &[u32],
        prompt_len: usize,
        mask: &mut dyn FnMut(&mut [f32]),
    ) -> Result<Chosen, EngineError> {
        if params.seed == Some(VICTIM) {
            self.plan.meet(Point::Read)?;
            self.plan
                .meet(Point::ReadAt((tokens.len() - prompt_len) as u64))?;
        }
        self.model.read(sequence, params, tokens, prompt_len, mask)
    }

    fn score(
        &mut self,
        sequence: &mut M::Sequence,
        tokens: &[u32],
        next: &[u32],
    ) -> Result<Vec<f32>, EngineError> {
        self.model.score(sequence, tokens, next)
    }

    fn sequence_bytes(&self, tokens: usize) -> u64 {
        assert!(self.plan.due(Point::Bytes).is_none(), "told to panic");
        self.model.sequence_bytes(tokens)
    }

    fn peak_memory_bytes(&self) -> u64 {
        self.model.peak_memory_bytes()
    }

    fn clear_caches(&mut self) -> Result<(), EngineError> {
        self.model.clear_caches()
    }

    fn has_stream(&self) -> bool {
        self.model.has_stream()
    }

    fn rebuild_stream(&mut self) -> Result<(), EngineError> {
        self.model.rebuild_stream()
    }
}

/// Which model is under the faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Mock,
    #[cfg(feature = "mlx")]
    Mlx,
}

const KINDS: &[Kind] = &[
    Kind::Mock,
    #[cfg(feature = "mlx")]
    Kind::Mlx,
];

fn faulty<M>(loaded: Loaded<M>, plan: Arc<Plan>) -> Loaded<Faulty<M>> {
    let Loaded {
        model,
        draft,
        configuration,
        encoder,
        backend,
        device,
    } = loaded;
    *plan.loads.lock().expect("not poisoned") += 1;
    if *plan.loads.lock().expect("not poisoned") > 1 {
        *plan.fault.lock().expect("not poisoned") = None;
    }
    Loaded {
        draft: draft.map(|model| Faulty {
            model,
            plan: Arc::clone(&plan),
        }),
        model: Faulty { model, plan },
        configuration,
        encoder,
        backend,
        device,
    }
}

async fn load(kind: Kind, plan: &Arc<Plan>, config: EngineConfig) -> Result<Engine, EngineError> {
    let plan = Arc::clone(plan);
    match kind {
        Kind::Mock => {
            let kept = config.clone();
            Engine::load(config, None, move |_, _| {
                Ok(faulty(
                    crate::engine::load_mock(
                        "faulty".to_owned(),
                        MockScript::default().with_batch_limit(8),
                        &kept,
                    )?,
                    plan,
                ))
            })
            .await
        }
        #[cfg(feature = "mlx")]
        Kind::Mlx => {
            let path =
                std::env::var("MLX_ENGINE_TEST_MODEL").expect("the tests are run by `cargo xtask test`");
            Engine::load(config, None, move |cancelled, progress| {
                let compute = mlx_engine_models::Compute::Fastest;
                let config = EngineConfig::default();
                let loaded =
                    crate::mlx::load(path.as_ref(), None, compute.into(), &config, cancelled, progress)?;
                Ok(faulty(loaded, plan))
            })
            .await
        }
    }
}

fn greedy() -> GenerateParams {
    GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(12)
}

fn victim() -> GenerateParams {
    greedy().with_seed(VICTIM)
}

fn prompt() -> Prompt {
    // Two chunks of a prompt, so that one of them is not the last.
    Prompt::text("Once upon a time there was a small town by the sea, and in that town there lived ")
}

fn config() -> EngineConfig {
    EngineConfig {
        prefill_chunk: Some(8),
        ..EngineConfig::default()
    }
}

async fn tokens(engine: &impl LlmEngine, text: &str) -> Vec<u32> {
    engine
        .generate(Prompt::text(text), greedy())
        .await
        .expect("an answer")
        .tokens
}

fn is(error: &EngineError, fault: Fault) -> bool {
    match fault {
        Fault::Device | Fault::Hang => matches!(error, EngineError::Device { .. }),
        Fault::OutOfMemory => matches!(error, EngineError::OutOfMemory),
        Fault::Pause => false,
        Fault::Panic => {
            matches!(error, EngineError::WorkerPanicked { message } if message == "told to panic")
        }
        #[cfg(feature = "mlx")]
        Fault::HostOp | Fault::HostOpPanic => {
            matches!(error, EngineError::Device { source: Some(source), .. } if source.to_string().contains("told to"))
        }
    }
}

fn faults(kind: Kind) -> Vec<Fault> {
    let common = [Fault::Device, Fault::OutOfMemory, Fault::Panic];
    match kind {
        Kind::Mock => common.to_vec(),
        #[cfg(feature = "mlx")]
        Kind::Mlx => [&common[..], &[Fault::HostOp, Fault::HostOpPanic]].concat(),
    }
}

const POINTS: [Point; 5] = [
    Point::Prefill,
    Point::Step(0),
    Point::Step(1),
    Point::Step(5),
    Point::Read,
];

#[tokio::test]
async fn a_fault_is_one_requests_and_the_neighbours_get_the_tokens_that_they_get_alone() {
    for &kind in KINDS {
        let sound = load(kind, &Arc::new(Plan::default()), config()).await.unwrap();
        let (beside, behind) = (tokens(&sound, "Red").await, tokens(&sound, "Blue").await);
        drop(sound);
        for waits in [false, true] {
            let config = EngineConfig {
                max_batch: if waits { 1 } else { 8 },
                ..config()
            };
            let plan = Arc::new(Plan::default());
            let engine = load(kind, &plan, config).await.unwrap();
            let ask = async |prompt, params| collect_events(engine.stream(prompt, params).await?).await;
            // Nobody can tell whose fault a panic in a step of several is, or that its token cannot be read: it is run again, and a
            // fault that comes once is nobody's. There the neighbours wait.
            let shared = |point, fault| fault == Fault::Panic || point == Point::Read;
            for (point, fault) in POINTS
                .into_iter()
                .flat_map(|point| faults(kind).into_iter().map(move |fault| (point, fault)))
                .filter(|&(point, fault)| shared(point, fault) == waits)
            {
                *plan.fault.lock().unwrap() = Some((point, fault));
                let (failed, one, two) = futures::join!(
                    ask(prompt(), victim()),
                    ask(Prompt::text("Red"), greedy()),
                    ask(Prompt::text("Blue"), greedy()),
                );
                let error = failed.unwrap_err();
                let case = format!("{kind:?} {point:?} {fault:?}: {error}");
                assert!(is(&error, fault) && error.is_retryable(), "{case}");
                let found = (one.unwrap().tokens, two.unwrap().tokens);
                assert_eq!(found, (beside.clone(), behind.clone()), "{case}");
                let statistics = engine.statistics().unwrap();
                assert_eq!((statistics.running, statistics.queued), (0, 0), "{case}");
                // What goes on from what is kept is run again too.
                engine.clear_prefix_cache().await.unwrap();
            }
            // The same request, now that no fault is planned.
            assert!(engine.generate(prompt(), victim()).await.is_ok());
            engine.clear_prefix_cache().await.unwrap();
            assert_eq!(tokens(&engine, "Blue").await, behind);
        }
    }
}

/// Has the victim and two others decode together, and says what became of each and how many steps were run again. The
/// worker is held at the victim's prompt until all of them are with it.
async fn together(
    engine: &Engine,
    plan: &Plan,
    fault: (Point, Fault),
    stays: bool,
) -> ([Result<Vec<u32>, EngineError>; 3], u64) {
    let before = engine.statistics().expect("it tells").redone_steps;
    *plan.gate.0.lock().unwrap() = false;
    plan.stays.store(false, Ordering::Relaxed);
    *plan.fault.lock().unwrap() = Some((Point::Prefill, Fault::Pause));
    let first = engine.stream(prompt(), victim());
    let others = async {
        plan.hangs.notified().await;
        plan.stays.store(stays, Ordering::Relaxed);
        *plan.fault.lock().unwrap() = Some(fault);
        // The first poll of each hands its request over.
        let (one, two, ()) = futures::join!(
            engine.stream(Prompt::text(RED), greedy()),
            engine.stream(Prompt::text(BLUE), sampled()),
            async { plan.open() },
        );
        (one, two)
    };
    let (first, (one, two)) = futures::join!(first, others);
    let ends = [first, one, two].map(async |events| Ok(collect_events(events?).await?.tokens));
    let [first, one, two] = ends;
    let ends = futures::join!(first, one, two);
    *plan.fault.lock().unwrap() = None;
    let after = engine.statistics().expect("it tells");
    assert_eq!((after.running, after.queued), (0, 0));
    (ends.into(), after.redone_steps - before)
}

/// Prompts whose answers are as long on the mock, which says them back.
const RED: &str = "Red as the evening sun,";
const BLUE: &str = "Blue as the morning sea,";

/// A request whose logits are read before the next step begins.
fn sampled() -> GenerateParams {
    greedy().with_temperature(0.9).with_top_p(0.9).with_seed(5)
}

#[tokio::test]
async fn a_step_of_several_that_fails_is_run_again_for_each_alone() {
    for &kind in KINDS {
        let points = [Point::Step(8), Point::ReadAt(8)];
        check_together(kind, Plan::default(), &points, &faults(kind), &[true, false]).await;
    }
}

/// As where MLX's graph has failed.
#[tokio::test]
async fn a_sequence_that_cannot_be_taken_back_is_computed_anew() {
    for &kind in KINDS {
        let plan = Plan::default();
        plan.forgets.store(true, Ordering::Relaxed);
        check_together(kind, plan, &[Point::Step(8)], &[Fault::Device], &[true, false]).await;
    }
}

async fn check_together(kind: Kind, plan: Plan, points: &[Point], faults: &[Fault], stays: &[bool]) {
    plan.hides.store(true, Ordering::Relaxed);
    let plan = Arc::new(plan);
    let config = EngineConfig {
        prefill_chunk: Some(16),
        ..EngineConfig::default()
    };
    let engine = load(kind, &plan, config).await.unwrap();
    let alone = async |prompt, params| engine.generate(prompt, params).await.expect("an answer").tokens;
    let expected = [
        alone(prompt(), victim()).await,
        alone(Prompt::text(RED), greedy()).await,
        alone(Prompt::text(BLUE), sampled()).await,
    ];
    engine.clear_prefix_cache().await.unwrap();
    for (&point, &fault) in points
        .iter()
        .flat_map(|point| faults.iter().map(move |fault| (point, fault)))
    {
        for &stays in stays {
            let (found, redone) = together(&engine, &plan, (point, fault), stays).await;
            let case = format!("{kind:?} {point:?} {fault:?} stays {stays}: {found:?}");
            let [first, one, two] = found;
            match first {
                Err(error) if stays => assert!(is(&error, fault) && error.is_retryable(), "{case}"),
                first => assert_eq!(
                    (stays, first.ok().as_ref()),
                    (false, Some(&expected[0])),
                    "{case}"
                ),
            }
            assert_eq!(
                (one.unwrap(), two.unwrap()),
                (expected[1].clone(), expected[2].clone()),
                "{case}"
            );
            // Reading fails for the victim alone; a step for all that were in it. What is sampled by its logits is in the next.
            let steps = if matches!(point, Point::Step(_)) {
                2..=3
            } else {
                1..=1
            };
            assert!(steps.contains(&redone), "{redone} {case}");
            engine.clear_prefix_cache().await.unwrap();
        }
    }
}

/// Needs the process for itself, as the limit is the process's.
#[cfg(feature = "mlx")]
#[tokio::test]
async fn memory_that_one_of_several_lacks_is_its_own_lack() {
    let plan = Arc::new(Plan::default());
    let engine = load(Kind::Mlx, &plan, config()).await.unwrap();
    let short = greedy().with_max_tokens(40).with_ignore_eos(true);
    let expected = engine
        .generate(Prompt::text("Red"), short.clone())
        .await
        .unwrap()
        .tokens;
    engine.clear_prefix_cache().await.unwrap();
    // It runs, and is within the first of its pages to the end.
    let mut running = engine.stream(Prompt::text("Red"), short).await.unwrap();
    assert!(running.next().await.unwrap().is_ok());
    // The other gets to the end of its first page, and is held where it has begun.
    *plan.fault.lock().unwrap() = Some((Point::Step(1), Fault::Pause));
    let long = victim().with_max_tokens(100).with_ignore_eos(true);
    let words = Prompt::text("one two three four five six seven eight nine ten ".repeat(5));
    let other = engine.stream(words, long);
    let limit = async {
        plan.hangs.notified().await;
        mlx_engine_models::set_memory_limit(Some(1));
        plan.open();
    };
    let (other, ()) = futures::join!(other, limit);
    let (other, running) = futures::join!(collect_events(other.unwrap()), collect_events(running));
    let error = other.unwrap_err();
    assert!(matches!(error, EngineError::OutOfMemory), "{error:?}");
    assert_eq!(running.unwrap().tokens, expected);
    assert!(engine.statistics().unwrap().redone_steps > 0, "they ran together");
    mlx_engine_models::set_memory_limit(None);
    assert_eq!(tokens(&engine, "Blue").await.len(), 12);
}

#[tokio::test]
async fn a_panic_outside_a_step_costs_what_runs_and_not_what_waits() {
    for &kind in KINDS {
        let sound = load(kind, &Arc::new(Plan::default()), config()).await.unwrap();
        let expected = tokens(&sound, "Blue, red and green").await;
        drop(sound);
        let plan = Arc::new(Plan::default());
        let engine = load(kind, &plan, config()).await.unwrap();
        assert_eq!(tokens(&engine, "Blue, red and green").await, expected);
        // An answer is there before it is cut for the cache: this is behind that.
        engine.prefix_cache().await.unwrap();
        // One runs, and is held until the second is with the worker: else it may have ended before.
        *plan.fault.lock().unwrap() = Some((Point::Step(1), Fault::Pause));
        let long = victim().with_max_tokens(400).with_ignore_eos(true);
        let running = engine.stream(prompt(), long).await.unwrap();
        plan.hangs.notified().await;
        let short = greedy().with_max_tokens(2);
        // The first answer that ends is cut for the cache, and the worker panics with the other running.
        *plan.fault.lock().unwrap() = Some((Point::Truncate, Fault::Panic));
        // The first poll hands the request over; its answer comes when the worker goes on.
        let (ends, ()) = futures::join!(engine.stream(Prompt::text("Red"), short), async { plan.open() });
        let (running, ends) = futures::join!(collect_events(running), collect_events(ends.unwrap()));
        let error = running.unwrap_err();
        assert!(is(&error, Fault::Panic) && error.is_retryable(), "{error}");
        assert_eq!(ends.unwrap().tokens.len(), 2, "it had ended before");
        let again = engine
            .generate(Prompt::text("Blue, red and green"), greedy())
            .await
            .unwrap();
        assert_eq!(again.tokens, expected);
        assert!(
            again.usage.cached_tokens > 0,
            "what was kept was no part of the panic"
        );
        let statistics = engine.statistics().unwrap();
        assert_eq!(
            (statistics.worker_restarts, statistics.running, statistics.queued),
            (1, 0, 0)
        );
        assert!(engine.backend().is_some());
    }
}

#[tokio::test]
async fn a_worker_that_panics_whatever_it_does_ends_and_says_so() {
    let plan = Plan::until_reload(Point::Bytes, Fault::Panic);
    let engine = load(Kind::Mock, &plan, config()).await.unwrap();
    let error = engine.generate(prompt(), greedy()).await.unwrap_err();
    assert!(matches!(error, EngineError::WorkerPanicked { .. }), "{error}");
    assert!(engine.backend().is_some(), "once is no reason to give up");
    assert!(engine.generate(prompt(), greedy()).await.is_err());
    while engine.backend().is_some() {
        tokio::task::yield_now().await;
    }
    assert!(matches!(
        engine.generate(prompt(), greedy()).await,
        Err(EngineError::NotLoaded { .. })
    ));
}

/// An engine that is watched and brought back, with a health that one fault changes.
async fn watched(kind: Kind, plan: &Arc<Plan>) -> Resilient<Monitored<Reloadable<Engine>>> {
    let again = Arc::clone(plan);
    let engine = Reloadable::load(move || {
        let plan = Arc::clone(&again);
        Box::pin(async move { load(kind, &plan, config()).await })
    })
    .await
    .expect("it loads")
    .with_unload_limit(Duration::from_millis(50));
    let health = HealthConfiguration {
        max_consecutive_failures: 1,
        degraded_turn_s: 0.001,
        unhealthy_turn_s: 0.002,
        ..HealthConfiguration::default()
    };
    let resilience = ResilienceConfiguration {
        recovery: RecoveryConfiguration {
            automatic: false,
            proof_timeout: Duration::from_secs(20),
            ..RecoveryConfiguration::default()
        },
        ..ResilienceConfiguration::default()
    };
    let monitored = Monitored::builder(engine).health(health).build().expect("valid");
    Resilient::builder(monitored)
        .configuration(resilience)
        .recoverable()
        .build()
        .expect("valid")
}

fn well(kind: Kind) -> EngineHealth {
    match kind {
        Kind::Mock => EngineHealth::Degraded,
        #[cfg(feature = "mlx")]
        Kind::Mlx => EngineHealth::Healthy,
    }
}

#[tokio::test]
async fn health_tells_of_a_fault_and_recovery_proves_a_token() {
    for &kind in KINDS {
        for fault in faults(kind) {
            let engine = watched(kind, &Plan::until_reload(Point::Read, fault)).await;
            let expected = tokens(engine.engine().engine(), "Blue").await;
            let health = || engine.engine().health().status;
            assert_eq!(health(), well(kind), "before");
            let error = engine.generate(prompt(), victim()).await.unwrap_err();
            assert!(is(&error, fault), "{kind:?} {fault:?}: {error}");
            assert_eq!(health(), EngineHealth::Unhealthy, "{kind:?} {fault:?}: during");
            // The engine gives tokens to all but the victim, and says so.
            let report = engine.attempt_recovery().await;
            assert!(report.recovered && report.steps.is_empty(), "{report:?}");
            // That memory was short is told for as long as the window reaches back.
            let after = if fault == Fault::OutOfMemory {
                EngineHealth::Degraded
            } else {
                well(kind)
            };
            assert_eq!(health(), after, "{kind:?} {fault:?}: after");
            assert_eq!(tokens(&engine, "Blue").await, expected);
        }
    }
}

#[tokio::test]
async fn a_hang_is_found_reported_and_replaced() {
    for &kind in KINDS {
        let plan = Plan::until_reload(Point::Step(1), Fault::Hang);
        let engine = watched(kind, &plan).await;
        let expected = tokens(engine.engine().engine(), "Blue").await;
        let mut running = engine.stream(prompt(), victim()).await.unwrap();
        assert!(matches!(
            running.next().await,
            Some(Ok(GenerationEvent::Started { .. }))
        ));
        plan.hangs.notified().await;
        // The time of the turn grows until it is too long.
        while engine.engine().health().status != EngineHealth::Unhealthy {
            tokio::task::yield_now().await;
        }
        let report = engine.engine().health();
        assert!(
            report
                .reasons
                .iter()
                .any(|reason| reason.to_string().contains("a turn has taken")),
            "{report:?}"
        );
        assert!(!report.is_live());
        // Nobody waits for the proof that the engine hangs: the step is asked for.
        let recovered =
            mlx_engine_resilience::Recover::recover(engine.engine(), RecoveryStep::ReloadModel).await;
        assert!(recovered.is_ok(), "{recovered:?}");
        let error = loop {
            match running.next().await.expect("an end") {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(
            matches!(&error, EngineError::WorkerLost { .. }) && error.is_retryable(),
            "{error}"
        );
        plan.open();
        assert_eq!(tokens(&engine, "Blue").await, expected);
        assert_eq!(engine.engine().health().status, well(kind));
    }
}

#[tokio::test]
async fn a_fault_at_load_leaves_nothing_behind() {
    type Load = fn() -> Result<Loaded<crate::MockModel>, EngineError>;
    let fails: [Load; 3] = [
        || Err(EngineError::model_load("tiny", "told to")),
        || Err(EngineError::OutOfMemory),
        || panic!("told to panic"),
    ];
    for (fail, expected) in fails.into_iter().zip([
        "model `tiny` could not be loaded",
        "device is out of memory",
        "engine worker panicked: told to panic",
    ]) {
        let loaded = Engine::load(config(), None, move |_, _| fail()).await;
        assert_eq!(loaded.err().unwrap().to_string(), expected);
    }
    #[cfg(feature = "mlx")]
    {
        let path = std::env::var("MLX_ENGINE_TEST_MODEL").expect("the tests are run by `cargo xtask test`");
        let loaded = Engine::load(config(), None, move |cancelled, _| {
            let mut progress = |stage| {
                if let LoadProgress::Layers { done: 7, .. } = stage {
                    panic!("told to panic");
                }
            };
            crate::mlx::load(
                path.as_ref(),
                None,
                mlx_engine_models::Compute::Fastest.into(),
                &EngineConfig::default(),
                cancelled,
                &mut progress,
            )
        })
        .await;
        assert!(matches!(
            loaded.err().unwrap(),
            EngineError::WorkerPanicked { .. }
        ));
        let engine = load(Kind::Mlx, &Arc::new(Plan::default()), config())
            .await
            .unwrap();
        assert_eq!(engine.device(), Device::Cpu);
        assert_eq!(tokens(&engine, "Blue").await.len(), 12);
    }
}

/// Needs the process for itself, as the limit is the process's: no other test of this file may run beside it.
#[cfg(feature = "mlx")]
#[tokio::test]
async fn exhausted_memory_is_an_error_and_the_engine_works_again() {
    let engine = load(Kind::Mlx, &Arc::new(Plan::default()), config())
        .await
        .unwrap();
    let expected = tokens(&engine, "Blue").await;
    // Not another page of keys and values.
    mlx_engine_models::set_memory_limit(Some(1));
    let error = engine
        .generate(prompt(), victim().with_max_tokens(300).with_ignore_eos(true))
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::OutOfMemory), "{error:?}");
    mlx_engine_models::set_memory_limit(None);
    assert_eq!(tokens(&engine, "Blue").await, expected);
    engine.clear_caches().await.unwrap();
    let statistics = engine.statistics().unwrap();
    assert_eq!(
        (statistics.prefix_cache_bytes, statistics.prefix_cache_sequences),
        (0, 0)
    );
    assert!(statistics.memory.unwrap().active_bytes > 0);
    assert_eq!(tokens(&engine, "Blue").await, expected);
}

#[tokio::test]
async fn a_new_stream_ends_what_runs_and_the_next_is_right() {
    for &kind in KINDS {
        let engine = load(kind, &Arc::new(Plan::default()), config()).await.unwrap();
        let expected = tokens(&engine, "Blue").await;
        let mut running = engine
            .stream(prompt(), greedy().with_max_tokens(500).with_ignore_eos(true))
            .await
            .unwrap();
        assert!(running.next().await.unwrap().is_ok());
        engine.rebuild_stream().await.unwrap();
        if kind != Kind::Mock {
            let error = loop {
                match running.next().await.expect("an end") {
                    Ok(_) => {}
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, EngineError::WorkerLost { .. }), "{error}");
        }
        drop(running);
        assert_eq!(tokens(&engine, "Blue").await, expected);
    }
}
