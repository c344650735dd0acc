//! `mlx-engine doctor`.

use std::time::Duration;

use mlx_engine::{
    BreakerState, EngineStatus, FallbackPolicy, InferenceEngine, RecoveryConfiguration,
    ResilienceConfiguration, hub_cache, platform,
};
use serde_json::json;

use crate::args::Doctor;
use crate::failure::Failure;
use crate::output::outln;

pub(crate) async fn run(args: &Doctor) -> Result<(), Failure> {
    let platform = platform();
    let mlx = platform.require_mlx().and_then(|()| mlx_opens());
    let reason = mlx.as_ref().err().map(ToString::to_string);
    let hint = mlx.as_ref().err().and_then(mlx_engine::EngineError::hint);
    let kernels = kernels();
    let cache = hub_cache();
    let examined = match &args.model {
        Some(model) => Some(examined(model).await?),
        None => None,
    };
    let verdict = examined.as_ref().map_or(Ok(()), verdict);
    if args.json {
        outln!(
            "{}",
            json!({"platform": platform, "mlx": reason.is_none(), "problem": reason, "hint": hint, "hub_cache": cache,
                   "health": examined.as_ref().map(|model| &model.status.engine.health), "status": examined.as_ref().map(|model| &model.status),
                   "resilience": examined.as_ref().map(|model| &model.status.resilience),
                   "recovery": examined.as_ref().map(|model| &model.recovery),
                   "token_s": examined.as_ref().map(|model| model.token_s),
                   "cpu_kernels": kernels.as_ref().ok().map(|(name, _)| name), "cpu_threads": kernels.as_ref().ok().map(|(_, threads)| threads)})
        );
        return verdict;
    }
    outln!(
        "system      {} {}{}",
        platform.os,
        platform.arch,
        if platform.simulator { " (simulator)" } else { "" }
    );
    match platform.memory_bytes {
        Some(bytes) => outln!("memory      {:.1} GiB", bytes as f64 / f64::from(1 << 30)),
        None => outln!("memory      unknown"),
    }
    outln!(
        "mlx         {}",
        if platform.mlx_compiled {
            "in this build"
        } else {
            "not in this build"
        }
    );
    match &reason {
        None => outln!("device      {}", platform.device),
        Some(reason) => outln!("device      none: {reason}"),
    }
    match kernels {
        Ok((name, threads)) => outln!("cpu kernels {name}, {threads} threads"),
        Err(problem) => outln!("cpu kernels none: {problem}"),
    }
    match cache {
        Some(path) if path.is_dir() => outln!("hub cache   {}", path.display()),
        Some(path) => outln!("hub cache   {} (not there yet)", path.display()),
        None => outln!("hub cache   unknown: HOME is not set"),
    }
    if let Some(model) = &examined {
        print(model)?;
    }
    if let Some(hint) = hint {
        outln!("to do       {hint}; `cargo xtask setup` brings MLX to a checkout");
    }
    verdict
}

/// How long the token may take that is asked for.
const TOKEN_LIMIT: Duration = Duration::from_mins(2);

/// A failure where requests should not come to the model, or no token of it came.
fn verdict(model: &Examined) -> Result<(), Failure> {
    if !model.status.engine.ready {
        return Err(Failure::other("the model is not ready"));
    }
    if model.status.engine.metrics.probes.passed == 0 {
        return Err(Failure::other("the model gave no token"));
    }
    Ok(())
}

/// What was found of a model.
struct Examined {
    status: EngineStatus,
    recovery: RecoveryConfiguration,
    load_s: f64,
    /// How long the token took that was asked for.
    token_s: f64,
}

