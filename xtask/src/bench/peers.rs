//! Ours and the peers in turn, on the same weights in the same minutes.

use std::fs;
use std::path::Path;

use mlx_engine_kernels::{Ceilings, Isa, Pool, ceilings};
use serde_json::{Value, json};

use super::baseline;
use super::curves::{self, Curve};
use super::llama::Llama;
use super::machine;
use super::mlx_lm::MlxLm;
use super::ours::Ours;
use super::plot;
use super::report::{Figure, report, table};
use crate::error::{Context, Error, Result};
use crate::{packages, setup};

/// What is run besides, and what it is compared with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options<'a> {
    pub(crate) rounds: u32,
    /// Whether the curves are measured and drawn.
    pub(crate) curves: bool,
    /// A report to compare with, and by how many percent a figure may be worse.
    pub(crate) baseline: Option<(&'a Path, u32)>,
}

/// Tokens of the long prompt, and of each answer.
const PROMPT: u32 = 512;
const ANSWER: u32 = 128;
/// Tokens of each prompt where several are answered together, and how many there are.
const SHORT_PROMPT: u32 = 64;
const STREAMS: [u32; 3] = [1, 4, 8];
/// Tokens of a prompt and an answer that mlx-lm, at 10 to 20 tokens a second, does in a few seconds too.
const FEW: [u32; 2] = [32, 16];

/// Multiplications of a token in the blocks of the test model, and in its head, whose weights are its embedding.
const BLOCKS: f64 = 30.0 * (2.0 * 576.0 * 576.0 + 2.0 * 576.0 * 192.0 + 3.0 * 576.0 * 1536.0);
const HEAD: f64 = 49152.0 * 576.0;
/// Bytes of its keys and values at one position, in float16.
const KEYS_AND_VALUES: f64 = 30.0 * 2.0 * 192.0 * 2.0;

pub(crate) fn run(options: Options) -> Result<()> {
    let then = options
        .baseline
        .map(|(path, _)| baseline::read(path))
        .transpose()?;
    let cache = setup::fill(None, true)?;
    let model = cache.test_model();
    let bytes = fs::metadata(&model).context("read", &model)?.len() as f64;
    let target = packages::read()?.target;
    let peers = target.join("peers");
    fs::create_dir_all(&peers).context("make the folder", &peers)?;
    let ours = Ours::ready(&target, &model)?;
    let (kernels, threads) = ours.kernels()?;
    let llama = Llama::ready(&peers, &model, threads)?;
    let mlx_lm = MlxLm::ready(&peers, cache.oracle()?, &ours)?;
    let isa = Isa::from_environment().map_err(|error| Error::Refused(error.to_string()))?;
    let ceilings = ceilings(isa, &Pool::new(threads as usize));
    let mut figures = Figures::new(ceilings, bytes);
    let mut lines = curves::empty(threads);
    let mut loads = Vec::new();
    for round in 1..=options.rounds {
        println!("bench: round {round} of {}", options.rounds);
        loads.extend(machine::load());
        figures.round(&ours, &llama, &mlx_lm, threads)?;
        if options.curves {
            curves::round(&mut lines, &ours, &llama, threads)?;
        }
    }
    let figures = figures.list();
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
    print!("{}", table(&figures));
    let folder = target.join("bench");
    fs::create_dir_all(&folder).context("make the folder", &folder)?;
    let measured = if options.curves { &lines[..] } else { &[] };
    save(&folder, &machine, &figures, measured)?;
    if options.curves {
        let title = format!(
            "SmolLM2-135M-Instruct, {}, {threads} threads, {kernels}",
            machine::processor()
        );
        plot::write(&folder, &title, &lines)?;
        println!(
            "bench: curves are in {} and speed.png",
            folder.join("speed.svg").display()
        );
    }
    match (then, options.baseline) {
        (Some(then), Some((_, threshold))) => baseline::compare(&then, &figures, threshold),
        _ => Ok(()),
    }
}

fn save(folder: &Path, machine: &Value, figures: &[Figure], curves: &[Curve]) -> Result<()> {
    let (path, partial) = (folder.join("report.json"), folder.join("report.json.partial"));
    fs::write(&partial, format!("{:#}\n", report(machine, figures, curves))).context("write", &partial)?;
    fs::rename(&partial, &path).context("put in place", &path)?;
    println!("bench: all rounds are in {}", path.display());
    Ok(())
}

/// What is measured.
#[derive(Debug)]
struct Figures {
    prefill: Figure,
    decode: Figure,
    deep: Figure,
    short_prefill: Figure,
    short_decode: Figure,
    streams: [Figure; STREAMS.len()],
    start: Figure,
    memory: Figure,
}

const LLAMA: usize = 0;
const MLX_LM: usize = 1;

