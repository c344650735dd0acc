//! The examples, each run as the program that a user would run: on the real model, and on the mock where the build has no
//! MLX.

use std::collections::BTreeSet;
use std::env::consts::EXE_SUFFIX;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use mlx_engine::{EngineConfig, ModelRegistry};

const QUESTION: &str = "What is the capital of France?";

/// What the model is called: the test model, or any name where the mock stands in for it.
fn model() -> String {
    if cfg!(feature = "mlx") {
        let path = std::env::var("MLX_ENGINE_TEST_MODEL");
        return path
            .expect("MLX_ENGINE_TEST_MODEL names the test model; run the tests by `cargo xtask test`");
    }
    "any name".to_owned()
}

/// The folder of the examples that cargo built together with this test.
fn folder() -> PathBuf {
    let this = std::env::current_exe().expect("the path of this test");
    let target = this.ancestors().nth(2).expect("the folder above `deps`");
    target.join("examples")
}

fn example(name: &str) -> Command {
    let program = folder().join(format!("{name}{EXE_SUFFIX}"));
    assert!(
        program.is_file(),
        "{} is missing: `cargo build --examples` makes it, as `cargo test` does unless `--test` narrows it",
        program.display()
    );
    Command::new(program)
}

/// What an example writes to stdout, and to stderr, where it ends well.
#[track_caller]
fn run(command: &mut Command) -> (String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().expect("the example starts");
    let (stdout, stderr) = (text(stdout), text(stderr));
    assert!(status.success(), "{command:?}: {status}\n{stdout}\n--\n{stderr}");
    (stdout, stderr)
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).expect("an example writes UTF-8")
}

/// The answer to a question, by the first example.
fn ask(question: &str) -> String {
    let (answer, told) = run(example("ask").arg(model()).arg(question));
    let backend = if cfg!(feature = "mlx") { "mlx" } else { "mock" };
    assert!(told.contains(&format!("by {backend} on")), "{told}");
    answer.trim_end_matches('\n').to_owned()
}

