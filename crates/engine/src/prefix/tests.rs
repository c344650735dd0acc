//! The tree against a list that is searched from end to end.

use mlx_engine_core::GenerateParams;
use proptest::prelude::*;

use super::*;
use crate::mock::{MockModel, MockSequence};
use crate::{Feed, MockScript, TokenModel};

fn model(script: MockScript) -> MockModel {
    script.with_bytes_per_token(10).load().unwrap()
}

fn feed(model: &mut MockModel, sequence: &mut MockSequence, tokens: &[u32]) {
    let feed = Feed {
        sequence,
        params: &GenerateParams::default(),
        tokens: Some(tokens),
        choices: 0,
        number: 0,
        before: &[],
        prompt_len: 0,
    };
    model.feed(&mut [feed]).expect("no fault is planned");
}

/// A sequence that has seen these tokens.
fn seen(model: &mut MockModel, tokens: &[u32]) -> MockSequence {
    let mut sequence = model.open();
    if !tokens.is_empty() {
        feed(model, &mut sequence, tokens);
    }
    sequence
}

fn keep(cache: &mut PrefixCache<MockSequence>, model: &mut MockModel, tokens: &[u32]) {
    let sequence = seen(model, tokens);
    cache.keep(model, tokens, sequence, 0);
}

fn forked(cache: &mut PrefixCache<MockSequence>, model: &mut MockModel, tokens: &[u32]) -> usize {
    match cache.fork(model, tokens).unwrap() {
        Some((sequence, len)) => {
            assert_eq!(sequence.seen(), &tokens[..len]);
            len
        }
        None => 0,
    }
}

#[test]
fn what_is_shared_is_counted_once() {
    let mut model = model(MockScript::default());
    let mut cache = PrefixCache::new(1000);
    keep(&mut cache, &mut model, &[1, 2, 3]);
    assert_eq!(cache.bytes(), 30);
    // A longer one serves for its beginning.
    let (sequence, shared) = cache.fork(&mut model, &[1, 2, 3, 4, 5]).unwrap().unwrap();
    assert_eq!(shared, 3);
    let mut longer = sequence;
    feed(&mut model, &mut longer, &[4, 5]);
    cache.keep(&model, &[1, 2, 3, 4, 5], longer, shared);
    assert_eq!((cache.bytes(), cache.entries().count()), (50, 1));
    // One that goes another way shares what it was forked from, and one that was computed apart does not.
    let (mut other, shared) = cache.fork(&mut model, &[1, 2, 9]).unwrap().unwrap();
    feed(&mut model, &mut other, &[9]);
    cache.keep(&model, &[1, 2, 9], other, shared);
    assert_eq!(cache.bytes(), 60);
    keep(&mut cache, &mut model, &[1, 2, 8]);
    assert_eq!(cache.bytes(), 60 + 30);
    assert_eq!(cache.report().entries.len(), 3);
    assert_eq!(cache.clear(), 90);
    assert_eq!((cache.bytes(), cache.entries().count()), (0, 0));
}

#[test]
fn what_was_used_least_lately_goes_first_and_what_is_pinned_stays() {
    let mut model = model(MockScript::default());
    let mut cache = PrefixCache::new(60);
    keep(&mut cache, &mut model, &[1, 1]);
    keep(&mut cache, &mut model, &[2, 2]);
    keep(&mut cache, &mut model, &[3, 3]);
    assert_eq!(forked(&mut cache, &mut model, &[1, 1, 1]), 2);
    keep(&mut cache, &mut model, &[4, 4]);
    assert_eq!(forked(&mut cache, &mut model, &[2, 2]), 0);
    assert!(cache.pin(&mut model, &[3]).unwrap());
    assert!(!cache.pin(&mut model, &[9]).unwrap());
    assert_eq!(cache.pinned_bytes(), 10);
    cache.clear();
    assert_eq!(cache.bytes(), 10);
    assert_eq!(forked(&mut cache, &mut model, &[3, 3]), 1);
    assert!(!cache.unpin(&[3, 3]) && cache.unpin(&[3]) && !cache.unpin(&[3]));
    cache.clear();
    assert_eq!(cache.bytes(), 0);
    keep(&mut cache, &mut model, &[1; 7]);
    assert_eq!(cache.bytes(), 0, "what is larger than the budget is not kept");
}

