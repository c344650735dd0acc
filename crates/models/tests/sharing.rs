//! Sequences that share keys and values: each goes on as if it were alone.

use std::path::Path;

use mlx_engine_models::{
    Compute, Decoder, Feed, FeedTokens, ModelError, NextToken, Sequence, Source, Wanted,
};
use mlx_rs::Array;
use proptest::prelude::*;

fn load(name: &str, compute: Compute) -> Decoder {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/tiny")
        .join(name);
    let source = Source::open(&folder).expect("the fixture opens");
    Decoder::load(&source, compute, &mut |_| Ok(())).expect("the fixture loads")
}

fn read(logits: &Array) -> Vec<f32> {
    let logits = logits.contiguous().expect("an array");
    logits.eval().expect("the step runs");
    logits.as_slice::<f32>().to_vec()
}

/// Our kernels give the same bits however tokens are fed; MLX's operations nearly the same numbers.
fn assert_same(compute: Compute, what: &str, found: &[f32], expected: &[f32]) {
    if compute == Compute::Mlx {
        let near = found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(
            near && found.len() == expected.len(),
            "{what}: {found:?} {expected:?}"
        );
    } else {
        assert_eq!(found, expected, "{what}");
    }
}

/// What a sequence that was fed `tokens` and nothing else says next.
fn alone(decoder: &Decoder, tokens: &[u32]) -> Vec<f32> {
    let mut sequence = decoder.sequence();
    read(&decoder.forward(tokens, &mut sequence).expect("the tokens run"))
}

/// Something that happens to one of some sequences.
#[derive(Clone, Debug)]
enum Event {
    /// It is fed this many tokens, and waited for, or left in flight.
    Feed(usize, bool),
    /// It is forked after this share of its tokens, in 64ths.
    Fork(usize),
    /// It is cut to this share of its tokens, in 64ths.
    Truncate(usize),
    Drop,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (1..70_usize, any::<bool>()).prop_map(|(tokens, wait)| Event::Feed(tokens, wait)),
        3 => (0..=64_usize).prop_map(Event::Fork),
        2 => (0..=64_usize).prop_map(Event::Truncate),
        1 => Just(Event::Drop),
    ]
}

