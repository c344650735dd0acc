//! Conversion to MLX folders, against mlx-lm: it loads what is written and computes the same, and writes the same itself.
#![cfg(feature = "mlx")]

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mlx_engine_checkpoint::ShardedCheckpoint;
use mlx_engine_engine::{
    ConvertError, ConvertOptions, ConvertReport, FloatType, Origin, Recipe, WeightBits, convert_model,
    load_encoder,
};
use mlx_engine_models::{Compute, Decoder, Source};
use serde_json::{Value, json};

fn variable(name: &str) -> PathBuf {
    let value = std::env::var_os(name);
    value
        .unwrap_or_else(|| panic!("{name} is set by `cargo xtask test`"))
        .into()
}

fn smollm2() -> PathBuf {
    variable("MLX_ENGINE_TEST_MODEL")
}

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../models/tests/fixtures/tiny")
        .join(name)
}

/// Runs a script of the fixtures with a job on stdin, and returns what it prints.
fn python(script: &str, job: &Value) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(script);
    let mut child = Command::new("python3")
        .arg(path)
        .env("PYTHONPATH", variable("MLX_ENGINE_TEST_PYTHONPATH"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("HF_HUB_OFFLINE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("python3 starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin
        .write_all(job.to_string().as_bytes())
        .expect("the job is read");
    drop(stdin);
    let output = child.wait_with_output().expect("python3 ends");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{script}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn options(bits: WeightBits, dtype: Option<FloatType>) -> ConvertOptions {
    ConvertOptions { bits, dtype }
}

fn uniform(bits: u32, group_size: u32) -> WeightBits {
    WeightBits::Uniform { bits, group_size }
}

fn convert(from: &Path, to: &Path, options: &ConvertOptions) -> ConvertReport {
    let mut last = 0;
    let report = convert_model(from, to, options, &Origin::default(), &mut |stage| {
        assert!(last <= stage.done && stage.done <= stage.total);
        last = stage.done;
        ControlFlow::Continue(())
    });
    let report = report.unwrap_or_else(|error| panic!("{} {options:?}: {error}", from.display()));
    assert_eq!(last, report.bytes);
    report
}

/// The logits after each id, by our kernels in float32.
fn logits(model: &Path, ids: &[u32]) -> Vec<f32> {
    let source = Source::open(model).expect("the model opens");
    let decoder = Decoder::load(&source, Compute::Exact, &mut |_| Ok(())).expect("the model loads");
    let logits = decoder
        .forward_all(ids, &mut decoder.sequence())
        .expect("the ids run");
    logits.eval().expect("they are computed");
    logits.as_slice::<f32>().to_vec()
}

/// The largest difference, relative to the largest logit.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1.0_f32, |most, value| most.max(value.abs()));
    let pairs = found.iter().zip(expected);
    let off = pairs.map(|(found, expected)| (found - expected).abs());
    off.fold(
        0.0,
        |most, off| if off > most || off.is_nan() { off } else { most },
    ) / largest
}

fn floats(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).expect("the logits are there");
    FloatType::F32.decode(&bytes)
}

/// What mlx-lm makes of folders: logits after the ids, and the answers of the script.
fn by_mlx_lm(folders: &[PathBuf], ids: &[u32], text: Option<&str>) -> Vec<(Vec<f32>, Value)> {
    let logits = |folder: &Path| folder.with_extension("logits");
    let jobs: Vec<Value> = folders
        .iter()
        .map(|folder| {
            let mut job = json!({"folder": folder, "ids": ids, "logits": logits(folder)});
            if let Some(text) = text {
                job["text"] = json!(text);
            }
            job
        })
        .collect();
    let answers: Vec<Value> =
        serde_json::from_str(&python("read_converted.py", &json!(jobs))).expect("the answers are JSON");
    let logits = folders.iter().map(|folder| floats(&logits(folder)));
    logits.zip(answers).collect()
}

const TEXT: &str = "The capital of France is Paris. Grüße!\n  1234567 <|im_end|>";
const PROMPT: [u32; 12] = [5, 17, 3, 80, 41, 2, 66, 9, 95, 0, 23, 8];

/// 4, 6 and 8 bits, groups of 32, 64 and 128, floats of each type, a recipe, and what the file has.
#[test]
fn a_converted_smollm2_computes_in_mlx_lm_what_it_computes_here() {
    let place = tempfile::tempdir().expect("a folder");
    let mut cases = vec![options(WeightBits::AsTheyAre, None)];
    for bits in [4, 6, 8] {
        for group_size in [32, 64, 128] {
            cases.push(options(uniform(bits, group_size), None));
        }
    }
    let recipe = WeightBits::Mixed {
        recipe: Recipe::Mixed3And6,
        group_size: 32,
    };
    cases.push(options(recipe, Some(FloatType::BF16)));
    cases.extend(FloatType::ALL.map(|dtype| options(WeightBits::Floats, Some(dtype))));
    let folders: Vec<PathBuf> = cases
        .iter()
        .enumerate()
        .map(|(number, options)| {
            let folder = place.path().join(number.to_string());
            let report = convert(&smollm2(), &folder, options);
            assert!(report.has_tokenizer);
            assert_eq!(report.parameters, 134_515_008);
            folder
        })
        .collect();

    let here = load_encoder(&smollm2(), None).expect("the tokenizer loads");
    let tokenizer = here.tokenizer();
    let ids = tokenizer.encode(TEXT, false).expect("it encodes");
    // mlx-lm computes some ten tokens a second here.
    let fed = &ids[..8];
    for ((folder, options), (expected, answer)) in
        folders
            .iter()
            .zip(&cases)
            .zip(by_mlx_lm(&folders, fed, Some(TEXT)))
    {
        let off = difference(&logits(folder, fed), &expected);
        assert!(off < 1e-4, "{options:?}: {off}");
        assert_eq!(answer["ids"], json!(ids), "{options:?}");
        assert_eq!(answer["ends"], json!(tokenizer.eos_ids()), "{options:?}");
        assert_eq!(
            answer["chat"],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
        );
    }
    // What nothing was done to is what the file is.
    let (as_it_is, file) = (logits(&folders[0], fed), logits(&smollm2(), fed));
    assert!(difference(&as_it_is, &file) < 1e-5);
}

#[test]
fn what_the_file_has_is_taken_over_without_loss() {
    let place = tempfile::tempdir().expect("a folder");
    let folder = place.path().join("model");
    let report = convert(&smollm2(), &folder, &ConvertOptions::default());
    assert!(report.is_exact(), "{:?}", report.conversions);
    let kinds: Vec<(&str, &str, usize)> = report
        .conversions
        .iter()
        .map(|kind| (kind.from.as_str(), kind.to.as_str(), kind.tensors))
        .collect();
    assert_eq!(
        kinds[..2],
        [
            ("Q4_1", "4 bits in groups of 32, scales in float16", 210),
            ("Q8_0", "8 bits in groups of 32, scales in float16", 1),
        ]
    );
    let config: Value =
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).expect("a file")).expect("JSON");
    let quantization = &config["quantization"];
    assert_eq!(
        (&quantization["bits"], &quantization["model.embed_tokens"]["bits"]),
        (&json!(4), &json!(8))
    );
    assert_eq!(quantization.as_object().expect("an object").len(), 4);
    let card = std::fs::read_to_string(folder.join("README.md")).expect("a card");
    assert!(card.starts_with("---\nlibrary_name: mlx\n"), "{card}");
    assert!(
        card.contains("| Q4_1 | 4 bits in groups of 32, scales in float16 | 210 | 210 |"),
        "{card}"
    );
}

