//! What text costs a token: the detokenizer, stop strings, the parser of answers, and the mask of a grammar.
//!
//! The vocabulary is that of the test model, which `cargo xtask bench` names in `MLX_ENGINE_TEST_MODEL`; without it nothing runs and
//! that is said.

use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mlx_engine_checkpoint::GgufFile;
use mlx_engine_text::{
    Detokenizer, GgufVocabulary, Grammar, OutputParser, StopMatcher, TokenTable, Tokenizer, ToolFormat,
};
use serde_json::json;

/// English, Chinese and code: tokens that are words, parts of words, and parts of characters.
const TEXT: &str = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过了懒狗。 fn main() { println!(\"{}\", 1 + 2); } ";

fn tokenizer() -> Option<Tokenizer> {
    let Ok(model) = std::env::var("MLX_ENGINE_TEST_MODEL") else {
        eprintln!("MLX_ENGINE_TEST_MODEL is not set: nothing runs; use `cargo xtask bench`");
        return None;
    };
    let file = GgufFile::open(Path::new(&model)).expect("the model opens");
    let metadata = file.metadata();
    let strings = |key: &str| {
        metadata
            .optional_strings(key)
            .expect("strings")
            .unwrap_or_default()
    };
    let vocabulary = GgufVocabulary {
        model: metadata
            .string("tokenizer.ggml.model")
            .expect("a model")
            .to_owned(),
        pre: metadata
            .optional_string("tokenizer.ggml.pre")
            .expect("a string")
            .map(str::to_owned),
        tokens: strings("tokenizer.ggml.tokens"),
        merges: strings("tokenizer.ggml.merges"),
        ..GgufVocabulary::default()
    };
    Some(Tokenizer::from_vocabulary(vocabulary).expect("the vocabulary is one"))
}

fn pieces(criterion: &mut Criterion) {
    let Some(tokenizer) = tokenizer() else { return };
    let ids = tokenizer.encode(&TEXT.repeat(10), false).expect("it encodes");
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), true);
    let said: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
    let mut group = criterion.benchmark_group("text");
    group.throughput(Throughput::Elements(ids.len() as u64));
    group.bench_function("detokenizer", |bencher| {
        bencher.iter(|| {
            let mut detokenizer = Detokenizer::new(tokenizer.clone(), true);
            let bytes: usize = ids.iter().map(|id| detokenizer.push(*id).len()).sum();
            bytes + detokenizer.finish().len()
        });
    });
    group.bench_function("stop strings", |bencher| {
        bencher.iter(|| {
            let mut stops = StopMatcher::new(["</answer>".to_owned(), "\n\nQ:".to_owned()]);
            for piece in &said {
                std::hint::black_box(stops.push(piece));
            }
            stops.finish()
        });
    });
    group.bench_function("parser", |bencher| {
        bencher.iter(|| {
            let mut parser = OutputParser::new(ToolFormat::Hermes, &[]);
            let events: usize = said.iter().map(|piece| parser.push(piece).len()).sum();
            events + parser.finish().len()
        });
    });
    group.finish();
}

/// A mask of the whole vocabulary, and the token that was chosen under it.
fn grammar(criterion: &mut Criterion) {
    let Some(tokenizer) = tokenizer() else { return };
    let table = TokenTable::new(&tokenizer).expect("a table");
    let schema = json!({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
                        "required": ["name", "age"], "additionalProperties": false});
    let compiled = table
        .compile(&Grammar::json_schema(&schema))
        .expect("the schema is held to");
    let answer = tokenizer
        .encode("{\"name\":\"Ada Lovelace\",\"age\":36}", false)
        .expect("it encodes");
    let mut group = criterion.benchmark_group("grammar");
    group.throughput(Throughput::Elements(answer.len() as u64));
    group.bench_function("mask and commit", |bencher| {
        bencher.iter(|| {
            let mut constraint = compiled.constraint();
            for &token in &answer {
                let allowed = constraint.mask().expect("a mask").is_allowed(token);
                assert!(allowed, "token {token}");
                constraint.commit(token).expect("it is allowed");
            }
        });
    });
    group.finish();
}

criterion_group!(benches, pieces, grammar);
criterion_main!(benches);