/// The numbers of a line.
fn numbers(line: &str) -> Vec<u64> {
    line.split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

#[test]
fn every_example_is_tested_here() {
    let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples");
    let names: BTreeSet<String> = std::fs::read_dir(sources)
        .expect("the folder of the examples")
        .map(|entry| entry.expect("an entry").path())
        .map(|path| path.file_stem().expect("a name").to_string_lossy().into_owned())
        .collect();
    let tests = include_str!("examples.rs");
    let untested: Vec<_> = names
        .iter()
        .filter(|name| !tests.contains(&format!("example(\"{name}\")")))
        .collect();
    assert!(untested.is_empty(), "{untested:?}");
}

#[test]
fn what_is_wrong_with_a_command_is_said() {
    let output = example("ask").output().expect("the example starts");
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(text(output.stderr), "usage: ask MODEL QUESTION\n");
}

#[test]
fn a_conversation_keeps_what_it_computed() {
    let (said, _) = run(example("chat").arg(model()));
    let counts: Vec<Vec<u64>> = said
        .lines()
        .filter(|line| line.contains("of them kept"))
        .map(numbers)
        .collect();
    let [first, second] = &counts[..] else {
        panic!("{said}")
    };
    assert_eq!(first[1], 0, "{said}");
    assert!(second[1] >= first[0] && second[1] < second[0], "{said}");
}

#[test]
fn pieces_add_up_to_the_answer() {
    let (streamed, told) = run(example("stream").arg(model()).arg(QUESTION));
    let answer = ask(QUESTION);
    assert_eq!(streamed, format!("{answer}\n"));
    assert!(!answer.is_empty() && told.contains("ended by"), "{told}");
}

#[cfg(all(feature = "mlx", feature = "schemars"))]
#[test]
fn an_answer_is_valid_for_another_validator() {
    let (json, told) = run(example("structured").arg(model()));
    let value: serde_json::Value = serde_json::from_str(&json).expect(&told);
    let schema = serde_json::json!({
        "type": "object", "additionalProperties": false, "required": ["name", "country", "coastal", "sights"],
        "properties": {
            "name": {"type": "string", "maxLength": 30}, "coastal": {"type": "boolean"},
            "country": {"enum": ["france", "germany", "italy"]},
            "sights": {"type": "array", "maxItems": 3, "items": {"type": "string", "maxLength": 30}},
        },
    });
    jsonschema::validate(&schema, &value).expect("the schema holds");
}

#[cfg(all(feature = "mlx", feature = "grammar"))]
#[test]
fn a_tool_is_called_with_what_its_schema_allows() {
    let (said, _) = run(example("tools").arg(model()));
    let call = said.lines().next().expect("a call");
    let rest = call.strip_prefix("get_weather(").expect("the tool's name");
    let (arguments, result) = rest.split_once(") = ").expect("a result");
    let arguments: serde_json::Value = serde_json::from_str(arguments).expect("JSON");
    let city = arguments["city"].as_str().expect("a city");
    assert!(
        arguments.as_object().is_some_and(|object| object.len() == 1),
        "{call}"
    );
    assert!(city.chars().count() <= 30 && result.contains(city), "{call}");
    assert!(said.lines().count() > 1, "{said}");
}

#[test]
fn answers_that_are_computed_together_are_those_of_questions_alone() {
    let questions = [
        QUESTION,
        "Name a river.",
        "What is ice?",
        "Hello",
        "Name a colour.",
    ];
    let (together, told) = run(example("batching").arg(model()).args(questions));
    assert_eq!(told, "");
    let alone: Vec<String> = questions
        .iter()
        .map(|question| ask(question).replace('\n', " "))
        .collect();
    assert_eq!(together.lines().collect::<Vec<_>>(), alone);
}

#[test]
fn a_pinned_beginning_is_computed_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let (said, _) = run(example("caching").arg(model()).arg(folder.path()));
    let lines: Vec<_> = said.lines().collect();
    for line in &lines[..2] {
        let [cached, prompt] = numbers(line)[..] else {
            panic!("{said}")
        };
        assert!(cached > prompt / 2 && cached < prompt, "{said}");
    }
    let [hits, lookups, bytes] = numbers(lines[2])[..] else {
        panic!("{said}")
    };
    assert!(hits == 2 && lookups >= 2 && bytes > 0, "{said}");
}

#[test]
fn no_model_is_recommended_that_does_not_fit() {
    let (said, _) = run(example("choosing").arg("16"));
    let registry = ModelRegistry::builtin();
    for kind in ["found", "recommended"] {
        let ids: Vec<_> = said
            .lines()
            .filter_map(|line| line.strip_prefix(kind)?.split_whitespace().next())
            .collect();
        assert!(ids.len() > 3, "{said}");
        for id in ids {
            let entry = registry.entry(id).expect("a model of the registry");
            assert!(entry.model.size_bytes < 16 << 30, "{id}");
            assert!(kind != "found" || id.to_lowercase().contains("qwen"), "{id}");
        }
    }
}

#[test]
fn every_request_is_counted() {
    let (said, _) = run(example("monitoring").arg(model()));
    let mut lines = said.lines();
    assert_eq!(lines.next(), Some("without a model: Unhealthy"));
    let health = if cfg!(feature = "mlx") {
        "Healthy []"
    } else {
        "Degraded ["
    };
    let with = lines.next().expect("a second line");
    assert!(with.starts_with(&format!("with it: {health}")), "{with}");
    assert_eq!(lines.next(), Some("2 submitted, 1 finished, 1 cancelled"));
    let generated = numbers(lines.next().expect("a fourth line"));
    assert!(generated[0] >= generated[1] && generated[1] > 0, "{said}");
    assert!(said.contains("# TYPE mlx_engine_health gauge"), "{said}");
}

#[test]
fn another_try_succeeds() {
    let (said, _) = run(example("recovery").arg(model()));
    let lines: Vec<_> = said.lines().collect();
    let backend = if cfg!(feature = "mlx") { "mlx" } else { "mock" };
    assert!(
        lines[0].contains("is not loaded; retryable: false; hint: Some("),
        "{said}"
    );
    assert_eq!(lines[1], format!("answered by {backend}"));
    assert_eq!(lines[2..], ["recovered: true, steps: 0", "Here again. (mock)"]);
}