#[test]
fn a_model_that_cannot_cut_sequences_has_those_that_were_kept() {
    let mut model = model(MockScript::default().with_whole_sequences());
    let mut cache = PrefixCache::new(1000);
    keep(&mut cache, &mut model, &[1, 2]);
    keep(&mut cache, &mut model, &[1, 2, 3, 4]);
    assert_eq!(cache.entries().count(), 2);
    for (tokens, len) in [
        (vec![1, 2, 3], 2),
        (vec![1], 0),
        (vec![1, 2, 3, 4, 5], 4),
        (vec![1, 2, 9], 2),
    ] {
        assert_eq!(forked(&mut cache, &mut model, &tokens), len, "{tokens:?}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Keep(Vec<u32>),
    Fork(Vec<u32>),
    Pin(Vec<u32>),
    Unpin(Vec<u32>),
    Shrink(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let tokens = || prop::collection::vec(0u32..3, 1..8);
    let step = prop_oneof![
        4 => tokens().prop_map(Step::Keep),
        4 => tokens().prop_map(Step::Fork),
        1 => tokens().prop_map(Step::Pin),
        1 => tokens().prop_map(Step::Unpin),
        1 => (0u64..400).prop_map(Step::Shrink),
    ];
    prop::collection::vec(step, 1..40)
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// A look-up finds what a search through all entries finds, the bytes add up, and nothing is lost but by the budget.
    #[test]
    fn the_tree_is_a_list_that_is_searched_faster(steps in steps(), whole in any::<bool>(), budget in 20u64..300) {
        let script = MockScript::default();
        let mut model = model(if whole { script.with_whole_sequences() } else { script });
        let mut cache = PrefixCache::new(budget);
        for step in steps {
            let entries: Vec<Vec<u32>> = cache.entries().map(|(tokens, _)| tokens).collect();
            match step {
                Step::Keep(tokens) => {
                    let (mut sequence, shared) =
                        cache.fork(&mut model, &tokens).unwrap().unwrap_or_else(|| (model.open(), 0));
                    if shared < tokens.len() {
                        feed(&mut model, &mut sequence, &tokens[shared..]);
                    }
                    cache.keep(&model, &tokens, sequence, shared);
                }
                Step::Fork(tokens) => {
                    let best = entries.iter().map(|entry| {
                        let len = common(entry, &tokens);
                        if whole && len < entry.len() { 0 } else { len }
                    });
                    let best = best.max().unwrap_or(0);
                    prop_assert_eq!(forked(&mut cache, &mut model, &tokens), best);
                }
                Step::Pin(tokens) => {
                    if cache.pin(&mut model, &tokens).unwrap() {
                        let entries: Vec<_> = cache.entries().map(|(tokens, _)| tokens).collect();
                        prop_assert!(entries.contains(&tokens));
                    }
                }
                Step::Unpin(tokens) => drop(cache.unpin(&tokens)),
                Step::Shrink(bytes) => cache.shrink(bytes),
            }
            // The bytes are those of the distinct beginnings, as all was forked from what was there.
            let mut prefixes: Vec<Vec<u32>> = cache
                .entries()
                .flat_map(|(tokens, _)| (1..=tokens.len()).map(move |len| tokens[..len].to_vec()).collect::<Vec<_>>())
                .collect();
            prefixes.sort_unstable();
            prefixes.dedup();
            prop_assert!(cache.bytes() >= 10 * prefixes.len() as u64);
            prop_assert!(cache.bytes() <= budget || cache.pinned_bytes() > 0);
            if cache.entries().count() == 0 {
                prop_assert_eq!(cache.bytes(), 0);
            }
            let report = cache.report();
            prop_assert_eq!(report.entries.iter().filter(|entry| entry.pinned).count() > 0, cache.pinned_bytes() > 0);
        }
        for tokens in cache.entries().map(|(tokens, _)| tokens).collect::<Vec<_>>() {
            cache.unpin(&tokens);
        }
        cache.clear();
        prop_assert_eq!(cache.bytes(), 0);
        prop_assert_eq!(cache.nodes.iter().flatten().count(), 1);
    }
}
