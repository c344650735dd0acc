//! `mlx-engine models` on the hub.

use std::future::Future;
use std::sync::{Arc, Mutex};

use futures::TryStreamExt;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mlx_engine::hub::{FetchEvent, FileSelection, Hub, HubQuery, ModelSummary, SnapshotRequest};

use crate::cached::{reference, tell};
use crate::failure::Failure;
use crate::output::{errln, outln, print_json};
use crate::registry::registry;
use crate::table;

/// `models pull`.
pub(crate) async fn pull(
    model: &str,
    include: &[String],
    exclude: &[String],
    json: bool,
) -> Result<(), Failure> {
    let mut request = SnapshotRequest::new(reference(model)?);
    if !include.is_empty() || !exclude.is_empty() {
        if request.reference.file.is_some() {
            return Err(Failure::usage("patterns make no sense where one file is named"));
        }
        request = request.with_files(FileSelection::Patterns {
            allow: include.to_vec(),
            ignore: exclude.to_vec(),
        });
    }
    let hub = Hub::from_env()?;
    let bar = Bar::new();
    let snapshot = or_interrupt(&bar, hub.fetch(&request, &|event| bar.take(event))).await?;
    for path in &snapshot.refused {
        errln!("{path} is not fetched: it is a pickle, which runs what it holds");
    }
    if json {
        return print_json(&snapshot);
    }
    errln!(
        "{}: {} files, {}, of which {} were fetched",
        request.reference,
        snapshot.files.len(),
        table::size(snapshot.bytes),
        table::size(snapshot.fetched_bytes)
    );
    outln!("{}", snapshot.path.display());
    Ok(())
}

/// Brings a model that is not on this machine into the cache, whatever command asks for it; a path is nobody's to fetch.
/// What comes of it is found by the same reference.
pub(crate) async fn bring(model: &str) -> Result<(), Failure> {
    let hub = Hub::from_env()?;
    let bar = Bar::new();
    let registry = registry()?;
    let tell = |event| bar.take(event);
    or_interrupt(&bar, mlx_engine::find_or_fetch(model, registry, &hub, &tell)).await?;
    Ok(())
}

/// As [`bring`], of no more than the tokenizer, and says where it is.
#[cfg(feature = "mlx")]
pub(crate) async fn bring_tokenizer(model: &str) -> Result<mlx_engine::ModelLocation, Failure> {
    let hub = Hub::from_env()?;
    let bar = Bar::new();
    let registry = registry()?;
    let tell = |event| bar.take(event);
    or_interrupt(
        &bar,
        mlx_engine::find_or_fetch_tokenizer(model, registry, &hub, &tell),
    )
    .await
}

/// `models verify --repair`.
pub(crate) async fn repair(model: &str, json: bool) -> Result<(), Failure> {
    let reference = reference(model)?;
    let hub = Hub::from_env()?;
    let bar = Bar::new();
    let repaired = or_interrupt(&bar, hub.repair(&reference, &|event| bar.take(event))).await?;
    if json {
        return print_json(&repaired);
    }
    tell(&repaired.found)?;
    if !repaired.found.is_sound() {
        outln!("repaired; {} were fetched", table::size(repaired.fetched_bytes));
    }
    Ok(())
}

/// `models search --hub`.
pub(crate) async fn search(query: &HubQuery, json: bool) -> Result<(), Failure> {
    let hub = Hub::from_env()?;
    let bar = Arc::new(Bar::new());
    let told = Arc::clone(&bar);
    let search = hub.search_with(query, move |event| told.take(event))?;
    let search = search.try_collect::<Vec<ModelSummary>>();
    let found = tokio::select! {
        found = search => found?,
        _ = tokio::signal::ctrl_c() => return Err(Failure::Interrupted),
    };
    if json {
        return print_json(&found);
    }
    if found.is_empty() {
        return Err(Failure::other("no model of the hub is like that"));
    }
    let count = |number: Option<u64>| number.map(|number| number.to_string()).unwrap_or_default();
    let row = |model: ModelSummary| {
        vec![
            model.id,
            model.pipeline_tag.unwrap_or_default(),
            count(model.downloads),
            count(model.likes),
            if model.gated { "gated" } else { "" }.to_owned(),
        ]
    };
    let rows = found.into_iter().map(row).collect();
    table::print(&["MODEL", "TASK", "DOWNLOADS", "LIKES", ""], &[2, 3], rows)
}

/// Fetches until it is done or Ctrl-C comes. What has come by then is kept.
async fn or_interrupt<T, E: Into<Failure>>(
    bar: &Bar,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, Failure> {
    let done = tokio::select! {
        done = work => done,
        _ = tokio::signal::ctrl_c() => {
            bar.clear();
            errln!("interrupted; the same command again goes on from here");
            return Err(Failure::Interrupted);
        }
    };
    bar.clear();
    done.map_err(Into::into)
}

/// The progress on stderr: a bar on a terminal, and lines for what happens now and then.
struct Bar {
    bar: ProgressBar,
    /// What was said last, which is not said again.
    said: Mutex<String>,
}

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let template = "{bar:30} {decimal_bytes}/{decimal_total_bytes} {msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self {
            bar,
            said: Mutex::default(),
        }
    }

    fn clear(&self) {
        self.bar.finish_and_clear();
    }

    fn take(&self, event: FetchEvent) {
        match event {
            FetchEvent::Planned {
                files,
                bytes,
                present,
            } => {
                self.bar.set_length(bytes);
                self.bar.set_position(present);
                if present < bytes {
                    let (left, all) = (table::size(bytes - present), table::size(bytes));
                    self.say(format!("fetching {left} of {all} in {files} files"));
                }
            }
            FetchEvent::Progress(step) => {
                self.bar.set_position(step.done);
                let left = step.remaining.map_or_else(String::new, |left| {
                    format!(", {} left", indicatif::HumanDuration(left))
                });
                let rate = table::size(step.bytes_per_second);
                self.bar.set_message(format!("{rate}/s{left}  {}", step.file));
            }
            FetchEvent::Checking { done, bytes, .. } => {
                self.bar.set_length(bytes);
                self.bar.set_position(done);
                self.bar.set_message("comparing what is here");
            }
            FetchEvent::Waiting { file, holder } => {
                self.say(format!("waiting for {holder}, which is at {file}"));
            }
            FetchEvent::Retrying { file, reason, after } => {
                self.say(format!("{file}: {reason}; again in {:.1} s", after.as_secs_f64()));
            }
            FetchEvent::FromCache { reason } => {
                self.say(format!(
                    "the hub could not be asked ({reason}); the cache has the model"
                ));
            }
            _ => {}
        }
    }

    fn say(&self, line: String) {
        let mut said = self
            .said
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if *said != line {
            self.bar.suspend(|| errln!("{line}"));
            *said = line;
        }
    }
}
