//! The command at a terminal, which Python makes.
#![cfg(unix)]

use std::process::Command;

/// Runs the command at a terminal, and types each text when what is beside it has been said. Returns the exit code, and what
/// was said without the codes that move the cursor.
fn at_terminal(args: &[&str], steps: &[(&str, &str)]) -> (i32, String) {
    let output = Command::new("python3")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/terminal.py"))
        .arg(serde_json::to_string(steps).expect("it is JSON"))
        .arg(env!("CARGO_BIN_EXE_mlx-engine"))
        .args(args)
        .env("TERM", "xterm")
        .output()
        .expect("python3 runs");
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code().expect("an exit code"), said)
}

const CHAT: [&str; 5] = ["chat", "--model", "tiny", "--backend", "mock"];

#[test]
fn a_conversation_has_commands_and_goes_on_until_it_is_left() {
    let (code, said) = at_terminal(
        &[&CHAT[..], &["--system", "Be brief."]].concat(),
        &[
            ("> ", "hello\r"),
            ("user: hello", ""),
            ("tok/s", ""),
            ("> ", "/help\r"),
            ("forget the conversation", ""),
            ("> ", "/nonsense\r"),
            ("`/nonsense` is no command", ""),
            ("> ", "   \r"),
            ("> ", "/history\r"),
            ("system: Be brief.", ""),
            ("user: hello", ""),
            ("assistant: ", ""),
            ("> ", "/clear\r"),
            ("> ", "/stats\r"),
            ("requests    1 ", ""),
            ("health      ", ""),
            ("> ", "/quit\r"),
            // What was counted is told at the end too.
            ("requests    1 ", ""),
        ],
    );
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("Type a message, or /help."), "{said}");
}

#[test]
fn ctrl_c_drops_a_line_and_leaves_where_it_comes_twice() {
    let (code, said) = at_terminal(
        &CHAT,
        &[
            ("> ", "never sent\u{3}"),
            ("[Ctrl-C again leaves]", ""),
            ("> ", "sent\r"),
            ("user: sent", ""),
            ("tok/s", ""),
            // The line before is at hand.
            ("> ", "\u{1b}[A again\r"),
            ("user: sent again", ""),
            ("tok/s", ""),
            ("> ", "\u{3}"),
            ("[Ctrl-C again leaves]", ""),
            ("> ", "\u{3}"),
            ("requests    2 ", ""),
        ],
    );
    assert_eq!(code, 0, "{said}");
}

#[test]
fn a_message_that_fails_is_told_and_the_conversation_goes_on() {
    // The mock's template knows no tools.
    let folder = tempfile::tempdir().expect("a folder");
    let tools = folder.path().join("tools.json");
    let tool = r#"[{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]"#;
    std::fs::write(&tools, tool).expect("it can be written");
    let (code, said) = at_terminal(
        &[&CHAT[..], &["--tools", tools.to_str().expect("UTF-8")]].concat(),
        &[
            ("> ", "hello\r"),
            ("error: ", ""),
            ("> ", "once more\r"),
            ("error: ", ""),
            ("> ", "/quit\r"),
            ("health", ""),
        ],
    );
    assert_eq!(code, 0, "who types has seen it: {said}");
}

#[test]
fn the_end_of_what_is_typed_ends_the_conversation() {
    let (code, said) = at_terminal(&CHAT, &[("> ", "\u{4}"), ("requests    0 ", "")]);
    assert_eq!(code, 0, "{said}");
}

#[test]
fn nobody_is_waited_for_where_a_prompt_has_to_be_typed() {
    let (code, said) = at_terminal(&["generate", "--model", "tiny", "--backend", "mock"], &[]);
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("a prompt is needed: --prompt, --prompt-file or -"),
        "{said}"
    );
}

#[cfg(feature = "mlx")]
#[test]
fn ctrl_c_stops_an_answer_and_the_next_one_is_whole() {
    let model = std::env::var("MLX_ENGINE_TEST_MODEL");
    let model =
        model.expect("MLX_ENGINE_TEST_MODEL names the test model; run the tests by `cargo xtask test`");
    let chat = [
        "chat",
        "--model",
        &model,
        "--max-tokens",
        "4000",
        "--temperature",
        "0",
    ];
    let (code, said) = at_terminal(
        &chat,
        &[
            ("> ", "Write a long story about the sea.\r"),
            // The editor has left the terminal, and what comes is the answer.
            ("[?2004l", ""),
            (" the ", "\u{3}"),
            ("[stopped]", ""),
            ("> ", "/clear\r"),
            ("> ", "What is the capital of France?\r"),
            ("Paris", ""),
            ("tok/s", ""),
            ("> ", "/quit\r"),
            ("requests    2 (1 cancelled", ""),
        ],
    );
    assert_eq!(code, 0, "{said}");
}
