//! The command from outside: output, messages and exit codes.

use assert_cmd::Command;
use serde_json::Value;

fn command(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("mlx-engine").expect("the command is built");
    command.args(args);
    command
}

/// Runs the command and returns its exit code, stdout and stderr.
fn run(args: &[&str], stdin: impl Into<Vec<u8>>) -> (i32, String, String) {
    let output = command(args)
        .write_stdin(stdin)
        .output()
        .expect("the command runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (
        output.status.code().expect("an exit code"),
        text(output.stdout),
        text(output.stderr),
    )
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

const MOCK: [&str; 5] = ["generate", "--model", "tiny", "--backend", "mock"];

fn mock<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&MOCK[..], args].concat()
}

#[test]
fn json_is_one_object_that_names_the_mock() {
    let (code, out, _) = run(&mock(&["--prompt", "Hi", "--json", "--raw"]), "");
    let found = json(&out);
    assert_eq!(code, 0);
    assert_eq!(
        (&found["backend"], &found["device"], &found["text"]),
        (&"mock".into(), &"cpu".into(), &"Hi".into())
    );
    assert_eq!(found["finish_reason"], "stop");
    assert_eq!(found["tokens"], serde_json::json!([72, 105, 256]));
    assert_eq!(
        found["usage"],
        serde_json::json!({"prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": 0})
    );
    for key in ["load_s", "ttft_s", "prompt_tps", "generation_tps"] {
        assert!(found["timings"][key].is_number(), "{key}");
    }
    assert!(found["peak_memory_bytes"].is_number() && found["logprobs"].is_null());
}

#[test]
fn guesses_are_reported_and_change_nothing() {
    let ask = |more: &[&str]| {
        let prompt = ["--prompt", "one two three, one two three, one", "--raw", "--json"];
        let (code, out, err) = run(&mock(&[&prompt[..], more].concat()), "");
        assert_eq!(code, 0, "{err}");
        json(&out)
    };
    let plain = ask(&[]);
    assert!(plain["speculation"].is_null());
    for more in [&["--speculate"][..], &["--draft-model", "tiny"]] {
        let guessed = ask(more);
        assert_eq!(guessed["tokens"], plain["tokens"]);
        for count in ["steps", "drafted_tokens", "accepted_tokens", "paused_steps"] {
            assert!(guessed["speculation"][count].is_u64(), "{guessed}");
        }
    }
    let (code, _, err) = run(
        &mock(&["--prompt", "Hi", "--speculate", "--draft-model", "tiny"]),
        "",
    );
    assert!(code == 2 && err.contains("cannot be used with"), "{err}");
}

#[test]
fn the_answer_is_on_stdout_and_the_rest_on_stderr() {
    let (code, out, err) = run(&mock(&["--raw", "-"]), "from stdin");
    assert_eq!((code, out.as_str()), (0, "from stdin\n"));
    assert!(
        err.contains("[tiny | backend mock on cpu | prompt 10 tokens (0 cached)"),
        "{err}"
    );
    assert!(!err.contains('\u{1b}'), "nothing is drawn in a pipe: {err}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    std::fs::write(&file, "from a file").unwrap();
    let (_, out, _) = run(&mock(&["--raw", "--prompt-file", file.to_str().unwrap()]), "");
    assert_eq!(out, "from a file\n");
    let (_, out, _) = run(&mock(&["--prompt", "Hi", "--system", "Be brief."]), "");
    assert!(out.contains("Be brief.\nuser: Hi"), "{out}");
    let (_, out, _) = run(
        &mock(&["--raw", "--prompt", "one two", "--stop", "tw", "--stop", "x"]),
        "",
    );
    assert_eq!(out, "one \n");
}

#[test]
fn a_command_that_makes_no_sense_exits_with_2() {
    for args in [
        vec!["generate"],
        mock(&["--prompt", "a", "-"]),
        mock(&["--prompt", "a", "--max-tokens", "many"]),
        mock(&["--prompt", "a", "--logprobs", "21"]),
        mock(&["--prompt", "a", "--backend", "other"]),
        mock(&["--raw", "--system", "s", "--prompt", "a"]),
        mock(&["--prompt", "a", "--kv-bits", "7"]),
        mock(&["--prompt", "a", "--kv-bits", "many"]),
        mock(&["--prompt", "a", "--max-kv", "63"]),
        mock(&["--prompt", "a", "--max-kv", "-1"]),
        mock(&["--prompt", "a", "--fit"]),
        mock(&["--prompt", "a", "--fit=much"]),
        vec!["nonsense"],
    ] {
        let (code, out, err) = run(&args, "");
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.contains("error: "), "{err}");
    }
}

