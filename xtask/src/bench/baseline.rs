//! What was measured now against a report that was kept.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::report::{Figure, PEERS, columns, digits, median, ratio};
use crate::error::{Context, Error, Result};

/// A figure then and now.
#[derive(Debug, PartialEq)]
struct Change {
    name: &'static str,
    /// What is compared: the ratio to the first peer that both have, or the figure itself.
    what: String,
    then: f64,
    now: f64,
    /// Above 1 where it has become better.
    better: f64,
}

/// Reads a report that an earlier call wrote.
pub(crate) fn read(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).context("read", path)?;
    let report: Value = serde_json::from_str(&text)
        .map_err(|error| Error::Refused(format!("{} is no report: {error}", path.display())))?;
    if report["figures"].as_array().is_none_or(Vec::is_empty) {
        return Err(Error::Refused(format!(
            "{} is no report: it has no figures\n  name a report.json that `cargo xtask bench --peers` wrote",
            path.display()
        )));
    }
    Ok(report)
}

/// Prints each figure then and now. An error where one has become worse by more than `threshold` percent.
pub(crate) fn compare(then: &Value, figures: &[Figure], threshold: u32) -> Result<()> {
    let changes = changes(then, figures);
    let mut rows: Vec<Vec<String>> = vec![
        ["figure", "compared", "then", "now", "better"]
            .map(str::to_owned)
            .to_vec(),
    ];
    rows.extend(changes.iter().map(|change| {
        vec![
            change.name.to_owned(),
            change.what.clone(),
            digits(change.then),
            digits(change.now),
            ratio(Some(change.better)),
        ]
    }));
    print!("{}", columns(&rows));
    verdict(&changes, threshold)
}

fn verdict(changes: &[Change], threshold: u32) -> Result<()> {
    if changes.is_empty() {
        return Err(Error::Refused(
            "the baseline has none of the figures that were measured".to_owned(),
        ));
    }
    let least = 1.0 / (1.0 + f64::from(threshold) / 100.0);
    let worse: Vec<_> = changes.iter().filter(|change| change.better < least).collect();
    if worse.is_empty() {
        println!("bench: nothing is worse than the baseline by more than {threshold}%");
        return Ok(());
    }
    let lines = worse
        .iter()
        .map(|change| {
            format!(
                "{}: {} then, {} now",
                change.name,
                digits(change.then),
                digits(change.now)
            )
        })
        .collect::<Vec<_>>();
    Err(Error::Refused(format!(
        "worse than the baseline by more than {threshold}%\n  {}",
        lines.join("\n  ")
    )))
}

/// Where both reports ran the same peer, ratios to it are compared: how fast the machine is at the moment falls out.
fn changes(then: &Value, figures: &[Figure]) -> Vec<Change> {
    let known = then["figures"].as_array().map(Vec::as_slice).unwrap_or_default();
    figures
        .iter()
        .filter_map(|figure| {
            let old = known.iter().find(|old| old["name"] == figure.name)?;
            let by_peer = PEERS.iter().enumerate().find_map(|(at, peer)| {
                let then = old["peers"][peer]["ratio"].as_f64()?;
                Some((format!("ratio to {peer}"), then, figure.ratio(at)?))
            });
            let itself = || {
                Some((
                    figure.unit.to_owned(),
                    old["ours"].as_f64()?,
                    median(&figure.ours)?,
                ))
            };
            let (what, then, now) = by_peer.or_else(itself)?;
            let better = if figure.less_is_better() {
                then / now
            } else {
                now / then
            };
            Some(Change {
                name: figure.name,
                what,
                then,
                now,
                better,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn decode(ours: f64, llama: &[f64]) -> Figure {
        Figure {
            ours: vec![ours],
            peers: [llama.to_vec(), Vec::new()],
            ..Figure::new("decode", "tok/s", None)
        }
    }

    fn start(seconds: f64) -> Figure {
        Figure {
            ours: vec![seconds],
            ..Figure::new("start", "s", None)
        }
    }

    fn kept() -> Value {
        json!({"figures": [
            {"name": "decode", "unit": "tok/s", "ours": 200.0, "peers": {"llama.cpp": {"ratio": 2.0}}},
            {"name": "start", "unit": "s", "ours": 0.5, "peers": {}},
        ]})
    }

    #[test]
    fn a_slower_machine_is_no_regression() {
        let changes = changes(&kept(), &[decode(100.0, &[50.0]), start(0.5)]);
        assert!(
            changes.iter().all(|change| (change.better - 1.0).abs() < 1e-9),
            "{changes:?}"
        );
        verdict(&changes, 0).unwrap();
    }

    #[test]
    fn less_time_is_better_and_less_speed_is_worse() {
        let found = changes(&kept(), &[decode(160.0, &[]), start(0.25)]);
        assert!(
            (found[0].better - 0.8).abs() < 1e-9 && (found[1].better - 2.0).abs() < 1e-9,
            "{found:?}"
        );
        let error = verdict(&found, 15).unwrap_err().to_string();
        assert!(
            error.contains("decode: 200 then, 160 now") && !error.contains("start"),
            "{error}"
        );
        verdict(&found, 30).unwrap();
    }

    #[test]
    fn a_report_without_figures_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        for text in ["{}", "{\"figures\": []}", "x"] {
            fs::write(&path, text).unwrap();
            assert!(read(&path).is_err(), "{text}");
        }
        fs::write(&path, kept().to_string()).unwrap();
        assert!(verdict(&changes(&read(&path).unwrap(), &[]), 15).is_err());
    }
}