impl Figures {
    /// With what the machine would allow: bytes over bandwidth where each token reads all weights, and operations over
    /// the peak where several tokens share them.
    fn new(ceilings: Ceilings, weights: f64) -> Self {
        let read = |positions: f64| ceilings.read_bytes_per_s / (weights + positions * KEYS_AND_VALUES);
        let half = f64::from(ANSWER) / 2.0;
        let short = f64::from(SHORT_PROMPT);
        let together = |streams: u32| {
            let computed = ceilings.integer_ops_per_s / (2.0 * (BLOCKS + HEAD));
            let shared =
                ceilings.read_bytes_per_s / (weights / f64::from(streams) + (short + half) * KEYS_AND_VALUES);
            computed.min(shared)
        };
        let prefill = ceilings.integer_ops_per_s / (2.0 * BLOCKS);
        let few = f64::from(FEW[0]) + f64::from(FEW[1]) / 2.0;
        let names = ["1 stream", "4 streams together", "8 streams together"];
        let mut at = 0;
        let streams = names.map(|name| {
            let figure = Figure::new(name, "tok/s", Some(together(STREAMS[at])));
            at += 1;
            figure
        });
        Self {
            prefill: Figure::new("prefill of 512", "tok/s", Some(prefill)),
            decode: Figure::new("decode, depth 0", "tok/s", Some(read(half))),
            deep: Figure::new("decode, depth 512", "tok/s", Some(read(f64::from(PROMPT) + half))),
            short_prefill: Figure::new("prefill of 32", "tok/s", Some(prefill)),
            short_decode: Figure::new("decode, depth 32", "tok/s", Some(read(few))),
            streams,
            start: Figure::new("start to first token", "s", None),
            memory: Figure::new("peak memory", "MB", None),
        }
    }

    /// Measures each once more, ours before the peers.
    fn round(&mut self, ours: &Ours, llama: &Llama, mlx_lm: &MlxLm, threads: u32) -> Result<()> {
        for (at, first) in [None, Some(MLX_LM)]
            .into_iter()
            .zip([ours.first_token()?, mlx_lm.first_token()?])
        {
            let megabytes = first.peak_bytes.map(|peak| peak as f64 / 1e6);
            push(&mut self.start, at, Some(first.seconds));
            push(&mut self.memory, at, megabytes);
        }

        let short = ours.one(1, ANSWER, threads, 3)?;
        let long = ours.one(PROMPT, ANSWER, threads, 3)?;
        self.prefill.ours.push(long.prefill);
        self.decode.ours.push(short.decode);
        self.deep.ours.push(long.decode);
        self.prefill.peers[LLAMA].push(llama.prefill(PROMPT, threads, 3)?);
        self.decode.peers[LLAMA].push(llama.decode(0, ANSWER, threads, 3)?);
        self.deep.peers[LLAMA].push(llama.decode(PROMPT, ANSWER, threads, 3)?);

        let [prompt, answer] = FEW;
        let few = ours.one(prompt, answer, threads, 3)?;
        self.short_prefill.ours.push(few.prefill);
        self.short_decode.ours.push(few.decode);
        self.short_prefill.peers[LLAMA].push(llama.prefill(prompt, threads, 3)?);
        self.short_decode.peers[LLAMA].push(llama.decode(prompt, answer, threads, 3)?);
        let few = mlx_lm.one(prompt, answer)?;
        self.short_prefill.peers[MLX_LM].push(few.prefill);
        self.short_decode.peers[MLX_LM].push(few.decode);

        let together = ours.together(SHORT_PROMPT, ANSWER, &STREAMS)?;
        for (figure, speeds) in self.streams.iter_mut().zip(together) {
            figure.ours.push(speeds.decode);
        }
        let together = llama.together(SHORT_PROMPT, ANSWER, &STREAMS)?;
        for (figure, speeds) in self.streams.iter_mut().zip(together) {
            figure.peers[LLAMA].push(speeds.decode);
        }
        Ok(())
    }

    /// In the order of the table.
    fn list(self) -> Vec<Figure> {
        let mut figures = vec![self.prefill, self.decode, self.deep];
        figures.extend([self.short_prefill, self.short_decode]);
        figures.extend(self.streams);
        figures.extend([self.start, self.memory]);
        figures
    }
}

/// Adds a value of ours, or of a peer.
fn push(figure: &mut Figure, peer: Option<usize>, value: Option<f64>) {
    match peer {
        None => figure.ours.extend(value),
        Some(peer) => figure.peers[peer].extend(value),
    }
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
        let figures = Figures::new(ceilings, 98e6);
        let [one, .., eight] = &figures.streams;
        assert!(one.limit < eight.limit);
        assert_eq!(eight.name, format!("{} streams together", STREAMS[2]));
        let Figures {
            prefill,
            decode,
            deep,
            ..
        } = figures;
        assert!((prefill.limit.unwrap() - 4709.0).abs() < 1.0);
        assert!((decode.limit.unwrap() - 502.8).abs() < 1.0);
        assert!(deep.limit < decode.limit);
    }
}
