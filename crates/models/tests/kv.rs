//! Caches that do not keep everything as floats: against mlx-lm, and against themselves however tokens are fed.

use std::path::Path;

use mlx_engine_core::KvConfig;
use mlx_engine_models::{
    Compute, Decoder, DecoderBytes, Feed, FeedTokens, ModelError, Sequence, Source, Wanted,
};
use mlx_rs::Array;
use serde_json::Value;

fn load(name: &str, compute: Compute, config: &KvConfig) -> Decoder {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/tiny")
        .join(name);
    let source = Source::open(&folder).expect("the fixture opens");
    let decoder = Decoder::load(&source, compute, &mut |_| Ok(())).expect("the fixture loads");
    decoder.with_kv(config).expect("keys and values are kept so")
}

fn rotating() -> KvConfig {
    KvConfig {
        max_positions: Some(64),
        keep: 4,
        ..KvConfig::default()
    }
}

fn integers(bits: u32) -> KvConfig {
    KvConfig {
        bits: Some(bits),
        group_size: 32,
        ..KvConfig::default()
    }
}

fn read(logits: &Array) -> Vec<f32> {
    let logits = logits.contiguous().expect("an array");
    logits.eval().expect("the step runs");
    logits.as_slice::<f32>().to_vec()
}

/// The logits of single steps, as mlx-lm has them with such a cache.
fn check(entry: &str, config: &KvConfig) {
    let oracle: Value = serde_json::from_str(include_str!("fixtures/kv.json")).expect("JSON");
    let oracle = &oracle[entry];
    let numbers = |value: &Value| -> Vec<f64> {
        let numbers = value.as_array().expect("a list").iter();
        numbers.map(|number| number.as_f64().expect("a number")).collect()
    };
    for compute in [Compute::Exact, Compute::Mlx] {
        let decoder = load(oracle["model"].as_str().expect("a name"), compute, config);
        let mut sequence = decoder.sequence();
        let mut rows = oracle["rows"].as_array().expect("rows").iter().peekable();
        for (seen, token) in (1..).zip(numbers(&oracle["tokens"])) {
            let logits = decoder
                .forward(&[token as u32], &mut sequence)
                .expect("a step runs");
            let logits = read(&logits);
            let Some(row) = rows.next_if(|row| row["after"] == seen) else {
                continue;
            };
            for (found, expected) in logits.iter().zip(numbers(&row["logits"])) {
                assert!(
                    (f64::from(*found) - expected).abs() < 2e-4,
                    "{entry}, {compute}, after {seen}: {found} is not {expected}"
                );
            }
        }
        assert!(rows.next().is_none());
    }
}

#[test]
fn all_positions_as_floats() {
    check("full", &KvConfig::default());
}

#[test]
fn the_first_positions_and_the_last() {
    check("rotating", &rotating());
}

#[test]
fn eight_bits() {
    check("quantized-8", &integers(8));
}

#[test]
fn four_bits() {
    check("quantized-4", &integers(4));
}

/// Configurations, each on a checkpoint.
fn kinds() -> Vec<(&'static str, KvConfig)> {
    let both = KvConfig {
        quantized_from: 64,
        max_positions: Some(100),
        keep: 30,
        ..integers(8)
    };
    vec![
        ("llama-wide", rotating()),
        ("llama-wide", integers(8)),
        ("llama-wide", integers(4)),
        (
            "llama-wide",
            KvConfig {
                quantized_from: 100,
                ..integers(8)
            },
        ),
        ("llama-wide", both),
        ("llama-sliding", KvConfig::default()),
        ("llama-sliding", rotating()),
        ("gemma3-text", KvConfig::default()),
        (
            "gemma2",
            KvConfig {
                max_positions: Some(64),
                ..KvConfig::default()
            },
        ),
    ]
}

fn ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 7 + i * 3 + 5) % 96).collect()
}

