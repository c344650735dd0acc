//! `mlx-engine models` on what is in the local cache.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mlx_engine::ModelReference;
use mlx_engine::hub::{CachedRepository, FileState, HubCache, HubReference, Verification};
use serde_json::json;

use crate::failure::Failure;
use crate::output::{errln, outln, print_json};
use crate::registry::registry;
use crate::table;

/// What a name means on the hub.
pub(crate) fn reference(model: &str) -> Result<HubReference, Failure> {
    match ModelReference::parse(model, registry()?)? {
        ModelReference::Hub(reference, _) => Ok(reference),
        _ => Err(Failure::usage(format!(
            "`{model}` is a path; this command is for models of the hub (`hf:owner/name` where a folder has the same name)"
        ))),
    }
}

/// `models list --cached`.
pub(crate) fn list(json: bool) -> Result<(), Failure> {
    let found = HubCache::from_env()?.repositories()?;
    if json {
        return print_json(&found);
    }
    if found.is_empty() {
        errln!("no model is in the cache");
    }
    let mut rows = Vec::new();
    for model in &found {
        for revision in &model.revisions {
            let short = revision.commit.get(..8).unwrap_or(&revision.commit);
            rows.push(vec![
                model.repo.to_string(),
                revision.refs.join(", "),
                short.to_owned(),
                revision.files.len().to_string(),
                table::size(revision.bytes),
            ]);
        }
        if model.revisions.is_empty() {
            let nothing = ["", "", "0", "not whole"].map(str::to_owned);
            rows.push([vec![model.repo.to_string()], nothing.to_vec()].concat());
        }
    }
    if rows.is_empty() {
        return Ok(());
    }
    table::print(&["MODEL", "REFS", "COMMIT", "FILES", "SIZE"], &[3, 4], rows)
}

/// `models du`.
pub(crate) fn usage(json: bool) -> Result<(), Failure> {
    let cache = HubCache::from_env()?;
    let found = cache.repositories()?;
    let sum = |of: fn(&CachedRepository) -> u64| found.iter().map(of).sum::<u64>();
    let bytes = sum(|model| model.bytes);
    let incomplete = sum(|model| model.incomplete_bytes);
    let unreferenced = sum(|model| model.unreferenced_bytes);
    if json {
        return print_json(&json!({
            "cache": cache.root(), "bytes": bytes, "incomplete_bytes": incomplete, "unreferenced_bytes": unreferenced,
            "models": found.iter().map(|model| json!({
                "repo": model.repo, "bytes": model.bytes, "incomplete_bytes": model.incomplete_bytes,
                "unreferenced_bytes": model.unreferenced_bytes, "last_modified": model.last_modified,
            })).collect::<Vec<_>>(),
        }));
    }
    let row = |name: &str, sizes: [u64; 3]| [vec![name.to_owned()], sizes.map(table::size).to_vec()].concat();
    let mut rows: Vec<_> = found
        .iter()
        .map(|model| {
            row(
                model.repo.as_str(),
                [model.bytes, model.incomplete_bytes, model.unreferenced_bytes],
            )
        })
        .collect();
    rows.push(row("total", [bytes, incomplete, unreferenced]));
    table::print(&["MODEL", "SIZE", "INCOMPLETE", "UNREFERENCED"], &[1, 2, 3], rows)?;
    if incomplete + unreferenced > 0 {
        errln!("`mlx-engine models prune` removes what is incomplete and unreferenced");
    }
    Ok(())
}

/// `models rm`.
pub(crate) fn remove(model: &str, json: bool) -> Result<(), Failure> {
    let reference = reference(model)?;
    // Who names no revision means the model.
    let all = !model.contains('@');
    let freed = HubCache::from_env()?.remove(&reference, all)?;
    if json {
        return print_json(&freed);
    }
    outln!(
        "{reference}: removed, {} are free again",
        table::size(freed.bytes)
    );
    Ok(())
}

/// `models prune`.
pub(crate) fn prune(dry_run: bool, json: bool) -> Result<(), Failure> {
    let report = HubCache::from_env()?.prune(dry_run)?;
    for (repo, holder) in &report.busy {
        errln!("{repo} is left alone: {holder} is at it");
    }
    if json {
        return print_json(&report);
    }
    for freed in &report.freed {
        let revisions = match freed.revisions.len() {
            0 => String::new(),
            1 => " and a revision".to_owned(),
            count => format!(" and {count} revisions"),
        };
        outln!(
            "{}: {} in {} files{revisions}",
            freed.repo,
            table::size(freed.bytes),
            freed.blobs
        );
    }
    let verb = if dry_run {
        "would be free again"
    } else {
        "are free again"
    };
    outln!("{} {verb}", table::size(report.bytes()));
    Ok(())
}

/// `models verify`.
pub(crate) async fn verify(model: &str, json: bool) -> Result<(), Failure> {
    let reference = reference(model)?;
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {decimal_bytes}/{decimal_total_bytes} read") {
        bar.set_style(style);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, seen) = (Arc::clone(&stop), bar.clone());
    let cache = HubCache::from_env()?;
    let mut work = tokio::task::spawn_blocking(move || {
        cache.verify(&reference, |done, total| {
            seen.set_length(total);
            seen.set_position(done);
            if stopped.load(Ordering::Relaxed) {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })
    });
    let report = tokio::select! {
        report = &mut work => report,
        _ = tokio::signal::ctrl_c() => {
            stop.store(true, Ordering::Relaxed);
            work.await
        }
    };
    bar.finish_and_clear();
    let report = report.map_err(|error| Failure::other(error.to_string()))??;
    if json {
        print_json(&report)?;
    } else {
        tell(&report)?;
    }
    if report.is_sound() {
        return Ok(());
    }
    errln!("hint: `mlx-engine models verify --repair {model}` fetches what is damaged or missing");
    Err(Failure::Told)
}

/// What a comparison found, a line for each file that is not sound.
pub(crate) fn tell(report: &Verification) -> Result<(), Failure> {
    for (path, state) in &report.files {
        match state {
            FileState::Sound => {}
            FileState::Damaged { got } => outln!("{path}: damaged, its hash is {got}"),
            FileState::Missing => outln!("{path}: missing"),
            _ => outln!("{path}: there is no hash to compare with"),
        }
    }
    let sound = report
        .files
        .iter()
        .filter(|(_, state)| *state == FileState::Sound)
        .count();
    outln!(
        "{}: {sound} of {} files are sound",
        report.repo,
        report.files.len()
    );
    Ok(())
}