#[test]
fn a_failure_exits_with_1_and_says_what_to_do() {
    let check = |args: &[&str], stdin: &[u8], expect: &str| {
        let (code, out, err) = run(args, stdin);
        assert_eq!((code, out.as_str()), (1, ""), "{args:?}: {err}");
        assert!(err.contains(expect), "{err}");
    };
    check(
        &mock(&["--prompt", "a", "--top-p", "2"]),
        b"",
        "error: invalid parameter: `top_p` is 2",
    );
    check(
        &mock(&["--prompt", "", "--raw"]),
        b"",
        "error: prompt is empty\nhint: give at least one message",
    );
    check(
        &mock(&["-"]),
        b"ab\xff",
        "stdin is not UTF-8: byte 2 begins no character",
    );
    check(
        &mock(&["--prompt-file", "no/such.txt"]),
        b"",
        "error: `no/such.txt` could not be read",
    );
    check(
        &mock(&["--raw", "-"]),
        &[b'a'; 5000],
        "prompt of 5000 tokens does not fit the context of 4096",
    );
    check(
        &mock(&["--prompt", "a", "--logprobs", "1"]),
        b"",
        "the mock has no probabilities to report",
    );
    check(
        &["models", "show", "no-such-model"],
        b"",
        "model `no-such-model` not found",
    );
    check(
        &["tokenize", "--model", "x", "--chat"],
        b"[",
        "stdin is no JSON list of messages",
    );
    let missing = if cfg!(feature = "mlx") {
        "there is no such file or folder"
    } else {
        "mlx is unavailable"
    };
    check(
        &[
            "generate",
            "--model",
            "./no/such",
            "--backend",
            "mlx",
            "--prompt",
            "a",
        ],
        b"",
        missing,
    );
}

#[test]
fn models_are_listed_and_shown() {
    let (code, out, _) = run(&["models", "list", "--json"], "");
    let models = json(&out);
    assert!(code == 0 && models.as_array().unwrap().len() >= 25);
    let id = models[0]["id"].as_str().unwrap();
    let (_, out, _) = run(&["models", "list"], "");
    assert!(out.contains(id));
    let (_, out, _) = run(&["models", "show", id], "");
    let licence = models[0]["licence"].as_str().unwrap();
    assert!(
        [id, "context", licence].iter().all(|text| out.contains(text)),
        "{out}"
    );
    let (_, out, _) = run(&["models", "show", id, "--json"], "");
    assert_eq!(json(&out), models[0]);
}

#[test]
fn doctor_says_what_there_is() {
    let (code, out, _) = run(&["doctor"], "");
    assert!(
        code == 0 && out.contains("memory") && out.contains("mlx"),
        "{out}"
    );
    let (_, out, _) = run(&["doctor", "--json"], "");
    assert_eq!(json(&out)["mlx"], cfg!(feature = "mlx"));
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_is_no_failure() {
    use std::process::{Command, Stdio};

    let program = assert_cmd::cargo::cargo_bin("mlx-engine");
    let mut child = Command::new(program)
        .args(["models", "list", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
}

#[test]
fn chat_reads_lines_from_a_pipe() {
    let args = [
        "chat",
        "--model",
        "tiny",
        "--backend",
        "mock",
        "--system",
        "Be kind.",
    ];
    let (code, out, err) = run(
        &args,
        "/help\nHello\n\n/history\n/clear\n/history\n/nope\n/quit\nnever\n",
    );
    assert_eq!(code, 0);
    assert!(out.contains("user: Hello") && !out.contains("never"), "{out}");
    assert_eq!(out.lines().last(), Some("system: Be kind."));
    assert!(
        err.contains("Ctrl-C stops an answer") && err.contains("`/nope` is no command"),
        "{err}"
    );
}

#[test]
fn an_empty_prompt_is_refused_wherever_it_comes_from() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let path = file.path().to_str().expect("UTF-8");
    for args in [&["--prompt", ""][..], &["--prompt-file", path], &["-"]] {
        let (code, out, err) = run(&mock(args), "");
        assert_eq!((code, out.as_str()), (1, ""), "{args:?}");
        assert!(err.contains("prompt is empty"), "{err}");
    }
}

#[test]
fn values_may_begin_with_a_hyphen() {
    let (code, out, _) = run(&mock(&["--prompt", "-5 + 3 = ?", "--raw", "--stop", "--"]), "");
    assert_eq!((code, out.as_str()), (0, "-5 + 3 = ?\n"));
    let (code, _, err) = run(&mock(&["--prompt", "Hi", "--temperature", "-1"]), "");
    assert_eq!(code, 1);
    assert!(err.contains("`temperature` is -1, allowed: 0 to 2"), "{err}");
}

#[test]
fn a_script_hears_that_a_message_of_its_chat_failed() {
    let args = [
        "chat",
        "--model",
        "tiny",
        "--backend",
        "mock",
        "--max-tokens",
        "8",
    ];
    let too_long = "x".repeat(5000);
    let (code, out, err) = run(&args, format!("Hi\n{too_long}\nHello\n"));
    assert!(err.contains("does not fit the context"), "{err}");
    assert_eq!((code, out.matches("user: Hi").count()), (1, 2), "{out}");
}

#[cfg(unix)]
#[test]
fn stderr_that_cannot_be_written_changes_nothing() {
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .expect("the device");
    let output = std::process::Command::new(assert_cmd::cargo::cargo_bin("mlx-engine"))
        .args(mock(&["--prompt", "Hi", "--raw"]))
        .stderr(full)
        .output()
        .expect("the command runs");
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(0), &b"Hi\n"[..])
    );
}

