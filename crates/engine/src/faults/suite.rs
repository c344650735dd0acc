//! Every fault that an engine is to survive, in one table: what the request hears that it comes to, what health says before it,
//! while it lasts and after it, what the neighbours of that request get, and what recovery does until a token proves it.
//!
//! A process that is killed is in the tests of the command (`crates/cli/tests/isolate.rs`), where there are processes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::FutureExt;
#[cfg(feature = "mlx")]
use futures::StreamExt;
use mlx_engine_core::{EngineError, GenerateParams, LlmEngine, Prompt};
#[cfg(feature = "mlx")]
use mlx_engine_core::{GenerationEvent, collect_events};
use mlx_engine_monitor::{
    EngineHealth, ErrorKind, HealthConfiguration, HealthEvents, HealthReport, Monitored,
};
use mlx_engine_resilience::{
    Recover, RecoveryConfiguration, RecoveryReport, RecoveryStep, Reloadable, ResilienceConfiguration,
    Resilient,
};

use super::plan::{Fault, Plan, Point};
use super::{Kind, config, greedy, load, prompt, tokens, victim};
use crate::EngineConfig;
use crate::engine::Engine;

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
enum What {
    /// Whenever the victim comes there, until the model is loaded again.
    Request(Point, Fault),
    /// A turn takes long, and ends.
    Latency,
    /// A turn does not end.
    Hang(Fault),
    /// The worker panics at nobody's step, and goes on.
    Worker,
    /// The worker panics whatever it does, and ends.
    WorkerEnds,
    /// MLX gets no more memory.
    #[cfg(feature = "mlx")]
    Memory,
    /// The model cannot be loaded.
    Load,
}

/// What a neighbour gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Neighbour {
    /// Its tokens.
    Answered,
    /// An error, and its tokens when it asks again after the recovery.
    Again,
}
use Neighbour::{Again, Answered};

/// A row of the table.
struct Case {
    name: &'static str,
    what: What,
    /// What the victim hears; `None` where it is answered.
    error: Option<ErrorKind>,
    /// How health is while it lasts, and by what beside the mock.
    during: (EngineHealth, &'static [&'static str]),
    /// The one that runs beside the victim, and the one that comes behind it.
    neighbours: [Neighbour; 2],
    steps: &'static [RecoveryStep],
    /// What health still says when all is well.
    after: &'static [&'static str],
}

const FAULT: &[&str] = &["consecutive_failures"];
const LACK: &[&str] = &["consecutive_failures", "out_of_memory"];
/// The worker is gone, and those who asked since have heard so.
const GONE: &[&str] = &["not_loaded", "consecutive_failures"];
const RELOAD: &[RecoveryStep] = &[RecoveryStep::ReloadModel];

/// A fault of one request: nobody else notices, and there is nothing to recover.
const fn request(name: &'static str, point: Point, fault: Fault, error: ErrorKind) -> Case {
    // That memory was short is told for as long as the window reaches back.
    let lack = matches!(error, ErrorKind::OutOfMemory);
    Case {
        name,
        what: What::Request(point, fault),
        error: Some(error),
        during: (EngineHealth::Unhealthy, if lack { LACK } else { FAULT }),
        neighbours: [Answered, Answered],
        steps: &[],
        after: if lack { &["out_of_memory"] } else { &[] },
    }
}