fn print(model: &Examined) -> Result<(), Failure> {
    let health = &model.status.engine.health;
    outln!("model       {}", health.status);
    for reason in &health.reasons {
        outln!("            {reason}");
    }
    let said = |yes: bool| if yes { "yes" } else { "no" };
    outln!(
        "            live: {}, ready: {}",
        said(model.status.engine.live),
        said(model.status.engine.ready)
    );
    outln!("load        {:.2} s", model.load_s);
    let probes = &model.status.engine.metrics.probes;
    let asked = probes.passed + probes.failed + probes.abandoned;
    outln!(
        "token       {} of {asked} came, {:.3} s",
        probes.passed,
        model.token_s
    );
    let recovery = &model.recovery;
    let automatic = if recovery.automatic {
        let hang = recovery.hang_limit.map_or(String::new(), |limit| {
            format!(", a hang counts from {:.0} s on", limit.as_secs_f64())
        });
        format!(
            "by itself {} times in {:.0} s at most{hang}",
            recovery.max_automatic,
            recovery.automatic_window.as_secs_f64()
        )
    } else {
        "where it is asked for".to_owned()
    };
    outln!(
        "recovery    {automatic}; {} so far",
        model.status.resilience.recoveries
    );
    outln!(
        "requests    circuit {}, {:.0} retries saved up",
        match model.status.resilience.breaker {
            BreakerState::Open => "open",
            BreakerState::HalfOpen => "half open",
            BreakerState::Closed => "closed",
        },
        model.status.resilience.retries_left
    );
    Ok(())
}

/// The health of a model, by a token of it, and how it would be brought back.
async fn examined(model: &str) -> Result<Examined, Failure> {
    #[cfg(feature = "hub")]
    if crate::load::fetches(crate::args::Backend::Auto) {
        crate::pull::bring(model).await?;
    }
    let engine = InferenceEngine::new()
        .with_registry(crate::registry::registry()?.clone())
        .with_fallback(FallbackPolicy::Never);
    engine.load_model(model).await?;
    look(&engine, TOKEN_LIMIT).await
}

/// How an engine is, by a token of it that may take so long.
async fn look(engine: &InferenceEngine, limit: Duration) -> Result<Examined, Failure> {
    let began = std::time::Instant::now();
    // Health has what came of it, also where it is given up.
    let _ = tokio::time::timeout(limit, engine.check_health()).await;
    let token_s = began.elapsed().as_secs_f64();
    Ok(Examined {
        status: engine.detailed_status(),
        recovery: ResilienceConfiguration::default().recovery,
        load_s: engine.load_seconds().unwrap_or_default(),
        token_s,
    })
}

/// The kernels of a CPU and their threads, or why there are none.
#[cfg(feature = "mlx")]
fn kernels() -> Result<(&'static str, usize), String> {
    mlx_engine::cpu_kernels().map_err(|error| {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        source.unwrap_or_else(|| error.to_string())
    })
}

#[cfg(not(feature = "mlx"))]
fn kernels() -> Result<(&'static str, usize), String> {
    Err("not in this build".to_owned())
}

#[cfg(feature = "mlx")]
fn mlx_opens() -> Result<(), mlx_engine::EngineError> {
    mlx_engine::mlx_device().map(|_| ())
}

#[cfg(not(feature = "mlx"))]
fn mlx_opens() -> Result<(), mlx_engine::EngineError> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use mlx_engine::{BackendChoice, MockFault, MockScript};

    use super::*;

    /// What is said of a mock of this script, whose token may take so long.
    async fn verdict_on(script: MockScript, limit: Duration) -> Result<(), Failure> {
        let engine = InferenceEngine::new()
            .with_backend(BackendChoice::Mock)
            .with_mock(script);
        engine.load_model("tiny").await?;
        verdict(&look(&engine, limit).await?)
    }

    #[tokio::test]
    async fn a_model_that_does_not_serve_is_a_failure() {
        let well = MockScript::reply("Paris");
        assert!(verdict_on(well.clone(), TOKEN_LIMIT).await.is_ok());
        let broken = verdict_on(well.clone().with_fault(0, MockFault::Device), TOKEN_LIMIT).await;
        assert!(matches!(broken, Err(Failure::Other(why)) if why.contains("not ready")));
        let slow = well.with_step_delay(Duration::from_secs(1));
        let late = verdict_on(slow, Duration::ZERO).await;
        assert!(matches!(late, Err(Failure::Other(why)) if why.contains("no token")));
    }
}