#[test]
fn bench_of_batches_reports_a_row_for_each() {
    let args = [
        "bench",
        "--model",
        "tiny",
        "--backend",
        "mock",
        "-p",
        "4",
        "-n",
        "8",
        "-r",
        "2",
        "--batch",
        "1,3",
        "--json",
    ];
    let (code, out, err) = run(&args, "");
    assert_eq!(code, 0, "{err}");
    let found = json(&out);
    let rows = found["batches"].as_array().expect("rows");
    let batches: Vec<u64> = rows.iter().filter_map(|row| row["batch"].as_u64()).collect();
    assert_eq!((found["backend"].as_str(), batches), (Some("mock"), vec![1, 3]));
    assert!(
        rows.iter()
            .all(|row| row["prompt_tps"].is_number() && row["generation_tps"].is_number())
    );
}

#[test]
fn bench_reports_medians() {
    let (code, out, _) = run(
        &[
            "bench",
            "--model",
            "t",
            "--backend",
            "mock",
            "-p",
            "8",
            "-n",
            "4",
            "-r",
            "2",
            "--json",
        ],
        "",
    );
    let found = json(&out);
    assert_eq!((code, &found["backend"]), (0, &"mock".into()));
    for key in [
        "prompt_tps",
        "generation_tps",
        "ttft_s",
        "load_s",
        "peak_memory_bytes",
    ] {
        assert!(found[key].is_number(), "{key}");
    }
}

#[cfg(feature = "mlx")]
mod real {
    use super::*;

    fn model() -> String {
        let path = std::env::var("MLX_ENGINE_TEST_MODEL");
        path.expect("MLX_ENGINE_TEST_MODEL names the test model; run the tests by `cargo xtask test`")
    }

    #[test]
    fn a_real_model_answers() {
        let question = "What is the capital of France?";
        let args = [
            "generate",
            "--model",
            &model(),
            "--prompt",
            question,
            "--temperature",
            "0",
            "--json",
            "--logprobs",
            "1",
        ];
        let (code, out, err) = run(&args, "");
        let found = json(&out);
        assert_eq!(
            (code, &found["text"]),
            (0, &"The capital of France is Paris.".into()),
            "{err}"
        );
        assert_eq!(found["backend"], "mlx");
        let (tokens, logprobs) = (
            found["tokens"].as_array().unwrap(),
            found["logprobs"].as_array().unwrap(),
        );
        assert_eq!((tokens.len(), logprobs.len()), (8, 8));
        assert_eq!(logprobs[0]["top"][0]["token"], tokens[0]);
    }