const CASES: &[Case] = &[
    request(
        "device error at prefill",
        Point::Prefill,
        Fault::Device,
        ErrorKind::Device,
    ),
    request(
        "no memory at prefill",
        Point::Prefill,
        Fault::OutOfMemory,
        ErrorKind::OutOfMemory,
    ),
    request(
        "panic at prefill",
        Point::Prefill,
        Fault::Panic,
        ErrorKind::WorkerPanicked,
    ),
    request(
        "device error at the first token",
        Point::Step(0),
        Fault::Device,
        ErrorKind::Device,
    ),
    request(
        "no memory at the first token",
        Point::Step(0),
        Fault::OutOfMemory,
        ErrorKind::OutOfMemory,
    ),
    request(
        "panic at the first token",
        Point::Step(0),
        Fault::Panic,
        ErrorKind::WorkerPanicked,
    ),
    request(
        "device error at token 5",
        Point::Step(5),
        Fault::Device,
        ErrorKind::Device,
    ),
    request(
        "no memory at token 5",
        Point::Step(5),
        Fault::OutOfMemory,
        ErrorKind::OutOfMemory,
    ),
    request(
        "panic at token 5",
        Point::Step(5),
        Fault::Panic,
        ErrorKind::WorkerPanicked,
    ),
    request(
        "token 5 cannot be read",
        Point::ReadAt(5),
        Fault::Device,
        ErrorKind::Device,
    ),
    request(
        "panic while token 5 is read",
        Point::ReadAt(5),
        Fault::Panic,
        ErrorKind::WorkerPanicked,
    ),
    #[cfg(feature = "mlx")]
    request(
        "host op fails at prefill",
        Point::Prefill,
        Fault::HostOp,
        ErrorKind::Device,
    ),
    #[cfg(feature = "mlx")]
    request(
        "host op fails at token 5",
        Point::Step(5),
        Fault::HostOp,
        ErrorKind::Device,
    ),
    #[cfg(feature = "mlx")]
    request(
        "host op panics at token 5",
        Point::Step(5),
        Fault::HostOpPanic,
        ErrorKind::Device,
    ),
    #[cfg(feature = "mlx")]
    request(
        "host op fails while token 5 is read",
        Point::ReadAt(5),
        Fault::HostOp,
        ErrorKind::Device,
    ),
    Case {
        name: "latency",
        what: What::Latency,
        error: None,
        during: (EngineHealth::Degraded, &["hung"]),
        neighbours: [Answered, Answered],
        steps: &[],
        after: &[],
    },
    Case {
        name: "hang",
        what: What::Hang(Fault::Hang),
        error: Some(ErrorKind::Unavailable),
        during: (EngineHealth::Unhealthy, &["hung"]),
        neighbours: [Again, Answered],
        steps: RELOAD,
        after: &[],
    },
    #[cfg(feature = "mlx")]
    Case {
        name: "hang in a host op",
        what: What::Hang(Fault::HostOpHang),
        error: Some(ErrorKind::Unavailable),
        during: (EngineHealth::Unhealthy, &["hung"]),
        neighbours: [Again, Answered],
        steps: RELOAD,
        after: &[],
    },
    Case {
        name: "panic of the worker",
        what: What::Worker,
        error: Some(ErrorKind::WorkerPanicked),
        during: (EngineHealth::Unhealthy, FAULT),
        neighbours: [Answered, Answered],
        steps: &[],
        after: &[],
    },
    Case {
        name: "worker killed",
        what: What::WorkerEnds,
        error: Some(ErrorKind::WorkerPanicked),
        during: (EngineHealth::Unhealthy, GONE),
        neighbours: [Again, Again],
        steps: RELOAD,
        after: &[],
    },
    #[cfg(feature = "mlx")]
    Case {
        name: "allocation limit",
        what: What::Memory,
        error: Some(ErrorKind::OutOfMemory),
        during: (EngineHealth::Unhealthy, LACK),
        neighbours: [Answered, Answered],
        steps: &[],
        after: &["out_of_memory"],
    },
    Case {
        name: "error at load",
        what: What::Load,
        error: Some(ErrorKind::ModelLoad),
        during: (EngineHealth::Unhealthy, GONE),
        neighbours: [Again, Again],
        steps: RELOAD,
        after: &[],
    },
];

impl Case {
    /// Whether the fault can be put under a model of this kind: the mock has no graph, and no memory.
    fn is_for(&self, kind: Kind) -> bool {
        #[cfg(feature = "mlx")]
        let inside = match self.what {
            What::Request(_, fault) | What::Hang(fault) => {
                matches!(fault, Fault::HostOp | Fault::HostOpPanic | Fault::HostOpHang)
            }
            What::Memory => true,
            _ => false,
        };
        #[cfg(not(feature = "mlx"))]
        let inside = false;
        !inside || kind != Kind::Mock
    }
}

/// An engine under faults, which is loaded again where a fault asks for it.
struct Stage {
    plan: Arc<Plan>,
    /// Whether the next load fails.
    fails: Arc<AtomicBool>,
    engine: Arc<Reloadable<Engine>>,
    /// The tokens of the neighbours.
    expected: [Vec<u32>; 2],
}