const WITH_EXPERTS: &str = "qwen3-moe";

#[test]
fn a_model_with_experts_is_refused_with_who_converts_it() {
    let place = tempfile::tempdir().expect("a folder");
    for from in [tiny(WITH_EXPERTS), tiny(WITH_EXPERTS).join("model.gguf")] {
        let to = place.path().join("model");
        let options = options(uniform(4, 32), None);
        let error = convert_model(&from, &to, &options, &Origin::default(), &mut |_| {
            ControlFlow::Continue(())
        });
        let error = error.expect_err("it is refused").to_string();
        assert!(
            error.contains("`qwen3_moe` has experts") && error.contains("mlx_lm.convert"),
            "{error}"
        );
        assert!(!to.exists());
    }
}

/// Every tiny GGUF file, which has permuted rows, biases, norms less 1, or each matrix in another format.
#[test]
fn gguf_of_every_family_computes_in_mlx_lm_what_it_computes_here() {
    let place = tempfile::tempdir().expect("a folder");
    let mut names: Vec<String> = std::fs::read_dir(tiny(""))
        .expect("the fixtures are there")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        // Those with experts are not converted.
        .filter(|name| tiny(name).join("model.gguf").is_file() && name != WITH_EXPERTS)
        .collect();
    names.sort();
    assert!(names.len() >= 4, "{names:?}");
    let folders: Vec<PathBuf> = names
        .iter()
        .map(|name| {
            let folder = place.path().join(name);
            let report = convert(
                &tiny(name).join("model.gguf"),
                &folder,
                &options(WeightBits::AsTheyAre, None),
            );
            assert!(report.is_exact() && !report.has_tokenizer, "{name}: {report:?}");
            folder
        })
        .collect();
    for (name, (folder, (expected, _))) in names
        .iter()
        .zip(folders.iter().zip(by_mlx_lm(&folders, &PROMPT, None)))
    {
        let found = logits(folder, &PROMPT);
        let off = difference(&found, &expected);
        assert!(off < 1e-4, "{name}: {off}");
        let file = logits(&tiny(name).join("model.gguf"), &PROMPT);
        let off = difference(&found, &file);
        assert!(off < 1e-4, "{name}, the file: {off}");
    }
}