#[test]
fn chunks_steps_and_batches_give_the_same() {
    let ids = ids(330);
    for (name, config) in kinds() {
        for compute in [Compute::Fastest, Compute::Exact, Compute::Mlx] {
            if compute == Compute::Mlx && config.bits.is_some() && config.max_positions.is_some() {
                continue;
            }
            let decoder = load(name, compute, &config);
            let same = |what: &str, found: &[f32], expected: &[f32]| {
                let what = format!("{name}, {config:?}, {compute}: {what}");
                if compute == Compute::Mlx {
                    // Integers jump where a float is a little other.
                    let slack = if config.bits.is_some() { 0.1 } else { 1e-3 };
                    let near = found.iter().zip(expected).all(|(a, b)| (a - b).abs() < slack);
                    assert!(
                        near && found.len() == expected.len(),
                        "{what}: {found:?} {expected:?}"
                    );
                } else {
                    assert_eq!(found, expected, "{what}");
                }
            };
            let mut whole = decoder.sequence();
            let all = read(&decoder.forward_all(&ids, &mut whole).expect("the tokens run"));
            let row = |index: usize| &all[index * 96..(index + 1) * 96];
            let mut chunked = decoder.sequence();
            for chunk in ids[..300].chunks(70) {
                decoder.forward(chunk, &mut chunked).expect("a chunk runs");
            }
            let mut other = decoder.sequence();
            decoder.forward(&ids[..40], &mut other).expect("a chunk runs");
            for step in 0..30 {
                let feeds =
                    [&ids[300 + step..301 + step], &ids[40 + 3 * step..43 + 3 * step]].map(|tokens| Feed {
                        tokens: FeedTokens::Read(tokens),
                        logits: Wanted::All,
                        prompt: false,
                    });
                let logits = decoder
                    .step(&feeds, &mut [&mut chunked, &mut other])
                    .expect("a step runs");
                let found: Vec<Vec<f32>> = logits.iter().flatten().map(read).collect();
                same("a step", &found[0], row(300 + step));
                same(
                    "rows",
                    &found[1],
                    &all[(40 + 3 * step) * 96..(43 + 3 * step) * 96],
                );
            }
        }
    }
}

#[test]
fn what_is_no_longer_seen_takes_no_memory() {
    let ids = ids(500);
    for (name, config) in kinds() {
        for compute in [Compute::Fastest, Compute::Mlx] {
            if compute == Compute::Mlx && config.bits.is_some() && config.max_positions.is_some() {
                continue;
            }
            let decoder = load(name, compute, &config);
            let mut sequence = decoder.sequence();
            decoder.prefill(&ids[..64], &mut sequence).expect("a chunk runs");
            for chunk in ids[64..].chunks(8) {
                decoder.prefill(chunk, &mut sequence).expect("a chunk runs");
            }
            let bytes = sequence.bytes();
            let estimate = decoder.kv_bytes(500, 8);
            if compute == Compute::Mlx {
                assert!(bytes <= estimate, "{name}, {config:?}: {bytes} of {estimate}");
            } else {
                assert_eq!(bytes, estimate, "{name}, {config:?}");
            }
            let plain = load(name, compute, &KvConfig::default());
            let everything = 500 * plain.kv_bytes_per_token();
            assert!(
                bytes < everything || name == "gemma2",
                "{name}, {config:?}: {bytes} of {everything}"
            );
        }
    }
}

/// What is told before a decoder is loaded is what it takes, but for parts of blocks.
#[test]
fn what_a_sequence_will_take_is_known_from_the_headers() {
    for (name, config) in kinds().into_iter().filter(|(_, config)| config.bits.is_none()) {
        for compute in [Compute::Fastest, Compute::Exact] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("tests/fixtures/tiny")
                .join(name);
            let source = Source::open(&folder).expect("the fixture opens");
            let bytes = DecoderBytes::of(&source, compute, &config).expect("a plan");
            assert!(!bytes.windows.is_empty(), "{name}, {config:?}");
            let decoder = load(name, compute, &config);
            for (tokens, step) in [(64, 8), (512, 8), (512, 128)] {
                let gone = bytes.windows.iter().map(|window| {
                    window.bytes_per_token * (tokens as u64).saturating_sub((window.positions + step) as u64)
                });
                let told = bytes.kv_per_token * tokens as u64 - gone.sum::<u64>();
                let taken = decoder.kv_bytes(tokens, step) as u64;
                let off = told.abs_diff(taken);
                let what = format!("{name}, {config:?}, {compute}, {tokens} by {step}: {told} for {taken}");
                assert!(off <= 128 * bytes.kv_per_token, "{what}");
            }
        }
    }
}