    #[test]
    fn a_text_is_scored() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("text.txt");
        std::fs::write(&file, "The capital of France is Paris.").unwrap();
        let args = [
            "score",
            "--model",
            &model(),
            "--text-file",
            file.to_str().unwrap(),
        ];
        let (code, out, _) = run(&[&args[..], &["--json"]].concat(), "");
        let found = json(&out);
        assert_eq!((code, found["tokens"].as_array().unwrap().len()), (0, 7));
        assert!(found["logprobs"][0].is_null() && found["logprobs"][6].as_f64().unwrap() < 0.0);
        assert!(found["perplexity"].as_f64().unwrap() > 1.0);
        let (_, out, _) = run(&args, "");
        assert!(
            out.starts_with("504\t-\n") && out.contains("perplexity\t"),
            "{out}"
        );
    }

    /// The log-probabilities of a text, as keys and values are kept.
    fn scored(folder: &std::path::Path, sentences: usize, more: &[&str]) -> Vec<f64> {
        let file = folder.join("text.txt");
        std::fs::write(&file, "The river flows by the town. ".repeat(sentences)).expect("it is written");
        let (model, file) = (model(), file.to_str().expect("UTF-8").to_owned());
        let args = ["score", "--model", &model, "--text-file", &file, "--json"];
        let (code, out, err) = run(&[&args[..], more].concat(), "");
        assert_eq!(code, 0, "{err}");
        let found = json(&out);
        let found = found["logprobs"].as_array().expect("a list")[1..].iter();
        found.map(|logprob| logprob.as_f64().expect("a number")).collect()
    }

    fn mean(values: &[f64]) -> f64 {
        values.iter().sum::<f64>() / values.len() as f64
    }

    #[test]
    fn keys_and_values_are_integers_of_as_many_bits_as_told() {
        let folder = tempfile::tempdir().unwrap();
        let score = |more: &[&str]| scored(folder.path(), 12, more);
        let floats = score(&[]);
        let off = |bits: &str| {
            let found = score(&["--kv-bits", bits]);
            assert_eq!(found.len(), floats.len());
            let off: Vec<f64> = found.iter().zip(&floats).map(|(a, b)| (a - b).abs()).collect();
            mean(&off)
        };
        let (eight, four) = (off("8"), off("4"));
        // Each has its effect, and fewer bits a larger one.
        assert!(0.0 < eight && eight < 0.1, "{eight}");
        assert!(four > 2.0 * eight && four < 2.0, "{four}");
    }

    #[test]
    fn a_window_forgets_what_is_beyond_it_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let both = |sentences| {
            let windowed = scored(folder.path(), sentences, &["--max-kv", "64"]);
            (scored(folder.path(), sentences, &[]), windowed)
        };
        let (all, windowed) = both(7);
        assert!(all.len() > 40 && all.len() < 64 && all == windowed, "all is seen");
        let (all, windowed) = both(20);
        assert!(all.len() > 128);
        assert_eq!(all[..60], windowed[..60]);
        assert_ne!(all[64..], windowed[64..]);
    }

    #[test]
    fn what_fits_into_a_memory_is_chosen_and_told() {
        let fit = |more: &[&str]| {
            let model = model();
            let args = [
                "generate",
                "--model",
                &model,
                "--prompt",
                "Hi",
                "--max-tokens",
                "2",
            ];
            run(&[&args[..], more].concat(), "")
        };
        let context = |more: &[&str]| {
            let (code, _, err) = fit(more);
            let line = err.lines().find_map(|line| line.strip_prefix("fit: context "));
            let line = line.unwrap_or_else(|| panic!("{code}: {err}"));
            assert_eq!(code, 0, "{err}");
            let context = line.split_once(',').and_then(|(context, _)| context.parse().ok());
            context.unwrap_or_else(|| panic!("{line}"))
        };
        let floats: u32 = context(&["--fit=250MB"]);
        let integers: u32 = context(&["--fit=250MB", "--kv-bits", "4"]);
        let windowed: u32 = context(&["--fit=250MB", "--max-kv", "1024"]);
        assert!(floats < integers && integers <= 8192, "{floats} {integers}");
        assert_eq!(windowed, 8192, "no more is kept, however long the context");
        assert_eq!(context(&["--fit"]), 8192, "there is room enough here");
        let (code, out, err) = fit(&["--fit=100MB"]);
        assert!(code == 1 && out.is_empty() && err.contains("memory"), "{err}");
    }

    #[test]
    fn text_and_conversations_are_tokenized() {
        let (_, out, _) = run(&["tokenize", "--model", &model(), "--json"], "Hello world\n");
        assert_eq!(
            json(&out),
            serde_json::json!({"ids": [19556, 905, 198], "text": "Hello world\n"})
        );
        let messages = r#"[{"role": "system", "content": "x"}, {"role": "user", "content": "Hello"}]"#;
        let (_, out, _) = run(&["tokenize", "--model", &model(), "--json", "--chat"], messages);
        let found = json(&out);
        let expected =
            "<|im_start|>system\nx<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(found["text"], expected);
        assert_eq!(found["ids"][0], 1);
        let (_, out, _) = run(&["tokenize", "--model", &model()], "Hello");
        assert_eq!(out, "19556\n");
        // The template sees what is written.
        let messages = r#"[{"role": "developer", "content": "x", "extra": 1}, {"role": "assistant", "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]"#;
        let (code, out, err) = run(&["tokenize", "--model", &model(), "--json", "--chat"], messages);
        assert_eq!(code, 0, "{err}");
        assert!(
            json(&out)["text"]
                .as_str()
                .unwrap()
                .contains("<|im_start|>developer\nx"),
            "{out}"
        );
        let (code, _, err) = run(
            &["tokenize", "--model", &model(), "--chat"],
            r#"[{"content": "x"}]"#,
        );
        assert!(code == 1 && err.contains("a message without a `role`"), "{err}");
    }

    #[test]
    #[cfg(feature = "grammar")]
    fn an_answer_keeps_to_a_schema_and_to_an_expression() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("schema.json");
        let schema = r#"{"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "population": {"type":
            "integer", "minimum": 0, "maximum": 99}}, "required": ["city", "population"], "additionalProperties": false}"#;
        std::fs::write(&file, schema).expect("a file");
        let file = file.to_str().expect("a name");
        let model = model();
        for seed in ["1", "2", "3"] {
            let args = [
                "generate",
                "--model",
                &model,
                "--prompt",
                "Name a city.",
                "--json",
                "--seed",
                seed,
            ];
            let hot = ["--temperature", "2", "--json-schema", file];
            let (code, out, err) = run(&[&args[..], &hot].concat(), "");
            assert_eq!(code, 0, "{err}");
            let answer = json(json(&out)["text"].as_str().expect("a text"));
            assert!(
                answer["city"].as_str().expect("a string").chars().count() <= 12,
                "{answer}"
            );
            assert!(
                answer["population"].as_u64().expect("an integer") <= 99,
                "{answer}"
            );
            assert_eq!(json(&out)["finish_reason"], "stop");
            let (_, out, _) = run(&[&args[..], &["--regex", "(yes|no), sir"]].concat(), "");
            let answer = json(&out)["text"].clone();
            assert!(answer == "yes, sir" || answer == "no, sir", "{answer}");
        }
        let args = ["generate", "--model", &model, "--prompt", "x", "--regex", "("];
        let (code, _, err) = run(&args, "");
        assert!(code == 1 && err.contains("output constraint refused"), "{err}");
    }

    #[test]
    fn tools_are_called_and_their_results_are_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tools.json");
        let file = file.to_str().unwrap();
        let schema = serde_json::json!({"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
                            "additionalProperties": false});
        let tool = serde_json::json!({"type": "function", "function": {"name": "get_weather", "parameters": schema}});
        std::fs::write(file, serde_json::json!([tool]).to_string()).unwrap();
        let model = model();
        let tools = [
            "--model",
            &model,
            "--temperature",
            "0",
            "--max-tokens",
            "60",
            "--tools",
            file,
            "--tool-format",
            "hermes",
            "--tool-choice",
            "get_weather",
        ];
        let (code, out, err) = run(
            &[
                &["generate", "--prompt", "Weather in Rome?", "--json"],
                &tools[..],
            ]
            .concat(),
            "",
        );
        assert_eq!(code, 0, "{err}");
        let output = json(&out);
        let call = &output["tool_calls"][0];
        assert!(jsonschema::is_valid(&schema, &call["arguments"]), "{out}");
        assert_eq!(call["name"], "get_weather");
        let input = "Weather in Rome?\n{\"celsius\": 21}\n{\"celsius\": 21}\n/history\n";
        let (code, out, err) = run(&[&["chat"], &tools[..]].concat(), input);
        assert_eq!(code, 0, "{err}");
        assert!(err.contains("[result of get_weather as a line of JSON]"), "{err}");
        assert!(out.contains("calls get_weather {\"city\":"), "{out}");
        assert!(out.contains("tool: {\"celsius\": 21}"), "{out}");
        // A template that knows no tools, and a file that has none.
        let (code, _, err) = run(
            &["generate", "--model", &model, "--prompt", "x", "--tools", file],
            "",
        );
        assert!(code == 1 && err.contains("tool"), "{err}");
        std::fs::write(file, "[{}]").unwrap();
        let (code, _, err) = run(
            &["generate", "--model", &model, "--prompt", "x", "--tools", file],
            "",
        );
        assert!(code == 1 && err.contains("`type`: \"function\""), "{err}");
    }

    #[test]
    fn a_model_is_examined_by_a_token_of_it() {
        let (code, out, err) = run(&["doctor", "--model", &model(), "--json"], "");
        assert_eq!(
            (code, &json(&out)["health"]["status"]),
            (0, &"healthy".into()),
            "{err}"
        );
        let found = json(&out);
        assert_eq!(found["resilience"]["breaker"], "closed");
        assert_eq!(found["recovery"]["hang_limit"], 120.0);
        assert_eq!(found["status"]["metrics"]["probes"]["passed"], 1);
        assert!(
            found["token_s"].as_f64().is_some_and(|seconds| seconds > 0.0),
            "{out}"
        );
        let (_, out, _) = run(&["doctor", "--model", &model()], "");
        for line in [
            "model       healthy",
            "live: yes, ready: yes",
            "token       1 of 1 came",
            "circuit closed",
        ] {
            assert!(out.contains(line), "{line}: {out}");
        }
        let (code, _, err) = run(&["doctor", "--model", "no/such/model"], "");
        assert!(code == 1 && err.contains("not found"), "{err}");
    }

    #[test]
    fn a_bench_that_does_not_fit_the_context_is_refused() {
        let (code, _, err) = run(&["bench", "--model", &model(), "-p", "8000", "-n", "800"], "");
        assert_eq!(code, 1);
        assert!(
            err.contains("8000 tokens of a prompt and 800 of an answer do not fit the context of 8192"),
            "{err}"
        );
    }

    #[test]
    fn without_the_library_the_mock_answers_and_says_so() {
        let run = |backend| {
            command(&[
                "generate",
                "--model",
                &model(),
                "--backend",
                backend,
                "--prompt",
                "Hi",
                "--json",
            ])
            .env("MLX_ENGINE_LIBRARY", "/no/such/libmlxc.so")
            .output()
            .expect("the command runs")
        };
        let auto = run("auto");
        assert_eq!(json(&String::from_utf8_lossy(&auto.stdout))["backend"], "mock");
        let err = String::from_utf8_lossy(&auto.stderr).into_owned();
        assert!(
            err.contains("warning: the mock answers in place of the model: mlx is unavailable"),
            "{err}"
        );
        let mlx = run("mlx");
        let err = String::from_utf8_lossy(&mlx.stderr).into_owned();
        assert_eq!(mlx.status.code(), Some(1));
        assert!(
            err.contains("error: mlx is unavailable: the MLX library could not be opened")
                && err.contains("hint:")
        );
    }

    #[cfg(unix)]
    #[test]
    fn ctrl_c_ends_an_answer_with_130() {
        use std::io::Read;
        use std::process::{Command, Stdio};

        let program = assert_cmd::cargo::cargo_bin("mlx-engine");
        let endless = [
            "generate",
            "--model",
            &model(),
            "--raw",
            "--prompt",
            "Once upon a time",
            "--max-tokens",
            "4000",
        ];
        let mut child = Command::new(program)
            .args(endless)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the command runs");
        // The first piece of the answer says that it has begun.
        let mut first = [0_u8; 1];
        child
            .stdout
            .as_mut()
            .expect("a pipe")
            .read_exact(&mut first)
            .expect("an answer");
        let killed = Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .expect("kill runs");
        assert!(killed.success());
        assert_eq!(child.wait().expect("it ends").code(), Some(130));
    }

    #[test]
    fn a_converted_model_answers_as_before() {
        let place = tempfile::tempdir().expect("a folder");
        let folder = place.path().join("model");
        let folder = folder.to_str().expect("UTF-8");
        let convert = ["convert", "--model", &model(), "--out", folder, "--json"];
        let (code, out, err) = run(&convert, "");
        assert_eq!(code, 0, "{err}");
        let report = json(&out);
        assert_eq!(
            (&report["exact"], &report["parameters"], &report["licence"]),
            (&true.into(), &134_515_008.into(), &"apache-2.0".into())
        );
        let answer = |model: &str| {
            let prompt = ["--raw", "--prompt", "The capital of France is", "--json"];
            let greedy = ["--temperature", "0", "--max-tokens", "8", "--exact"];
            let (code, out, err) = run(
                &[&["generate", "--model", model][..], &prompt, &greedy].concat(),
                "",
            );
            assert_eq!(code, 0, "{err}");
            json(&out)["tokens"].clone()
        };
        assert_eq!(answer(folder), answer(&model()));

        let (code, _, err) = run(&convert, "");
        assert_eq!(code, 1);
        assert!(
            err.contains("model` is not empty\nhint: give a folder that is not there yet"),
            "{err}"
        );
        for usage in [
            &["--bits", "4"][..],
            &["--quantize", "--recipe", "mixed_9_9"],
            &["--dtype", "float8"],
        ] {
            assert_eq!(run(&[&convert[..], usage].concat(), "").0, 2, "{usage:?}");
        }
    }

    /// The weights are 269 MB then and the largest matrix of them 57 MB, 113 MB as the floats that it is made from.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_conversion_takes_no_memory_for_the_whole_model() {
        let place = tempfile::tempdir().expect("a folder");
        let folder = place.path().join("model");
        // In KiB, of all memory that is no file's: who takes more is refused it, and ends.
        let output = std::process::Command::new("sh")
            .args(["-c", r#"ulimit -d 163840; exec "$0" "$@""#])
            .arg(assert_cmd::cargo::cargo_bin("mlx-engine"))
            .args([
                "convert",
                "--model",
                &model(),
                "--dequantize",
                "--dtype",
                "float16",
                "--out",
            ])
            .arg(&folder)
            .output()
            .expect("the shell runs");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let written = std::fs::metadata(folder.join("model.safetensors")).expect("the weights");
        assert!(written.len() > 163_840 << 10, "more than it could have held");
    }

    #[cfg(unix)]
    #[test]
    fn a_conversion_that_is_killed_leaves_no_folder_and_is_in_nobodys_way() {
        use std::process::{Command, Stdio};

        let place = tempfile::tempdir().expect("a folder");
        let folder = place.path().join("model");
        let convert = [
            "convert",
            "--model",
            &model(),
            "--out",
            folder.to_str().expect("UTF-8"),
        ];
        let mut child = Command::new(assert_cmd::cargo::cargo_bin("mlx-engine"))
            .args(convert)
            .args(["--dequantize", "--dtype", "float32"])
            .stderr(Stdio::null())
            .spawn()
            .expect("the command runs");
        while !place.path().join(".model.converting/model.safetensors").exists() {
            assert!(child.try_wait().expect("it can be asked").is_none());
            std::thread::yield_now();
        }
        child.kill().expect("it runs");
        child.wait().expect("it ends");
        assert!(!folder.exists());
        let (code, _, err) = run(&convert, "");
        assert_eq!(code, 0, "{err}");
        let left = std::fs::read_dir(place.path()).expect("the folder").count();
        assert_eq!(left, 1, "what the killed one left is gone");
    }

    #[cfg(unix)]
    #[test]
    fn ctrl_c_ends_a_conversion_with_130_and_leaves_nothing() {
        use std::process::{Command, Stdio};

        let place = tempfile::tempdir().expect("a folder");
        let mut child = Command::new(assert_cmd::cargo::cargo_bin("mlx-engine"))
            .args([
                "convert",
                "--model",
                &model(),
                "--dequantize",
                "--dtype",
                "float32",
            ])
            .arg("--out")
            .arg(place.path().join("model"))
            .stderr(Stdio::null())
            .spawn()
            .expect("the command runs");
        // The file says that it has begun.
        while !place.path().join(".model.converting/model.safetensors").exists() {
            assert!(child.try_wait().expect("it can be asked").is_none());
            std::thread::yield_now();
        }
        let killed = Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .expect("kill runs");
        assert!(killed.success());
        assert_eq!(child.wait().expect("it ends").code(), Some(130));
        let left = std::fs::read_dir(place.path()).expect("the folder").count();
        assert_eq!(left, 0);
    }
}