/// The tensors of a folder: type, shape and bytes.
fn tensors(folder: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let checkpoint = ShardedCheckpoint::open(folder).expect("the folder opens");
    checkpoint
        .names()
        .map(|name| {
            let tensor = checkpoint.tensor(name).expect("it is there");
            let what = (
                tensor.dtype.to_string(),
                tensor.shape.to_vec(),
                tensor.data.to_vec(),
            );
            (name.to_owned(), what)
        })
        .collect()
}

/// All bits, groups and recipes, on folders of several families: the same tensors, to the bit.
#[test]
fn folders_become_the_tensors_that_mlx_lm_makes() {
    let place = tempfile::tempdir().expect("a folder");
    let mut cases = Vec::new();
    for bits in [2, 3, 4, 5, 6, 8] {
        cases.push(("llama", uniform(bits, 32), None));
        cases.push(("qwen2", uniform(bits, 64), Some(FloatType::BF16)));
    }
    for recipe in Recipe::ALL {
        let bits = WeightBits::Mixed {
            recipe,
            group_size: 32,
        };
        cases.push(("qwen3", bits, Some(FloatType::F16)));
    }
    cases.push(("llama-3", WeightBits::AsTheyAre, Some(FloatType::BF16)));
    cases.push(("mistral", WeightBits::AsTheyAre, None));
    cases.push(("llama-linear", uniform(4, 128), None));
    cases.push(("gemma3-text", uniform(4, 32), Some(FloatType::BF16)));
    let folder = |who: &str, number: usize| place.path().join(format!("{who}-{number}"));
    let jobs: Vec<Value> = cases
        .iter()
        .enumerate()
        .map(|(number, (name, bits, dtype))| {
            let (bits, group_size, recipe) = match bits {
                WeightBits::Uniform { bits, group_size } => (Some(bits), Some(group_size), None),
                WeightBits::Mixed { recipe, group_size } => (None, Some(group_size), Some(recipe.name())),
                WeightBits::AsTheyAre | WeightBits::Floats => (None, None, None),
            };
            json!({"from": tiny(name), "to": folder("theirs", number), "bits": bits, "group_size": group_size,
                   "recipe": recipe, "dtype": dtype.map(FloatType::name)})
        })
        .collect();
    python("convert_by_mlx_lm.py", &json!(jobs));
    for (number, &(name, bits, dtype)) in cases.iter().enumerate() {
        let ours = folder("ours", number);
        convert(&tiny(name), &ours, &options(bits, dtype));
        let theirs = folder("theirs", number);
        let (found, expected) = (tensors(&ours), tensors(&theirs));
        assert_eq!(
            found.keys().collect::<Vec<_>>(),
            expected.keys().collect::<Vec<_>>(),
            "{name} {bits:?}"
        );
        for (tensor, expected) in &expected {
            assert!(found[tensor] == *expected, "{name} {bits:?} {dtype:?}: {tensor}");
        }
        let read = |folder: &Path, file: &str| -> Value {
            serde_json::from_slice(&std::fs::read(folder.join(file)).expect("a file")).expect("JSON")
        };
        let index = "model.safetensors.index.json";
        assert_eq!(read(&ours, index), read(&theirs, index), "{name} {bits:?}");
        let (ours, theirs) = (read(&ours, "config.json"), read(&theirs, "config.json"));
        // The bits that a matrix is said to have.
        let said = |config: &Value, matrix: &str| {
            let all = &config["quantization"];
            let own = if all[matrix].is_object() {
                &all[matrix]
            } else {
                all
            };
            (own["bits"].clone(), own["group_size"].clone())
        };
        for tensor in expected.keys().filter_map(|name| name.strip_suffix(".scales")) {
            assert_eq!(
                said(&ours, tensor),
                said(&theirs, tensor),
                "{name} {bits:?}: {tensor}"
            );
        }
    }
}

