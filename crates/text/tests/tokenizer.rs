//! Tokenizers from folders and from vocabularies: what is taken from where, and what is said of bad ones.

use std::path::Path;

use mlx_engine_text::{GgufVocabulary, Tokenizer};
use proptest::prelude::*;

/// A tokenizer of three tokens, the last of them special.
const TOKENIZER: &str = r#"{
    "version": "1.0",
    "added_tokens": [{"id": 2, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
                      "normalized": false, "special": true}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "</s>": 2}, "merges": []}
}"#;

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).expect("a file");
    }
    folder
}

fn load(files: &[(&str, &str)]) -> Tokenizer {
    Tokenizer::from_folder(folder(files).path()).expect("the tokenizer loads")
}

#[test]
fn a_folder_gives_ends_of_sequence_and_the_template() {
    let tokenizer = load(&[("tokenizer.json", TOKENIZER)]);
    assert_eq!(tokenizer.encode("ab</s>", true).unwrap(), [0, 1, 2]);
    assert_eq!(
        (
            tokenizer.decode(&[0, 2, 1], true),
            tokenizer.decode(&[0, 2, 99], false)
        ),
        ("a b".into(), "a </s>".into())
    );
    assert!(tokenizer.eos_ids().is_empty() && tokenizer.chat_template().is_none());
    assert_eq!(
        (
            tokenizer.vocab_size(),
            tokenizer.is_special(2),
            tokenizer.is_special(0)
        ),
        (3, true, false)
    );
    assert_eq!(
        (tokenizer.token_to_id("b"), tokenizer.id_to_token(1)),
        (Some(1), Some("b".to_owned()))
    );

    let config = r#"{"eos_token": {"content": "</s>"}, "bos_token": "a",
                     "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
    let files = [
        ("tokenizer.json", TOKENIZER),
        ("tokenizer_config.json", config),
        ("generation_config.json", r#"{"eos_token_id": [1, 2]}"#),
        ("config.json", r#"{"eos_token_id": 0}"#),
    ];
    let tokenizer = load(&files);
    assert_eq!(tokenizer.eos_ids().iter().copied().collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(
        (tokenizer.bos_id(), tokenizer.bos_token()),
        (Some(0), Some("a".to_owned()))
    );
    assert_eq!(
        (tokenizer.eos_token(), tokenizer.chat_template()),
        (Some("</s>"), Some("d"))
    );
    let tokenizer = load(&[&files[..], &[("chat_template.jinja", "j")]].concat());
    assert_eq!(tokenizer.chat_template(), Some("j"));
}

#[test]
fn what_is_wrong_with_a_folder_is_said() {
    let error = |files: &[(&str, &str)]| {
        Tokenizer::from_folder(folder(files).path())
            .expect_err("it fails")
            .to_string()
    };
    assert!(error(&[]).ends_with("has no `tokenizer.json`; fetch the model again with its tokenizer"));
    assert!(error(&[("tokenizer.json", "{")]).contains("tokenizer.json` could not be read"));
    let files = [("tokenizer.json", TOKENIZER), ("tokenizer_config.json", "{")];
    assert!(error(&files).contains("tokenizer_config.json` could not be read"));
    let error = Tokenizer::from_file(Path::new("no/such.json"))
        .expect_err("it fails")
        .to_string();
    assert_eq!(error, "tokenizer `no/such.json` could not be read");
}

#[test]
fn a_prompt_is_neither_cut_nor_filled_up() {
    let settings = r#""truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 2,
                    "pad_type_id": 0, "pad_token": "</s>"},"#;
    let file = TOKENIZER.replace(r#""added_tokens""#, &format!("{settings} \"added_tokens\""));
    let tokenizer = load(&[("tokenizer.json", &file)]);
    assert_eq!(tokenizer.encode("abab", true).unwrap(), [0, 1, 0, 1]);
}

#[test]
fn a_configuration_that_is_no_object_says_nothing() {
    for text in ["[]", "5", "\"x\"", "null", "[[1]]"] {
        let names = ["generation_config.json", "config.json", "tokenizer_config.json"];
        let files = names.map(|name| (name, text));
        let tokenizer = load(&[&files[..], &[("tokenizer.json", TOKENIZER)]].concat());
        assert!(tokenizer.eos_ids().is_empty(), "{text}");
    }
}

/// The kinds of damage that `tokenizers` answers with a panic.
#[test]
fn a_damaged_tokenizer_is_an_error_and_no_panic() {
    let with = |part: &str| TOKENIZER.replace(r#""added_tokens""#, &format!("{part}, \"added_tokens\""));
    let error_of = |file: &str| match Tokenizer::from_folder(folder(&[("tokenizer.json", file)]).path()) {
        Ok(tokenizer) => {
            tokenizer.decode(&[0, 1, 2, u32::MAX], false);
            tokenizer.encode("ab", true).err()
        }
        Err(error) => Some(error),
    };
    let missing = with(
        r#""post_processor": {"type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {}}"#,
    );
    let error = error_of(&missing).expect("the token that the template names is missing");
    let source = std::error::Error::source(&error).expect("a source").to_string();
    assert!(source.contains("the tokenizer is damaged"), "{source}");
    let stride = with(
        r#""truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 2}"#,
    );
    error_of(&stride);
    assert!(error_of(&"[".repeat(100_000)).is_some());
}

proptest! {
    #[test]
    fn bytes_that_are_wrong_do_not_panic(at in 0..TOKENIZER.len(), byte: u8, text in "\\PC{0,8}") {
        let mut file = TOKENIZER.as_bytes().to_vec();
        file[at] = byte;
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("tokenizer.json"), file).expect("a file");
        if let Ok(tokenizer) = Tokenizer::from_folder(folder.path()) {
            let _ = tokenizer.encode(&text, true);
            tokenizer.decode(&[0, 1, 2, 3], true);
        }
    }
}

/// llama.cpp gives these a bos token unless the file says otherwise, and the others of BPE none.
#[test]
fn whether_a_text_begins_with_bos_follows_from_the_pre_tokenizer() {
    let begins = |pre: &str, add_bos| {
        let vocabulary = GgufVocabulary {
            pre: Some(pre.to_owned()),
            bos: Some(3),
            add_bos,
            ..vocabulary()
        };
        let tokenizer = Tokenizer::from_vocabulary(vocabulary).expect("it is known");
        tokenizer.encode("a", true).expect("it encodes") == [3, 0]
    };
    let with = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken";
    for pre in with.split(' ') {
        assert!(begins(pre, None) && !begins(pre, Some(false)), "{pre}");
    }
    for pre in "gpt-2 default qwen2 smollm smaug-bpe gpt-4o falcon deepseek-llm".split(' ') {
        assert!(!begins(pre, None) && begins(pre, Some(true)), "{pre}");
    }
}

fn vocabulary() -> GgufVocabulary {
    GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some("gpt-2".to_owned()),
        tokens: ["a", "b", "ab", "<|im_end|>"].map(str::to_owned).to_vec(),
        token_types: vec![1, 1, 1, 3],
        merges: vec!["a b".to_owned()],
        ..GgufVocabulary::default()
    }
}

#[test]
fn the_end_of_a_turn_ends_an_answer_even_where_the_file_does_not_say_so() {
    let tokenizer = Tokenizer::from_vocabulary(vocabulary()).unwrap();
    assert_eq!(tokenizer.eos_ids().iter().copied().collect::<Vec<_>>(), [3]);
    assert_eq!(tokenizer.encode("ab<|im_end|>a", true).unwrap(), [2, 3, 0]);
    let with_ends = GgufVocabulary {
        bos: Some(0),
        eos: Some(3),
        add_bos: Some(true),
        add_eos: Some(true),
        ..vocabulary()
    };
    let tokenizer = Tokenizer::from_vocabulary(with_ends).unwrap();
    assert_eq!(tokenizer.encode("b", true).unwrap(), [0, 1, 3]);
    assert_eq!(tokenizer.encode("b", false).unwrap(), [1]);
}

#[test]
fn a_vocabulary_that_contradicts_itself_is_refused() {
    let check = |change: fn(&mut GgufVocabulary), expect: &str| {
        let mut vocabulary = vocabulary();
        change(&mut vocabulary);
        let error = Tokenizer::from_vocabulary(vocabulary)
            .expect_err("it is refused")
            .to_string();
        assert!(error.contains(expect), "{error}");
    };
    check(|vocabulary| vocabulary.tokens.clear(), "it has no tokens");
    check(
        |vocabulary| vocabulary.scores = vec![1.0],
        "it has 4 tokens and 1 scores",
    );
    check(
        |vocabulary| vocabulary.token_types = vec![1; 3],
        "it has 4 tokens and 3 token types",
    );
    check(
        |vocabulary| vocabulary.eos = Some(4),
        "the eos token is 4 of 4 tokens",
    );
    check(
        |vocabulary| vocabulary.model = "t5".to_owned(),
        "the tokenizer model `t5` is not known, known are: gpt2, llama",
    );
    check(
        |vocabulary| vocabulary.pre = Some("new".to_owned()),
        "the pre-tokenizer `new` is not known, known are: ",
    );
    check(
        |vocabulary| vocabulary.merges = vec!["ab".to_owned()],
        "the merge `ab` is no pair of tokens",
    );
    check(
        |vocabulary| vocabulary.merges = vec!["x y".to_owned()],
        "its merges do not fit its tokens",
    );
    check(
        |vocabulary| vocabulary.model = "llama".to_owned(),
        "a SentencePiece vocabulary has no scores",
    );
}
