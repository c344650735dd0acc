//! Grammars of requests: compiled or refused, and walked without a panic.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mlx_engine_text::{GgufVocabulary, Grammar, TokenTable, Tokenizer};

/// Tokens that are the printable letters of ASCII, and an end.
static TABLE: LazyLock<TokenTable> = LazyLock::new(|| {
    let mut tokens: Vec<String> = ('!'..='~').map(String::from).collect();
    tokens.extend(["Ġ".to_owned(), "Ċ".to_owned(), "<|end|>".to_owned()]);
    let end = tokens.len() - 1;
    let mut token_types = vec![1; tokens.len()];
    token_types[end] = 3;
    let tokenizer = Tokenizer::from_vocabulary(GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some("gpt-2".to_owned()),
        tokens,
        token_types,
        eos: u32::try_from(end).ok(),
        ..GgufVocabulary::default()
    });
    TokenTable::new(&tokenizer.expect("a vocabulary")).expect("a table")
});

fuzz_target!(|input: (u8, &str)| {
    let (kind, text) = input;
    let grammar = match kind % 3 {
        0 => match serde_json::from_str(text) {
            Ok(schema) => Grammar::json_schema(&schema),
            Err(_) => return,
        },
        1 => Grammar::regex(text),
        _ => Grammar::lark(text),
    };
    let Ok(compiled) = TABLE.compile(&grammar) else {
        return;
    };
    let mut answer = compiled.constraint();
    for _ in 0..8 {
        let Ok(mask) = answer.mask() else { return };
        let Some(token) = mask.tokens().next() else { return };
        if answer.commit(token).is_err() || answer.is_stopped() {
            return;
        }
    }
});