#[test]
fn what_was_counted_is_told() {
    // Where the answer fails, too.
    let (code, _, err) = run(&mock(&["--prompt", "", "--raw", "--verbose"]), "");
    assert!(
        code == 1 && err.contains("requests    1 (0 cancelled, 1 failed)"),
        "{err}"
    );
    let (_, out, err) = run(&mock(&["--prompt", "Hi", "--raw", "--verbose"]), "");
    assert_eq!(out, "Hi\n");
    assert!(err.contains("requests    1 (0 cancelled, 0 failed)"), "{err}");
    assert!(err.contains("health      degraded"), "{err}");
    let chat = ["chat", "--model", "tiny", "--backend", "mock"];
    let (_, _, err) = run(&chat, "a\nb\n/stats\n");
    assert!(err.contains("requests    2 "), "{err}");
    let (_, _, err) = run(&[&chat[..], &["--verbose"]].concat(), "a\nb\nc\n");
    assert!(err.contains("requests    3 "), "{err}");
    let (_, _, err) = run(&chat, "a\n");
    assert!(!err.contains("requests"), "a script did not ask: {err}");
}

#[test]
fn models_are_searched_and_recommended() {
    let (code, out, _) = run(
        &["models", "search", "qwen3", "4bit", "--limit", "3", "--json"],
        "",
    );
    let found = json(&out);
    let ids: Vec<&str> = found
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["id"].as_str().unwrap())
        .collect();
    assert!(code == 0 && ids.len() == 3, "{ids:?}");
    assert!(
        ids.iter().all(|id| id.to_lowercase().contains("qwen3")),
        "{ids:?}"
    );
    let (code, _, err) = run(&["models", "search", "no", "such", "model", "at", "all"], "");
    assert!(code == 1 && err.contains("no model is like that"), "{err}");

    let on = |memory| {
        run(
            &["models", "recommend", "laptop-chat", "--memory", memory, "--json"],
            "",
        )
    };
    let (_, small, _) = on("8000000000");
    let (_, large, _) = on("64000000000");
    for (picks, most) in [(&small, 8e9), (&large, 64e9)] {
        for pick in json(picks).as_array().unwrap() {
            assert!(pick["model"]["size_bytes"].as_f64().unwrap() < most, "{pick}");
            assert!(!pick["reason"].as_str().unwrap().is_empty());
        }
    }
    assert_ne!(small, large);
    let (code, _, err) = run(&["models", "recommend", "code", "--memory", "1000000"], "");
    assert!(
        code == 1 && err.contains("no model of the registry suits"),
        "{err}"
    );
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_what_waits_for_stdin() {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};

    let start = |args: &[&str]| {
        Command::new(assert_cmd::cargo::cargo_bin("mlx-engine"))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the command starts")
    };
    let interrupt = |child: &std::process::Child| {
        let sent = Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status();
        assert!(sent.expect("kill runs").success());
    };
    let mut child = start(&["chat", "--model", "tiny", "--backend", "mock"]);
    let mut stdin = child.stdin.take().expect("a pipe");
    writeln!(stdin, "hello").expect("it reads");
    let mut out = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut line = String::new();
    // The answer shows that it is past its start.
    out.read_line(&mut line).expect("it answers");
    writeln!(stdin, "/history").expect("it reads");
    out.read_line(&mut line).expect("it answers");
    interrupt(&child);
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
}