impl Stage {
    async fn new(kind: Kind) -> Self {
        let plan = Arc::new(Plan::default());
        let fails = Arc::new(AtomicBool::new(false));
        let (planned, failing) = (Arc::clone(&plan), Arc::clone(&fails));
        let engine = Reloadable::load(move || {
            let (plan, fails) = (Arc::clone(&planned), failing.swap(false, Ordering::Relaxed));
            Box::pin(async move {
                if fails {
                    return Err(EngineError::model_load("faulty", "told to fail"));
                }
                let config = EngineConfig {
                    // One that comes behind waits until another has ended.
                    max_batch: 2,
                    ..config()
                };
                load(kind, &plan, config).await
            })
        });
        let engine = engine.await.expect("it loads");
        let engine = engine.with_unload_limit(Duration::from_millis(50));
        Self {
            expected: [
                tokens(&engine, NEIGHBOURS[0]).await,
                tokens(&engine, NEIGHBOURS[1]).await,
            ],
            plan,
            fails,
            engine: Arc::new(engine),
        }
    }
}

/// The engine, watched and brought back, for one fault.
struct Scene<'a> {
    stage: &'a Stage,
    plan: &'a Plan,
    engine: Resilient<Monitored<Arc<Reloadable<Engine>>>>,
}

/// What the neighbours are asked. On the mock, which says it back, the answers are as long as on a model.
const NEIGHBOURS: [&str; 2] = ["Red as the evening sun,", "Blue as the morning sea,"];

/// What came of a fault.
#[derive(Debug)]
struct Found {
    error: Option<EngineError>,
    during: HealthReport,
    neighbours: [Neighbour; 2],
    report: RecoveryReport,
}

impl<'a> Scene<'a> {
    async fn new(stage: &'a Stage, what: What) -> Self {
        let engine = stage.engine.engine().expect("it is loaded");
        engine.clear_prefix_cache().await.expect("it is served");
        let mut health = HealthConfiguration {
            max_consecutive_failures: 1,
            ..HealthConfiguration::default()
        };
        let mut recovery = RecoveryConfiguration {
            automatic: false,
            ..RecoveryConfiguration::default()
        };
        match what {
            What::Latency => health.degraded_turn_s = 0.01,
            What::Hang(_) => {
                (health.degraded_turn_s, health.unhealthy_turn_s) = (1.0, 1.0);
                // Longer than any turn that ends, and no longer than the test has to take.
                (recovery.automatic, recovery.hang_limit) = (true, Some(Duration::from_secs(3)));
            }
            _ => {}
        }
        let engine = Monitored::builder(Arc::clone(&stage.engine)).health(health);
        let resilience = ResilienceConfiguration {
            recovery,
            ..ResilienceConfiguration::default()
        };
        let engine = Resilient::builder(engine.build().expect("valid")).configuration(resilience);
        Self {
            stage,
            plan: &stage.plan,
            engine: engine.recoverable().build().expect("valid"),
        }
    }

    fn health(&self) -> HealthReport {
        self.engine.engine().health()
    }

    /// Health, once there is this reason.
    async fn health_says(&self, reason: &str) -> HealthReport {
        loop {
            let report = self.health();
            if reasons(&report).contains(&reason.to_owned()) {
                return report;
            }
            tokio::task::yield_now().await;
        }
    }

    async fn ask(&self, prompt: Prompt, params: GenerateParams) -> Result<Vec<u32>, EngineError> {
        Ok(self.engine.generate(prompt, params).await?.tokens)
    }

    async fn neighbour(&self, which: usize) -> Result<Vec<u32>, EngineError> {
        self.ask(Prompt::text(NEIGHBOURS[which]), greedy()).await
    }

    /// Has the worker held where the victim begins, until `then` has handed over what it hands over at its first poll. The
    /// fault comes after that.
    async fn beside<T>(
        &self,
        (point, fault): (Point, Fault),
        stays: bool,
        then: impl Future<Output = T>,
    ) -> T {
        self.plan.hangs.notified().await;
        self.plan.set(point, fault, stays);
        let (got, ()) = futures::join!(then, async { self.plan.open() });
        got
    }

