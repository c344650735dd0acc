//! Vocabularies of GGUF files, and texts under them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mlx_engine_text::{GgufVocabulary, Tokenizer};

fuzz_target!(|text: &str| {
    // The first line is the text, the others are tokens, or merges where they have a space.
    let mut lines = text.lines();
    let said = lines.next().unwrap_or_default();
    let (merges, tokens): (Vec<String>, Vec<String>) =
        lines.map(str::to_owned).partition(|line| line.contains(' '));
    for model in ["gpt2", "llama"] {
        let vocabulary = GgufVocabulary {
            model: model.to_owned(),
            pre: Some("smollm".to_owned()),
            scores: if model == "llama" {
                vec![0.0; tokens.len()]
            } else {
                Vec::new()
            },
            tokens: tokens.clone(),
            merges: merges.clone(),
            unknown: Some(0),
            ..GgufVocabulary::default()
        };
        let Ok(tokenizer) = Tokenizer::from_vocabulary(vocabulary) else {
            continue;
        };
        if let Ok(ids) = tokenizer.encode(said, true) {
            assert!(ids.iter().all(|&id| tokenizer.id_to_token(id).is_some()));
            let _ = tokenizer.decode(&ids, false);
        }
    }
});