/// A service that ends with the test, however that ends.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn http(address: &str, method: &str, path: &str, body: &str) -> String {
    let mut client = TcpStream::connect(address).expect("the service listens");
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
    );
    client.write_all((head + body).as_bytes()).expect("it reads");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("it answers");
    answer
}

#[test]
fn a_service_answers_over_http() {
    let mut command = example("service");
    command.arg(model()).arg("127.0.0.1:0").stdout(Stdio::piped());
    let mut service = Service(command.spawn().expect("the example starts"));
    let mut lines = BufReader::new(service.0.stdout.take().expect("its stdout")).lines();
    let line = lines.next().expect("a line").expect("UTF-8");
    let address = line.strip_prefix("listening on ").expect("an address").to_owned();

    let answer = ask(QUESTION);
    let whole = http(&address, "POST", "/generate", QUESTION);
    let (head, body) = whole.split_once("\r\n\r\n").expect("a body");
    assert!(head.starts_with("HTTP/1.1 200"), "{whole}");
    let output: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(output["text"], answer.as_str());

    let streamed = http(&address, "POST", "/stream", QUESTION);
    let events = streamed
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str::<serde_json::Value>(data).expect("JSON"));
    let pieces: String = events
        .filter_map(|event| Some(event["text"].as_str()?.to_owned()))
        .collect();
    assert_eq!(pieces, answer);

    let refused = http(&address, "POST", "/generate", "");
    assert!(refused.starts_with("HTTP/1.1 400"), "{refused}");
    assert!(http(&address, "GET", "/ready", "").starts_with("HTTP/1.1 200"));
    assert!(http(&address, "GET", "/metrics", "").contains("mlx_engine_ready 1"));
}

#[test]
fn an_interface_stops_an_answer_and_gets_the_next() {
    let (said, _) = run(example("desktop").arg(model()));
    let stopped = said.split_once(" [stopped]\n");
    // The mock may have said all before somebody presses the button.
    let over = || said.split_once(" [done]\n").filter(|_| !cfg!(feature = "mlx"));
    let (first, rest) = stopped.or_else(over).expect("an answer that was stopped");
    assert!(!first.is_empty());
    let second = rest.strip_suffix(" [done]\n").expect("an answer that was not");
    assert!(!second.is_empty());
}

#[test]
fn a_filter_answers_line_by_line_and_has_exit_codes() {
    let mut command = example("command_line");
    command.arg(model());
    let mut filter = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the example starts");
    let mut stdin = filter.stdin.take().expect("its stdin");
    writeln!(stdin, "{QUESTION}\nHello").expect("it reads");
    drop(stdin);
    let output = filter.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(0));
    let expected = format!("{}\n{}\n", ask(QUESTION), ask("Hello"));
    assert_eq!(text(output.stdout), expected);

    // The mock stands in where a build has no MLX, whatever the name.
    if cfg!(feature = "mlx") {
        let failed = example("command_line")
            .arg("no/such/model")
            .output()
            .expect("it starts");
        assert_eq!(
            (failed.status.code(), text(failed.stdout)),
            (Some(1), String::new())
        );
        let said = text(failed.stderr);
        assert!(
            said.starts_with("error: model `no/such/model` not found"),
            "{said}"
        );
    }
}

#[test]
fn the_mock_says_that_it_is_one() {
    let (said, _) = run(&mut example("mock"));
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(
        lines[..2],
        ["chosen: Paris (mock, None)", "fallen back: mock is Degraded"]
    );
    assert!(lines[2].len() > "because: ".len(), "{said}");
    assert!(lines[3].len() > "refused: ".len(), "{said}");
}

#[test]
fn what_was_measured_can_be_read_again() {
    let (json, told) = run(example("optimize").arg(model()).arg("2"));
    let config: EngineConfig = serde_json::from_str(&json).expect("a configuration");
    config.validate().expect("a valid one");
    assert!(
        told.lines().last().is_some_and(|line| line.ends_with(" s")),
        "{told}"
    );
}