    /// Lets it happen, and brings the engine back.
    async fn suffer(&self, what: What) -> Found {
        match what {
            What::Request(point, fault) => self.request(point, fault).await,
            What::Latency => self.latency().await,
            What::Hang(fault) => self.hang(fault).await,
            What::Worker => self.worker().await,
            What::WorkerEnds => self.worker_ends().await,
            #[cfg(feature = "mlx")]
            What::Memory => self.memory().await,
            What::Load => self.load().await,
        }
    }

    async fn request(&self, point: Point, fault: Fault) -> Found {
        self.plan.set(point, fault, true);
        let mut events = self.engine.engine().subscribe();
        let (failed, beside, behind) =
            futures::join!(self.ask(prompt(), victim()), self.neighbour(0), self.neighbour(1));
        self.recovered(failed.err(), changed(&mut events), [beside, behind])
            .await
    }

    async fn latency(&self) -> Found {
        self.plan.set(Point::Step(1), Fault::Pause, false);
        let slow = async {
            self.plan.hangs.notified().await;
            let during = self.health_says("hung").await;
            self.plan.open();
            during
        };
        let (victim, beside, behind, during) = futures::join!(
            self.ask(prompt(), victim()),
            self.neighbour(0),
            self.neighbour(1),
            slow
        );
        self.recovered(victim.err(), during, [beside, behind]).await
    }

    async fn hang(&self, fault: Fault) -> Found {
        self.plan.set(Point::Prefill, Fault::Pause, false);
        let behind = async {
            // The second time is where it hangs, and nobody is heard any more.
            self.plan.hangs.notified().await;
            let found = self.health_says("hung").map(|during| {
                assert!(!during.is_live(), "{during:?}");
                during
            });
            futures::join!(self.neighbour(1), found)
        };
        let others = self.beside((Point::Step(8), fault), true, async {
            futures::join!(self.neighbour(0), behind)
        });
        let (victim, (beside, (behind, during))) = futures::join!(self.ask(prompt(), victim()), others);
        // What hung ends, now that nobody waits for it.
        self.plan.open();
        let report = self.engine.status().last_recovery.expect("it was recovered");
        assert!(report.automatic && report.before.is_some(), "{report:?}");
        Found {
            report,
            ..self.recovered(victim.err(), during, [beside, behind]).await
        }
    }

    async fn worker(&self) -> Found {
        self.plan.set(Point::Step(1), Fault::Pause, false);
        let mut events = self.engine.engine().subscribe();
        // The first answer that ends is cut for the cache. The victim still runs then, and one waits behind it.
        let others = self.beside((Point::Truncate, Fault::Panic), false, async {
            futures::join!(self.neighbour(0), self.neighbour(1))
        });
        let long = victim().with_max_tokens(400).with_ignore_eos(true);
        let (failed, (beside, behind)) = futures::join!(self.ask(prompt(), long), others);
        self.recovered(failed.err(), changed(&mut events), [beside, behind])
            .await
    }

    async fn worker_ends(&self) -> Found {
        self.plan.set(Point::Step(1), Fault::Pause, false);
        let others = self.beside((Point::Bytes, Fault::Panic), true, self.neighbour(0));
        let (failed, beside) = futures::join!(self.ask(prompt(), victim()), others);
        assert!(
            self.engine.backend().is_some(),
            "once is no reason for the worker to end"
        );
        let behind = self.neighbour(1).await;
        let during = self.health_says("not_loaded").await;
        self.recovered(failed.err(), during, [beside, behind]).await
    }

    #[cfg(feature = "mlx")]
    async fn memory(&self) -> Found {
        let mut events = self.engine.engine().subscribe();
        // It runs, and is within its first page of keys and values to the end.
        let running = self.engine.stream(Prompt::text(NEIGHBOURS[0]), greedy()).await;
        let mut running = running.expect("it is taken");
        let started = running.next().await;
        assert!(matches!(started, Some(Ok(GenerationEvent::Started { .. }))));
        // The victim gets to the end of its first page, and is held where it has begun.
        self.plan.set(Point::Step(1), Fault::Pause, false);
        let words = Prompt::text("one two three four five six seven eight nine ten ".repeat(5));
        let long = victim().with_max_tokens(100).with_ignore_eos(true);
        let limit = async {
            self.plan.hangs.notified().await;
            mlx_engine_models::set_memory_limit(Some(1));
            self.plan.open();
        };
        let (failed, beside, ()) = futures::join!(self.ask(words, long), collect_events(running), limit);
        mlx_engine_models::set_memory_limit(None);
        let beside = beside.map(|output| output.tokens);
        let behind = self.neighbour(1).await;
        self.recovered(failed.err(), changed(&mut events), [beside, behind])
            .await
    }