#[test]
fn a_window_takes_back_some_tokens_and_not_more() {
    let ids = ids(400);
    for compute in [Compute::Fastest, Compute::Mlx] {
        let decoder = load("llama-wide", compute, &rotating());
        let mut sequence = decoder.sequence();
        decoder.forward(&ids[..200], &mut sequence).expect("a chunk runs");
        // A snapshot keeps what the sequence itself will have lost.
        let mut snapshot = sequence.fork(200).expect("a fork");
        for chunk in ids[200..].chunks(20) {
            decoder.forward(chunk, &mut sequence).expect("a chunk runs");
        }
        assert!(sequence.can_truncate(400) && sequence.can_truncate(399) && sequence.can_truncate(370));
        assert!(sequence.can_truncate(0));
        assert!(!sequence.can_truncate(200) && !sequence.can_truncate(3));
        assert!(matches!(
            sequence.fork(200),
            Err(ModelError::Forgotten { len: 200 })
        ));
        let whole = |tokens: &[u32]| {
            let mut fresh = decoder.sequence();
            for chunk in tokens[..tokens.len() - 1].chunks(64) {
                decoder.forward(chunk, &mut fresh).expect("a chunk runs");
            }
            read(
                &decoder
                    .forward(&tokens[tokens.len() - 1..], &mut fresh)
                    .expect("a step runs"),
            )
        };
        let same = |found: &[f32], expected: &[f32]| {
            let near = found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-3);
            assert!(near, "{compute}: {found:?} {expected:?}");
        };
        let again = |sequence: &mut Sequence, from: usize| {
            let mut last = None;
            for chunk in ids[from..390].chunks(30) {
                last = Some(decoder.forward(chunk, sequence).expect("a chunk runs"));
            }
            same(&read(&last.expect("chunks")), &whole(&ids[..390]));
        };
        sequence.truncate(370);
        assert_eq!(sequence.len(), 370);
        again(&mut sequence, 370);
        again(&mut snapshot, 200);
        // Where it cannot be, nothing is left, and all begins anew.
        sequence.truncate(100);
        assert!(sequence.is_empty());
        again(&mut sequence, 0);
    }
}

#[test]
fn blocks_of_a_window_have_what_its_end_sees() {
    let ids = ids(400);
    for (name, config) in kinds() {
        let decoder = load(name, Compute::Fastest, &config);
        let mut sequence = decoder.sequence();
        for chunk in ids[..360].chunks(60) {
            decoder.prefill(chunk, &mut sequence).expect("a chunk runs");
        }
        let block = |range| decoder.export(&sequence, range).expect("a block");
        let blocks = [block(0..256), block(256..360)];
        let mut imported = decoder.import(&blocks).expect("the blocks are put back");
        let expected = read(
            &decoder
                .forward(&ids[360..], &mut sequence)
                .expect("the rest runs"),
        );
        let found = read(
            &decoder
                .forward(&ids[360..], &mut imported)
                .expect("the rest runs"),
        );
        assert_eq!(found, expected, "{name}, {config:?}");
        let first = decoder.import(&blocks[..1]);
        if let Ok(first) = first {
            assert_eq!(first.len(), 256);
        } else {
            assert!(matches!(first, Err(ModelError::DamagedBlock { .. })));
        }
        let other = load(name, Compute::Fastest, &KvConfig { keep: 5, ..config });
        assert!(matches!(
            other.import(&blocks),
            Err(ModelError::ForeignBlock { .. })
        ));
    }
    let decoder = load("llama-sliding", Compute::Mlx, &KvConfig::default());
    let mut sequence = decoder.sequence();
    decoder.prefill(&ids[..10], &mut sequence).expect("a chunk runs");
    let error = decoder
        .export(&sequence, 0..10)
        .expect_err("it is refused")
        .to_string();
    assert!(error.contains("are exported on a CPU alone"), "{error}");
}

#[test]
fn configurations_that_cannot_be_are_named() {
    let error = |name: &str, compute, config: KvConfig| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/tiny")
            .join(name);
        let source = Source::open(&folder).expect("the fixture opens");
        let decoder = Decoder::load(&source, compute, &mut |_| Ok(())).expect("the fixture loads");
        decoder.with_kv(&config).expect_err("it is refused").to_string()
    };
    let check = |found: String, expected: &str| assert!(found.contains(expected), "{found}");
    check(
        error("llama", Compute::Exact, integers(8)),
        "`kv.group_size` is 32, which does not make whole heads of 8",
    );
    check(
        error("llama-wide", Compute::Exact, integers(5)),
        "`kv.bits` is 5, allowed: 4 or 8",
    );
    check(
        error(
            "llama-wide",
            Compute::Exact,
            KvConfig {
                max_positions: Some(10),
                ..KvConfig::default()
            },
        ),
        "`kv.max_positions` is 10, allowed: 64 or more",
    );
    check(
        error(
            "llama-wide",
            Compute::Exact,
            KvConfig {
                keep: 40,
                ..rotating()
            },
        ),
        "`kv.keep` is 40, allowed: less than half of `kv.max_positions`, which is 64",
    );
    check(
        error(
            "llama-wide",
            Compute::Mlx,
            KvConfig {
                bits: Some(8),
                group_size: 32,
                ..rotating()
            },
        ),
        "`kv.bits` beside a sliding window or `kv.max_positions` is computed on a CPU alone",
    );
}
