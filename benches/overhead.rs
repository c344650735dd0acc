//! What stands between a token and the caller: the engine alone, with everything that watches and guards it around it, and in a
//! process of its own, in turn.
//!
//! Times are those between two events of a stream, in nanoseconds. With the mock, whose tokens cost nothing, they are what the
//! way costs; with the model that `MLX_ENGINE_TEST_MODEL` names, what a caller sees. `cargo bench -p mlx-engine --bench overhead`.

use std::time::Instant;

use futures::StreamExt;
use mlx_engine::prelude::*;
use mlx_engine::{LlmEngine, MockScript};

const ROUNDS: u32 = 5;
const TOKENS: u32 = 200;

fn prompt(round: u32) -> Prompt {
    Prompt::tokens((0..32).map(|i| 32 + (i * 7 + round * 13) % 200))
}

/// The times between the events of an answer.
async fn times(engine: &dyn LlmEngine, round: u32, to: &mut Vec<u128>) {
    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(TOKENS)
        .with_ignore_eos(true);
    let mut events = engine.stream(prompt(round), params).await.expect("it is taken");
    let mut last = None;
    while let Some(event) = events.next().await {
        if event.expect("an event").tokens().is_empty() {
            continue;
        }
        let now = Instant::now();
        if let Some(last) = last.replace(now) {
            to.push(now.duration_since(last).as_nanos());
        }
    }
}

fn report(name: &str, times: &mut [u128]) {
    times.sort_unstable();
    let at = |part: usize| times[(times.len() - 1) * part / 1000];
    let mean = times.iter().sum::<u128>() / times.len() as u128;
    println!(
        "{name:<28} p50 {:>9}  p99 {:>9}  mean {mean:>9}",
        at(500),
        at(990)
    );
}

async fn compare(title: &str, here: &InferenceEngine, apart: &InferenceEngine) {
    let bare = here.engine().expect("it is here");
    let (mut alone, mut watched, mut process) = (Vec::new(), Vec::new(), Vec::new());
    // The first round warms up. All get the same prompts: what is said decides which tokens come together.
    for round in 0..=ROUNDS {
        if round == 1 {
            (alone, watched, process) = Default::default();
        }
        times(&*bare, round, &mut alone).await;
        times(here, round, &mut watched).await;
        times(apart, round, &mut process).await;
    }
    println!("{title}, {} times each", alone.len());
    report("the engine alone", &mut alone);
    report("watched and guarded", &mut watched);
    report("in a process of its own", &mut process);
}

fn main() {
    #[cfg(unix)]
    if std::env::args().any(|argument| argument == "serve-engine") {
        mlx_engine::serve_child().expect("it is started by this program");
        return;
    }
    #[cfg(unix)]
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(async {
            let program = || mlx_engine::Program::this().expect("its path").arg("serve-engine");
            let mock = || {
                InferenceEngine::new()
                    .with_backend(BackendChoice::Mock)
                    .with_mock(MockScript::reply("x".repeat(TOKENS as usize)))
            };
            let (here, apart) = (
                mock(),
                mock().with_child_process(program(), mlx_engine::SupervisorConfiguration::default()),
            );
            here.load_model("mock").await.expect("it loads");
            apart.load_model("mock").await.expect("it loads");
            compare("mock", &here, &apart).await;
            if let Ok(model) = std::env::var("MLX_ENGINE_TEST_MODEL") {
                let here = InferenceEngine::new();
                let apart = InferenceEngine::new()
                    .with_child_process(program(), mlx_engine::SupervisorConfiguration::default());
                here.load_model(&model).await.expect("it loads");
                apart.load_model(&model).await.expect("it loads");
                compare("model", &here, &apart).await;
            }
        });
}
