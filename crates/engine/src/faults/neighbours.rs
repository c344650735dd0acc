//! What requests get beside one that fails.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use mlx_engine_core::{EngineError, GenerateParams, LlmEngine, Prompt, collect_events};

use super::plan::{Fault, Plan, Point};
use super::{KINDS, Kind, config, faults, greedy, is, load, prompt, tokens, victim};
use crate::EngineConfig;
use crate::engine::Engine;

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
