//! Ours and the peers in turn, on the same weights in the same minutes.

use std::fs;

use mlx_engine_kernels::{Ceilings, Isa, Pool, ceilings};
use serde_json::json;

use super::llama::Llama;
use super::machine;
use super::ours::Ours;
use super::report::{Figure, report, table};
use crate::error::{Context, Error, Result};
use crate::{packages, setup};

/// Tokens of the long prompt, and of each answer.
const PROMPT: u32 = 512;
const ANSWER: u32 = 128;
/// Tokens of each prompt where several are answered together, and how many there are.
const SHORT_PROMPT: u32 = 64;
const STREAMS: [u32; 2] = [1, 8];

/// Multiplications of a token in the blocks of the test model, and in its head, whose weights are its embedding.
const BLOCKS: f64 = 30.0 * (2.0 * 576.0 * 576.0 + 2.0 * 576.0 * 192.0 + 3.0 * 576.0 * 1536.0);
const HEAD: f64 = 49152.0 * 576.0;
/// Bytes of its keys and values at one position, in float16.
const KEYS_AND_VALUES: f64 = 30.0 * 2.0 * 192.0 * 2.0;

pub(crate) fn run(rounds: u32) -> Result<()> {
    let cache = setup::fill(None, false)?;
    let model = cache.test_model();
    let bytes = fs::metadata(&model).context("read", &model)?.len() as f64;
    let target = packages::read()?.target;
    let peers = target.join("peers");
    fs::create_dir_all(&peers).context("make the folder", &peers)?;
    let ours = Ours::ready(&target, &model)?;
    let (kernels, threads) = ours.kernels()?;
    let llama = Llama::ready(&peers, &model, threads)?;
    let isa = Isa::from_environment().map_err(|error| Error::Refused(error.to_string()))?;
    let ceilings = ceilings(isa, &Pool::new(threads as usize));
    let mut figures = figures(ceilings, bytes);
    let mut loads = Vec::new();
    for round in 1..=rounds {
        println!("bench: round {round} of {rounds}");
        loads.extend(machine::load());
        let [prefill, decode, deep, one, eight, start, memory] = &mut figures;
        let first = ours.first_token()?;
        start.ours.push(first.seconds);
        memory.ours.extend(first.peak_bytes.map(|peak| peak as f64 / 1e6));
        for (figure, value) in [&mut *prefill, &mut *decode, &mut *deep]
            .into_iter()
            .zip(ours.alone(PROMPT, ANSWER)?)
        {
            figure.ours.push(value);
        }
        for (figure, value) in [&mut *prefill, decode, deep]
            .into_iter()
            .zip(llama.alone(PROMPT, ANSWER)?)
        {
            figure.peer.push(value);
        }
        let together = ours.together(SHORT_PROMPT, ANSWER, &STREAMS)?;
        for (figure, value) in [&mut *one, &mut *eight].into_iter().zip(together) {
            figure.ours.push(value);
        }
        let together = llama.together(SHORT_PROMPT, ANSWER, &STREAMS)?;
        for (figure, value) in [one, eight].into_iter().zip(together) {
            figure.peer.push(value);
        }
    }
    let machine = json!({"processor": machine::processor(), "kernels": kernels, "threads": threads, "loads": loads,
                         "read_bytes_per_s": ceilings.read_bytes_per_s, "int8_ops_per_s": ceilings.integer_ops_per_s});
    println!(
        "\n{}, {threads} threads, kernels {kernels}: reads {:.1} GB/s, multiplies and adds {:.2} Top/s of bytes; load {}",
        machine::processor(),
        ceilings.read_bytes_per_s / 1e9,
        ceilings.integer_ops_per_s / 1e12,
        loads
            .iter()
            .map(|load| format!("{load:.1}"))
            .collect::<Vec<_>>()
            .join(", ")
    );
    print!("{}", table("llama.cpp", &figures));
    let folder = target.join("bench");
    fs::create_dir_all(&folder).context("make the folder", &folder)?;
    let (path, partial) = (folder.join("report.json"), folder.join("report.json.partial"));
    fs::write(&partial, format!("{:#}\n", report(&machine, &figures))).context("write", &partial)?;
    fs::rename(&partial, &path).context("put in place", &path)?;
    println!("bench: all rounds are in {}", path.display());
    Ok(())
}

/// What is measured, with what the machine would allow: bytes over bandwidth where each token reads all weights, and
/// operations over the peak where several tokens share them.
fn figures(ceilings: Ceilings, weights: f64) -> [Figure; 7] {
    let read = |positions: f64| ceilings.read_bytes_per_s / (weights + positions * KEYS_AND_VALUES);
    let half = f64::from(ANSWER) / 2.0;
    let short = f64::from(SHORT_PROMPT);
    let streams = f64::from(STREAMS[1]);
    let computed = ceilings.integer_ops_per_s / (2.0 * (BLOCKS + HEAD));
    let shared = ceilings.read_bytes_per_s / (weights / streams + (short + half) * KEYS_AND_VALUES);
    let figure = |name, unit, limit| Figure {
        name,
        unit,
        ours: Vec::new(),
        peer: Vec::new(),
        limit,
    };
    [
        figure(
            "prefill of 512",
            "tok/s",
            Some(ceilings.integer_ops_per_s / (2.0 * BLOCKS)),
        ),
        figure("decode, depth 0", "tok/s", Some(read(half))),
        figure("decode, depth 512", "tok/s", Some(read(f64::from(PROMPT) + half))),
        figure("1 stream", "tok/s", Some(read(short + half))),
        figure("8 streams together", "tok/s", Some(computed.min(shared))),
        figure("start to first token", "s", None),
        figure("peak memory", "MB", None),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_bytes_over_bandwidth_and_operations_over_the_peak() {
        let ceilings = Ceilings {
            read_bytes_per_s: 50e9,
            integer_ops_per_s: 1e12,
        };
        let [prefill, decode, deep, ..] = figures(ceilings, 98e6);
        assert!((prefill.limit.unwrap() - 4709.0).abs() < 1.0);
        assert!((decode.limit.unwrap() - 502.8).abs() < 1.0);
        assert!(deep.limit < decode.limit);
    }
}
