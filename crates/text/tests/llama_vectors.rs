//! Tokenization from GGUF vocabularies, against llama.cpp's own vectors.

use std::path::{Path, PathBuf};

use mlx_engine_checkpoint::GgufFile;
use mlx_engine_text::{GgufVocabulary, Tokenizer};

/// Vocabularies of kinds that no supported model has: WordPiece of BERT, and Gemma 4's own.
const NOT_SUPPORTED: [&str; 2] = ["bert-bge", "gemma-4"];

fn folder() -> PathBuf {
    let folder = std::env::var_os("MLX_ENGINE_TEST_DATA");
    let folder =
        folder.expect("MLX_ENGINE_TEST_DATA names the test data; run the tests by `cargo xtask test`");
    Path::new(&folder).join("ggml-vocab")
}

fn vocabulary(path: &Path) -> GgufVocabulary {
    let file = GgufFile::open(path).expect("the vocabulary opens");
    let metadata = file.metadata();
    let id = |key: &str| {
        metadata
            .optional_u32(&format!("tokenizer.ggml.{key}_token_id"))
            .expect("an id")
    };
    let flag = |key: &str| {
        metadata
            .optional_bool(&format!("tokenizer.ggml.{key}"))
            .expect("a bool")
    };
    GgufVocabulary {
        model: metadata
            .string("tokenizer.ggml.model")
            .expect("a model")
            .to_owned(),
        pre: metadata
            .optional_string("tokenizer.ggml.pre")
            .expect("a string")
            .map(str::to_owned),
        tokens: metadata
            .optional_strings("tokenizer.ggml.tokens")
            .expect("strings")
            .unwrap_or_default(),
        scores: metadata
            .optional_f32s("tokenizer.ggml.scores")
            .expect("numbers")
            .unwrap_or_default(),
        token_types: metadata
            .optional_i32s("tokenizer.ggml.token_type")
            .expect("integers")
            .unwrap_or_default(),
        merges: metadata
            .optional_strings("tokenizer.ggml.merges")
            .expect("strings")
            .unwrap_or_default(),
        bos: id("bos"),
        eos: id("eos"),
        unknown: id("unknown"),
        add_space_prefix: flag("add_space_prefix"),
        ..GgufVocabulary::default()
    }
}

/// The tokenizer that is written as `tokenizer.json` and read again.
fn exported(vocabulary: &GgufVocabulary) -> Tokenizer {
    let files = vocabulary.export().expect("it is exported");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, files.tokenizer).expect("it is written");
    Tokenizer::from_file(&path).expect("it is read")
}

#[test]
fn ids_are_those_of_llama_cpp() {
    let mut wrong = Vec::new();
    let (mut checked, mut refused) = (Vec::new(), Vec::new());
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder())
        .expect("the folder is there")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    for input in files
        .iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "inp"))
    {
        let gguf = input.with_extension("");
        let name = gguf
            .file_stem()
            .expect("a name")
            .to_string_lossy()
            .replace("ggml-vocab-", "");
        let vocabulary = vocabulary(&gguf);
        let tokenizer = match Tokenizer::from_vocabulary(vocabulary.clone()) {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                let known = error.to_string().contains("known are: gpt2, llama");
                assert!(known, "{name}: {error}");
                refused.push(name);
                continue;
            }
        };
        let exported = exported(&vocabulary);
        let texts = std::fs::read_to_string(input).expect("the texts");
        let ids = std::fs::read_to_string(gguf.with_extension("gguf.out")).expect("the ids");
        for (text, ids) in texts.split("\n__ggml_vocab_test__\n").zip(ids.lines()) {
            let expected: Vec<u32> = ids
                .split_whitespace()
                .map(|id| id.parse().expect("an id"))
                .collect();
            for (tokenizer, kind) in [(&tokenizer, ""), (&exported, " exported")] {
                let found = tokenizer.encode(text, false).expect("it encodes");
                if found != expected {
                    wrong.push(format!("{name}{kind} {text:?}\n  {found:?}\n  {expected:?}"));
                }
            }
        }
        checked.push(name);
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(refused, NOT_SUPPORTED);
    assert!(checked.len() > 10, "{checked:?}");
}