fn play(decoder: &Decoder, compute: Compute, events: &[(usize, Event)]) {
    let mut next = 7_u32;
    let mut sequences: Vec<(Sequence, Vec<u32>)> = vec![(decoder.sequence(), Vec::new())];
    for (index, event) in events {
        if sequences.is_empty() {
            sequences.push((decoder.sequence(), Vec::new()));
        }
        let index = index % sequences.len();
        let (sequence, tokens) = &mut sequences[index];
        match event {
            Event::Feed(count, wait) => {
                let room = decoder.spec().context_length - 1 - tokens.len();
                let fed: Vec<u32> = (0..(*count).min(room))
                    .map(|_| {
                        next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        (next >> 8) % decoder.spec().vocab_size as u32
                    })
                    .collect();
                if fed.is_empty() {
                    continue;
                }
                let logits = decoder.forward(&fed, sequence).expect("the tokens run");
                tokens.extend(fed);
                if *wait {
                    assert_same(compute, "a step", &read(&logits), &alone(decoder, tokens));
                }
            }
            Event::Fork(share) => {
                let len = tokens.len() * share / 64;
                let fork = sequence.fork(len).expect("a fork");
                let tokens = tokens[..len].to_vec();
                sequences.push((fork, tokens));
            }
            Event::Truncate(share) => {
                let len = tokens.len() * share / 64;
                sequence.truncate(len);
                tokens.truncate(len);
            }
            Event::Drop => drop(sequences.swap_remove(index)),
        }
    }
    for (mut sequence, mut tokens) in sequences {
        assert_eq!(sequence.len(), tokens.len());
        tokens.push(3);
        let logits = decoder.forward(&[3], &mut sequence).expect("a step runs");
        assert_same(compute, "the end", &read(&logits), &alone(decoder, &tokens));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn forks_at_any_point_go_on_alone(events in prop::collection::vec((0..8_usize, event()), 1..24)) {
        for compute in [Compute::Fastest, Compute::Exact, Compute::Mlx] {
            play(&load("llama", compute), compute, &events);
        }
    }
}

#[test]
fn a_fork_costs_the_page_that_both_write() {
    let decoder = load("llama", Compute::Exact);
    let ids: Vec<u32> = (0..200).map(|i| i * 5 % 96).collect();
    let mut sequence = decoder.sequence();
    decoder.prefill(&ids, &mut sequence).expect("the prompt runs");
    let page = sequence.bytes() / 4;
    assert_eq!(sequence.unshared_bytes(), 4 * page);
    let mut fork = sequence.fork(150).expect("a fork");
    fork.wait().expect("it is there");
    // Three pages are shared, the third of which is partly the fork's.
    assert_eq!((fork.bytes(), fork.unshared_bytes()), (3 * page, 0));
    assert_eq!(sequence.unshared_bytes(), page);
    decoder.prefill(&ids[150..160], &mut fork).expect("a chunk runs");
    assert_eq!((fork.bytes(), fork.unshared_bytes()), (3 * page, page));
    assert_eq!(sequence.unshared_bytes(), 2 * page);
    // Of a page that the fork leaves whole to the other, nothing is copied.
    fork.truncate(128);
    drop(sequence);
    assert_eq!(fork.unshared_bytes(), 3 * page);
    let nothing = fork.fork(0).expect("a fork of nothing");
    assert!(nothing.is_empty());
    assert_eq!(nothing.bytes(), 0);
    nothing.wait().expect("there is nothing to wait for");
}

#[test]
fn a_sequence_is_taken_out_in_blocks_and_put_back() {
    let ids: Vec<u32> = (0..300).map(|i| i * 11 % 96).collect();
    for compute in [Compute::Fastest, Compute::Exact, Compute::Mlx] {
        let decoder = load("qwen3", compute);
        let mut sequence = decoder.sequence();
        decoder.prefill(&ids, &mut sequence).expect("the prompt runs");
        let blocks = [0..256, 256..300].map(|range| decoder.export(&sequence, range).expect("a block"));
        let mut imported = decoder.import(&blocks).expect("the blocks are put back");
        assert_eq!(imported.len(), 300);
        for token in [1, 2, 3] {
            let expected = read(&decoder.forward(&[token], &mut sequence).expect("a step runs"));
            let found = read(&decoder.forward(&[token], &mut imported).expect("a step runs"));
            assert_eq!(found, expected, "{compute}");
        }
        // It can be shared like another.
        let mut fork = imported.fork(100).expect("a fork");
        let found = read(&decoder.forward(&ids[100..], &mut fork).expect("the rest runs"));
        assert_same(compute, "a fork of it", &found, &alone(&decoder, &ids));
    }
}

#[test]
fn blocks_that_are_damaged_or_foreign_are_refused() {
    for compute in [Compute::Fastest, Compute::Mlx] {
        let decoder = load("llama", compute);
        let mut sequence = decoder.sequence();
        decoder
            .prefill(&[1; 300], &mut sequence)
            .expect("the prompt runs");
        let block = decoder.export(&sequence, 0..256).expect("a block");
        let next = decoder.export(&sequence, 256..300).expect("a block");
        let error = |blocks: &[&[u8]]| decoder.import(blocks).expect_err("it is refused");
        for at in (0..block.len()).step_by(97).chain([0, 8, 12, block.len() - 1]) {
            let mut changed = block.clone();
            changed[at] ^= 0x10;
            let error = error(&[&changed]);
            assert!(matches!(error, ModelError::DamagedBlock { .. }), "{at}: {error}");
        }
        for len in [0, 7, 8, 11, 12, 20, block.len() / 2, block.len() - 1] {
            let error = error(&[&block[..len]]);
            assert!(matches!(error, ModelError::DamagedBlock { .. }), "{len}: {error}");
        }
        // The next without the first, and the first twice.
        for blocks in [&[&next[..]][..], &[&block, &block]] {
            assert!(matches!(error(blocks), ModelError::ForeignBlock { .. }));
        }
        for (other, compute) in [
            ("mistral", compute),
            ("llama-3", compute),
            ("llama", Compute::Exact),
        ] {
            let error = load(other, compute).import([&block]).expect_err("it is refused");
            assert!(
                matches!(error, ModelError::ForeignBlock { .. }),
                "{other}: {error}"
            );
        }
        for range in [0..0, 0..301, 500..600] {
            let error = decoder.export(&sequence, range).expect_err("it is refused");
            assert!(matches!(error, ModelError::BlockRange { .. }), "{error}");
        }
    }
    let decoder = load("llama", Compute::Fastest);
    let mut sequence = decoder.sequence();
    decoder
        .prefill(&[1; 100], &mut sequence)
        .expect("the prompt runs");
    assert_eq!(
        decoder
            .export(&sequence, 10..64)
            .expect_err("it is refused")
            .to_string(),
        "positions 10 to 64 cannot be exported: the sequence has 100, and a block begins at a multiple of 64"
    );
}

#[test]
fn rows_of_several_sequences_are_fed_together() {
    // How much each has seen, how much it is fed, and what is wanted.
    let mixed = [
        (0, 5, Wanted::All),
        (70, 1, Wanted::Last),
        (10, 90, Wanted::None),
        (63, 7, Wanted::All),
        (200, 30, Wanted::Last),
    ];
    let equal = [
        (0, 7, Wanted::Last),
        (0, 7, Wanted::All),
        (61, 7, Wanted::None),
        (200, 7, Wanted::Last),
    ];
    for name in ["qwen2", "llama-3", "llama-linear", "mistral"] {
        for compute in [Compute::Fastest, Compute::Exact, Compute::Mlx] {
            fed_together(&load(name, compute), compute, &mixed);
            fed_together(&load(name, compute), compute, &equal);
        }
    }
}

fn fed_together(decoder: &Decoder, compute: Compute, parts: &[(usize, usize, Wanted)]) {
    let ids: Vec<u32> = (0..250).map(|i| i * 13 % 96).collect();
    let mut sequences: Vec<Sequence> = parts
        .iter()
        .map(|&(seen, ..)| {
            let mut sequence = decoder.sequence();
            if seen > 0 {
                decoder
                    .forward(&ids[..seen], &mut sequence)
                    .expect("the prompt runs");
            }
            sequence
        })
        .collect();
    let feeds: Vec<Feed<'_>> = parts
        .iter()
        .enumerate()
        .map(|(index, &(seen, rows, logits))| Feed {
            tokens: if rows == 7 {
                FeedTokens::Unread(Array::from_slice(&ids[seen..seen + rows], &[rows as i32]))
            } else {
                FeedTokens::Read(&ids[seen..seen + rows])
            },
            logits,
            // Which come last then. A matrix unit would round them otherwise.
            prompt: compute != Compute::Fastest && index % 2 == 0,
        })
        .collect();
    let mut fed: Vec<&mut Sequence> = sequences.iter_mut().collect();
    let logits = decoder.step(&feeds, &mut fed).expect("a step runs");
    for ((&(seen, rows, wanted), logits), sequence) in parts.iter().zip(logits).zip(&mut sequences) {
        let mut one = decoder.sequence();
        let all = decoder
            .forward_all(&ids[..seen + rows], &mut one)
            .expect("the tokens run");
        let all = read(&all);
        let vocabulary = decoder.spec().vocab_size;
        let first = match wanted {
            Wanted::None => seen + rows,
            Wanted::Last => seen + rows - 1,
            Wanted::All => seen,
        };
        let expected = &all[first * vocabulary..];
        let found = logits.as_ref().map(read).unwrap_or_default();
        assert_same(compute, "rows", &found, expected);
        assert_eq!(sequence.len(), seen + rows);
        // What was guessed wrong is given up, and what is right follows.
        sequence.truncate(seen + rows - 1);
        let again = decoder
            .forward(&ids[seen + rows - 1..seen + rows], sequence)
            .expect("a step runs");
        assert_same(
            compute,
            "again",
            &read(&again),
            &all[(seen + rows - 1) * vocabulary..],
        );
    }
    let error = decoder.step(
        &[Feed {
            tokens: FeedTokens::Read(&[]),
            logits: Wanted::All,
            prompt: false,
        }],
        &mut [&mut decoder.sequence()],
    );
    assert!(matches!(error, Err(ModelError::NoTokens)));
    assert!(matches!(decoder.step(&[], &mut []), Err(ModelError::NoTokens)));
    // Whose fault it is can be told before anything is fed.
    let check = |tokens: &[u32]| {
        let feed = Feed {
            tokens: FeedTokens::Read(tokens),
            logits: Wanted::Last,
            prompt: false,
        };
        decoder.check(&feed, &decoder.sequence())
    };
    assert!(check(&ids).is_ok());
    assert!(matches!(
        check(&[1, 96]),
        Err(ModelError::Token { token: 96, .. })
    ));
    assert!(matches!(check(&[]), Err(ModelError::NoTokens)));
    let long = vec![1; decoder.spec().context_length + 1];
    assert!(matches!(check(&long), Err(ModelError::ContextExceeded { .. })));
}

#[test]
fn one_token_each_of_several_sequences() {
    let ids: Vec<u32> = (0..120).map(|i| i * 17 % 96).collect();
    // Rotated by a base, by frequencies of their own, with neighbours in pairs; with norms of heads; with biases.
    for name in ["llama", "llama-3", "llama-linear", "qwen2", "qwen3", "mistral"] {
        for compute in [Compute::Fastest, Compute::Mlx] {
            let decoder = load(name, compute);
            let seen = [1, 64, 7, 100, 100];
            let mut sequences: Vec<Sequence> = seen
                .iter()
                .map(|&seen| {
                    let mut sequence = decoder.sequence();
                    decoder
                        .forward(&ids[..seen], &mut sequence)
                        .expect("the prompt runs");
                    sequence
                })
                .collect();
            for step in 0..3 {
                let tokens: Vec<NextToken> = seen
                    .iter()
                    .map(|seen| NextToken::Read(ids[seen + step]))
                    .collect();
                let mut fed: Vec<&mut Sequence> = sequences.iter_mut().collect();
                let logits = decoder.forward_batch(&tokens, &mut fed).expect("a step runs");
                for (&seen, logits) in seen.iter().zip(&logits) {
                    assert_eq!(logits.shape(), [1, decoder.spec().vocab_size as i32]);
                    let expected = alone(&decoder, &ids[..=seen + step]);
                    assert_same(compute, name, &read(logits), &expected);
                }
            }
        }
    }
}
