//! Answers under every schema of the JSON-Schema-Test-Suite that compiles, chosen at random among the allowed tokens, are
//! valid for another library's validator.

use std::path::{Path, PathBuf};

use jsonschema::{Draft, Validator};
use mlx_engine_checkpoint::GgufFile;
use mlx_engine_text::{Constraint, GgufVocabulary, Grammar, TextError, TokenTable, Tokenizer};
use serde_json::{Value, json};

/// Tokens after which the sampler prefers to close what is open, and after which it gives up.
const CLOSING: usize = 40;
const LONGEST: usize = 160;
const SAMPLES: u64 = 3;

fn folder() -> PathBuf {
    let folder = std::env::var_os("MLX_ENGINE_TEST_DATA");
    folder
        .expect("MLX_ENGINE_TEST_DATA names the test data; run the tests by `cargo xtask test`")
        .into()
}

/// A vocabulary of 32,000 tokens with byte fallback (SentencePiece) or of 50,000 (byte level).
fn tokenizer(name: &str) -> Tokenizer {
    let path = folder()
        .join("ggml-vocab")
        .join(format!("ggml-vocab-{name}.gguf"));
    let file = GgufFile::open(&path).expect("the vocabulary opens");
    let metadata = file.metadata();
    let key = |key: &str| format!("tokenizer.ggml.{key}");
    let vocabulary = GgufVocabulary {
        model: metadata.string(&key("model")).expect("a model").to_owned(),
        pre: metadata
            .optional_string(&key("pre"))
            .expect("a string")
            .map(str::to_owned),
        tokens: metadata
            .optional_strings(&key("tokens"))
            .expect("strings")
            .unwrap_or_default(),
        scores: metadata
            .optional_f32s(&key("scores"))
            .expect("numbers")
            .unwrap_or_default(),
        token_types: metadata
            .optional_i32s(&key("token_type"))
            .expect("integers")
            .unwrap_or_default(),
        merges: metadata
            .optional_strings(&key("merges"))
            .expect("strings")
            .unwrap_or_default(),
        eos: metadata.optional_u32(&key("eos_token_id")).expect("an id"),
        ..GgufVocabulary::default()
    };
    Tokenizer::from_vocabulary(vocabulary).expect("a tokenizer")
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % end.max(1) as u64) as usize
    }
}

/// The schemas of a draft, named by file and group.
fn schemas(draft: &str) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    let tests = folder().join("json-schema-test-suite/tests").join(draft);
    let mut files: Vec<PathBuf> = [
        tests.clone(),
        tests.join("optional"),
        tests.join("optional/format"),
    ]
    .iter()
    .flat_map(|folder| std::fs::read_dir(folder).expect("the suite is there"))
    .map(|entry| entry.expect("an entry").path())
    .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
    .collect();
    files.sort();
    for file in files {
        let groups: Value = serde_json::from_slice(&std::fs::read(&file).expect("it reads")).expect("JSON");
        let name = file
            .strip_prefix(&tests)
            .unwrap_or(Path::new(""))
            .display()
            .to_string();
        for group in groups.as_array().expect("groups") {
            let description = group["description"].as_str().unwrap_or_default();
            let mut schema = group["schema"].clone();
            // The suite tells drafts by folder alone where a schema does not.
            if let Some(object) = schema.as_object_mut()
                && draft == "draft7"
                && !object.contains_key("$schema")
            {
                object.insert(
                    "$schema".to_owned(),
                    json!("http://json-schema.org/draft-07/schema#"),
                );
            }
            found.push((format!("{draft} {name}: {description}"), schema));
        }
    }
    found
}