    async fn load(&self) -> Found {
        self.stage.fails.store(true, Ordering::Relaxed);
        let loaded = self.engine.engine().recover(RecoveryStep::ReloadModel).await;
        let (beside, behind) = (self.neighbour(0).await, self.neighbour(1).await);
        let during = self.health();
        self.recovered(loaded.err(), during, [beside, behind]).await
    }

    /// Brings the engine back, has the neighbours ask again who heard an error, and then looks whether all is well.
    async fn recovered(
        &self,
        error: Option<EngineError>,
        during: HealthReport,
        neighbours: [Result<Vec<u32>, EngineError>; 2],
    ) -> Found {
        let report = self.engine.attempt_recovery().await;
        assert!(report.recovered, "{report:?}");
        let mut got = [Answered; 2];
        for (which, answer) in neighbours.into_iter().enumerate() {
            let answer = if let Ok(tokens) = answer {
                tokens
            } else {
                got[which] = Again;
                self.neighbour(which).await.expect("it works again")
            };
            assert_eq!(answer, self.stage.expected[which], "neighbour {which}");
        }
        // The victim is answered too, once nothing is wrong any more.
        self.plan.clear();
        let answer = self.ask(prompt(), victim()).await.expect("it works again");
        assert!(!answer.is_empty());
        Found {
            error,
            during,
            neighbours: got,
            report,
        }
    }
}

/// What health changed to first: to what it was when the victim had its error. Who was answered later has made it well again.
fn changed(events: &mut HealthEvents) -> HealthReport {
    let event = events.next().now_or_never().flatten().expect("health changed");
    HealthReport {
        status: event.to,
        reasons: event.reasons,
    }
}

/// The reasons of a report by their names, but for the one that the mock always is.
fn reasons(report: &HealthReport) -> Vec<String> {
    let names = report.reasons.iter().map(|reason| {
        let json = serde_json::to_value(reason).expect("reasons can be written");
        json["reason"].as_str().unwrap_or_default().to_owned()
    });
    names.filter(|name| name != "mock_in_use").collect()
}

/// How health is with these reasons and no fault: the mock is no model.
fn well(kind: Kind, reasons: &[&str]) -> EngineHealth {
    if kind == Kind::Mock || !reasons.is_empty() {
        EngineHealth::Degraded
    } else {
        EngineHealth::Healthy
    }
}

async fn check(kind: Kind) {
    let stage = Stage::new(kind).await;
    for case in CASES.iter().filter(|case| case.is_for(kind)) {
        let context = format!("{} on {kind:?}", case.name);
        let scene = Scene::new(&stage, case.what).await;
        let before = scene.health();
        assert_eq!(before.status, well(kind, &[]), "{context}, before: {before:?}");
        let Found {
            error,
            during,
            neighbours,
            report,
        } = scene.suffer(case.what).await;
        let context = format!("{context}: {error:?}, {during:?}, {report:?}");
        assert_eq!(error.as_ref().map(ErrorKind::of), case.error, "{context}");
        assert_eq!(
            (during.status, &reasons(&during)[..]),
            (case.during.0, &owned(case.during.1)[..]),
            "{context}"
        );
        assert_eq!(neighbours, case.neighbours, "{context}");
        let steps: Vec<_> = report.steps.iter().map(|step| step.step).collect();
        assert_eq!(steps, case.steps, "{context}");
        let after = scene.health();
        assert_eq!(
            (after.status, reasons(&after)),
            (well(kind, case.after), owned(case.after)),
            "{context}, after: {after:?}"
        );
    }
}

#[tokio::test]
async fn each_fault_of_the_mock_is_told_survived_and_recovered_from() {
    check(Kind::Mock).await;
}

/// Needs the process for itself, as a limit of memory is the process's.
#[cfg(feature = "mlx")]
#[tokio::test]
async fn each_fault_of_a_model_is_told_survived_and_recovered_from() {
    check(Kind::Mlx).await;
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}