#[test]
fn a_configuration_that_was_measured_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("engine.json");
    let path = file.to_str().unwrap();
    let model = ["--model", "tiny", "--backend", "mock"];
    let optimize = [
        &["optimize", "--time-limit", "20", "--json", "--output", path],
        &model[..],
    ]
    .concat();
    let (code, out, err) = run(&optimize, "");
    assert_eq!(code, 0, "{err}");
    let report = json(&out);
    let written = json(&std::fs::read_to_string(&file).unwrap());
    assert_eq!(report["config"], written);
    assert!(!report["trials"].as_array().unwrap().is_empty());
    let (code, out, _) = run(&mock(&["--prompt", "Hi", "--raw", "--config", path]), "");
    assert_eq!((code, out.as_str()), (0, "Hi\n"));
    std::fs::write(&file, r#"{"max_batch": 0}"#).unwrap();
    let (code, _, err) = run(&mock(&["--prompt", "Hi", "--config", path]), "");
    assert!(code == 1 && err.contains("`max_batch` is 0"), "{err}");
}

/// What one process has computed is there for the next, also where it did nothing but answer once.
#[test]
fn a_folder_keeps_what_was_computed_for_the_next_process() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.json");
    let kept = serde_json::json!({"prefix_cache": {"disk": {
        "folder": folder.path().join("kept"), "min_free_bytes": 0}}});
    std::fs::write(&config, kept.to_string()).unwrap();
    let prompt = "a word and another, ".repeat(80);
    let ask = || {
        let config = config.to_str().expect("UTF-8");
        let asked = ["--raw", "--json", "--config", config, "--prompt", &prompt];
        let (code, out, err) = run(&mock(&asked), "");
        assert_eq!(code, 0, "{err}");
        json(&out)["usage"]["cached_tokens"].clone()
    };
    // 1600 bytes are six chunks of 256 tokens and a rest.
    assert_eq!((ask(), ask()), (0.into(), 1536.into()));
}
