//! `mlx-engine doctor`.

use mlx_engine::{hub_cache, platform};
use serde_json::json;

use crate::args::Doctor;

pub(crate) fn run(args: &Doctor) {
    let platform = platform();
    let mlx = platform.require_mlx().and_then(|()| mlx_opens());
    let reason = mlx.as_ref().err().map(ToString::to_string);
    let hint = mlx.as_ref().err().and_then(mlx_engine::EngineError::hint);
    let cache = hub_cache();
    if args.json {
        println!(
            "{}",
            json!({"platform": platform, "mlx": reason.is_none(), "problem": reason, "hint": hint, "hub_cache": cache})
        );
        return;
    }
    println!(
        "system      {} {}{}",
        platform.os,
        platform.arch,
        if platform.simulator { " (simulator)" } else { "" }
    );
    match platform.memory_bytes {
        Some(bytes) => println!("memory      {:.1} GiB", bytes as f64 / f64::from(1 << 30)),
        None => println!("memory      unknown"),
    }
    println!(
        "mlx         {}",
        if platform.mlx_compiled {
            "in this build"
        } else {
            "not in this build"
        }
    );
    match &reason {
        None => println!("device      {}", platform.device),
        Some(reason) => println!("device      none: {reason}"),
    }
    match cache {
        Some(path) if path.is_dir() => println!("hub cache   {}", path.display()),
        Some(path) => println!("hub cache   {} (not there yet)", path.display()),
        None => println!("hub cache   unknown: HOME is not set"),
    }
    if let Some(hint) = hint {
        println!("to do       {hint}; `cargo xtask setup` brings MLX to a checkout");
    }
}

#[cfg(feature = "mlx")]
fn mlx_opens() -> Result<(), mlx_engine::EngineError> {
    mlx_engine::mlx_device().map(|_| ())
}

#[cfg(not(feature = "mlx"))]
fn mlx_opens() -> Result<(), mlx_engine::EngineError> {
    Ok(())
}