/// An answer, or nothing where it had no end.
fn answer(table: &TokenTable, walk: &mut Constraint, random: &mut Random) -> Result<Option<Vec<u8>>, String> {
    let mut bytes = Vec::new();
    for step in 0..LONGEST {
        if walk.is_stopped() {
            return Ok(Some(bytes));
        }
        if walk.is_accepting() && random.below(3) == 0 {
            return Ok(Some(bytes));
        }
        let allowed: Vec<u32> = walk.mask().map_err(|error| error.to_string())?.tokens().collect();
        // Half of the choices are among what closes or begins something, which one of 32,000 tokens would hardly ever be.
        let structural: Vec<u32> = allowed
            .iter()
            .copied()
            .filter(|&id| matches!(table.bytes(id), [b'"' | b'}' | b']' | b'0'..=b'9']))
            .collect();
        let closing = step > CLOSING || random.below(2) == 0;
        let from = if closing && !structural.is_empty() {
            &structural
        } else {
            &allowed
        };
        let token = if step > CLOSING && walk.is_accepting() {
            return Ok(Some(bytes));
        } else {
            from[random.below(from.len())]
        };
        bytes.extend_from_slice(table.bytes(token));
        walk.commit(token).map_err(|error| error.to_string())?;
    }
    Ok(None)
}

#[test]
fn answers_under_a_schema_are_valid() {
    let tables = ["llama-spm", "gpt-2"].map(|name| TokenTable::new(&tokenizer(name)).expect("a table"));
    let (mut refused, mut wrong) = (Vec::new(), Vec::new());
    let (mut compiled, mut answers, mut endless, mut long_numbers) = (0, 0, 0, 0);
    for draft in ["draft7", "draft2020-12"] {
        let validator_draft = if draft == "draft7" {
            Draft::Draft7
        } else {
            Draft::Draft202012
        };
        for (name, schema) in schemas(draft) {
            let grammar = match tables[0].compile(&Grammar::json_schema(&schema)) {
                Ok(grammar) => grammar,
                Err(TextError::Grammar { .. }) => {
                    refused.push(name);
                    continue;
                }
                Err(error) => panic!("{name}: {error}"),
            };
            compiled += 1;
            let validator: Validator = match jsonschema::options()
                .with_draft(validator_draft)
                .should_validate_formats(true)
                .build(&schema)
            {
                Ok(validator) => validator,
                Err(error) => {
                    wrong.push(format!("{name}: the validator does not take it: {error}"));
                    continue;
                }
            };
            let other = tables[1]
                .compile(&Grammar::json_schema(&schema))
                .expect("it compiles for every vocabulary");
            for seed in 0..SAMPLES {
                let mut random = Random(seed);
                let (table, grammar) = if seed % 2 == 0 {
                    (&tables[0], &grammar)
                } else {
                    (&tables[1], &other)
                };
                match answer(table, &mut grammar.constraint(), &mut random) {
                    Ok(None) => endless += 1,
                    Ok(Some(bytes)) => {
                        answers += 1;
                        // The validator counts in float64, which cannot tell multiples apart past 15 digits.
                        let digits = |run: &[u8]| run.len() > 15;
                        if bytes.split(|byte| !byte.is_ascii_digit()).any(digits) {
                            long_numbers += 1;
                            continue;
                        }
                        let text = String::from_utf8_lossy(&bytes);
                        match serde_json::from_str::<Value>(&text) {
                            Ok(value) if validator.is_valid(&value) => {}
                            _ => wrong.push(format!("{name}: {text:?} under {schema}")),
                        }
                    }
                    Err(error) => wrong.push(format!("{name}: {error}")),
                }
            }
        }
    }
    println!(
        "{compiled} compiled, {} refused, {answers} answers, {endless} without end, {long_numbers} with long numbers",
        refused.len()
    );
    if let Some(path) = std::env::var_os("MLX_ENGINE_REFUSED") {
        std::fs::write(path, refused.join("\n") + "\n").expect("it is written");
    }
    assert!(
        wrong.is_empty(),
        "{} are wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(compiled > 250, "{compiled} compiled");
    assert!(endless * 30 < answers, "{endless} of {answers} had no end");
    assert!(
        long_numbers * 10 < answers,
        "{long_numbers} of {answers} have long numbers"
    );
    let known: Vec<&str> = include_str!("fixtures/json_schema_refused.txt").lines().collect();
    assert_eq!(
        refused, known,
        "the list of schemas that are refused has changed; MLX_ENGINE_REFUSED names a file for the new one"
    );
}