#[test]
fn a_quantized_folder_is_taken_over_dequantized_and_quantized_anew() {
    let place = tempfile::tempdir().expect("a folder");
    let from = tiny("qwen3-mixed");
    let same = place.path().join("same");
    assert!(convert(&from, &same, &ConvertOptions::default()).is_exact());
    assert_eq!(tensors(&same), tensors(&from));

    let dense = place.path().join("dense");
    convert(&from, &dense, &options(WeightBits::Floats, Some(FloatType::F32)));
    let again = place.path().join("again");
    let report = convert(&dense, &again, &options(uniform(8, 32), None));
    assert!(!report.is_exact());
    let expected = logits(&from, &PROMPT);
    assert!(difference(&logits(&dense, &PROMPT), &expected) < 1e-5);
    // 8 bits are near enough to show that it is the same model.
    assert!(difference(&logits(&again, &PROMPT), &expected) < 0.05);
}

#[test]
fn nothing_is_left_of_what_did_not_succeed() {
    let place = tempfile::tempdir().expect("a folder");
    let target = place.path().join("model");
    let left = || std::fs::read_dir(place.path()).expect("the folder").count();
    let attempt = |from: &Path, options: &ConvertOptions, stop: bool| {
        let origin = Origin::default();
        let error = convert_model(from, &target, options, &origin, &mut |stage| {
            if stop && stage.done > 1000 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        error.expect_err("it fails")
    };
    let asked = options(uniform(4, 32), None);
    assert!(matches!(
        attempt(&tiny("llama"), &asked, true),
        ConvertError::Cancelled
    ));
    assert_eq!(left(), 0);
    let missing = attempt(&place.path().join("nowhere"), &asked, false).to_string();
    assert!(missing.ends_with("does not exist"), "{missing}");
    for (bits, expect) in [
        (
            uniform(7, 32),
            "7 bits were asked for, MLX has 2, 3, 4, 5, 6 and 8",
        ),
        (
            uniform(4, 33),
            "groups of 33 were asked for, MLX has 32, 64 and 128",
        ),
    ] {
        let error = attempt(&tiny("llama"), &options(bits, None), false).to_string();
        assert!(error.contains(expect), "{error}");
    }
    assert_eq!(left(), 0);

    // A weight that float16 does not reach, in the last tensors that are written.
    let large = place.path().join("large");
    std::fs::create_dir(&large).expect("a folder");
    let config = std::fs::read(tiny("llama").join("config.json")).expect("a file");
    std::fs::write(large.join("config.json"), config).expect("it is written");
    let mut bytes = std::fs::read(tiny("llama").join("model.safetensors")).expect("a file");
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&1e30_f32.to_le_bytes());
    std::fs::write(large.join("model.safetensors"), bytes).expect("it is written");
    let error = attempt(
        &large,
        &options(WeightBits::AsTheyAre, Some(FloatType::F16)),
        false,
    );
    assert!(
        error.to_string().ends_with("is beyond the range of float16"),
        "{error}"
    );
    assert!(error.hint().expect("a hint").contains("float32"));
    assert_eq!(left(), 1);
}
