//! `mlx-engine chat`.

use std::io::IsTerminal;

use futures::StreamExt;
use mlx_engine::{ChatSession, ChatStream, EngineError, GenerationEvent, ToolCall};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::args::Chat;
use crate::failure::Failure;
use crate::generate::report;
use crate::output::{errln, outln, write};
use crate::{load, stats, tools};

const HELP: &str = "\
/help     this list
/history  what was said
/stats    what was counted, and how the engine is
/clear    forget the conversation, but for the system prompt
/quit     leave (so does Ctrl-D)
Ctrl-C stops an answer or drops a line; twice on a line it leaves.";

pub(crate) async fn run(args: Chat) -> Result<(), Failure> {
    let tools = tools::read(&args.tools)?;
    let params = tools::params(&args.tools, args.sampling.params());
    params.validate().map_err(mlx_engine::EngineError::from)?;
    let engine = load::load(&args.model).await?;
    let mut session = engine.chat().with_params(params).with_tools(tools);
    if let Some(system) = args.system {
        session = session.with_system(system);
    }
    let mut lines = Lines::new();
    if lines.is_interactive() {
        errln!("Type a message, or /help.");
    }
    let mut failed = false;
    while let Some(line) = lines.next().await? {
        match line.trim() {
            "" => {}
            "/help" => errln!("{HELP}"),
            "/quit" | "/exit" => break,
            "/stats" => stats::report(&engine),
            "/clear" => session.clear(),
            "/history" => {
                for message in session.history() {
                    outln!("{}: {}", message.role, message.content);
                    for call in &message.tool_calls {
                        outln!("  calls {} {}", call.name, call.arguments);
                    }
                }
            }
            command if command.starts_with('/') => errln!("`{command}` is no command; /help lists them"),
            text => failed |= !turn(&mut session, text, &mut lines).await?,
        }
    }
    if lines.is_interactive() || args.verbose {
        stats::report(&engine);
    }
    drop(session);
    load::finish(&engine).await?;
    // At a terminal the user has seen it; a script has only the exit code.
    if failed && !lines.is_interactive() {
        return Err(Failure::Told);
    }
    Ok(())
}

/// Says something, and gives the results of the tools that the model calls until it calls none. An error is told and the
/// conversation goes on. Returns whether there was none.
async fn turn(session: &mut ChatSession, text: &str, lines: &mut Lines) -> Result<bool, Failure> {
    let mut well = match session.stream(text).await {
        Ok(stream) => answer(stream, lines.is_interactive()).await?,
        Err(error) => told(error),
    };
    while well && !session.pending_calls().is_empty() {
        let Some(results) = results(session.pending_calls(), lines).await? else {
            return Ok(well);
        };
        well = match session.stream_results(results).await {
            Ok(stream) => answer(stream, lines.is_interactive()).await?,
            Err(error) => told(error),
        };
    }
    Ok(well)
}

/// Tells an error.
fn told(error: EngineError) -> bool {
    Failure::from(error).report();
    false
}

/// Asks for the result of each call, a line of JSON. `None` where the input ends.
async fn results(calls: &[ToolCall], lines: &mut Lines) -> Result<Option<Vec<(String, String)>>, Failure> {
    let mut results = Vec::new();
    for call in calls {
        loop {
            errln!("[result of {} as a line of JSON]", call.name);
            let Some(line) = lines.next().await? else {
                return Ok(None);
            };
            match serde_json::from_str::<serde_json::Value>(&line) {
                Ok(_) => {
                    results.push((call.id.clone(), line));
                    break;
                }
                Err(error) if lines.is_interactive() => errln!("that is no JSON: {error}"),
                Err(error) => {
                    let name = &call.name;
                    return Err(Failure::other(format!(
                        "the result of `{name}` is no JSON: {error}"
                    )));
                }
            }
        }
    }
    Ok(Some(results))
}

/// Streams one answer. Ctrl-C stops it, and the program where nobody types; an error is told. Returns whether there was
/// none.
async fn answer(mut stream: ChatStream<'_>, interactive: bool) -> Result<bool, Failure> {
    let mut well = true;
    loop {
        let event = tokio::select! {
            event = stream.next() => event,
            _ = tokio::signal::ctrl_c() => {
                if !interactive {
                    return Err(Failure::Interrupted);
                }
                errln!("\n[stopped]");
                return Ok(true);
            }
        };
        match event {
            Some(Ok(GenerationEvent::Text { text, .. })) => write(format_args!("{text}"))?,
            Some(Ok(GenerationEvent::Finished(summary))) => {
                outln!("");
                report(&summary);
            }
            Some(Ok(event)) => tools::show(&event)?,
            Some(Err(error)) => {
                outln!("");
                Failure::from(error).report();
                well = false;
            }
            None => return Ok(well),
        }
    }
}

/// Where messages come from: an editor with history on a terminal, lines elsewhere.
enum Lines {
    /// What was typed so far. The editor takes Ctrl-C for itself as long as it lives, so each line has one of its own.
    Terminal(Vec<String>),
    Pipe,
}

impl Lines {
    fn new() -> Self {
        if std::io::stdin().is_terminal() {
            Self::Terminal(Vec::new())
        } else {
            Self::Pipe
        }
    }

    fn is_interactive(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next line, or `None` at the end.
    async fn next(&mut self) -> Result<Option<String>, Failure> {
        match self {
            Self::Pipe => tokio::select! {
                line = tokio::task::spawn_blocking(|| std::io::stdin().lines().next().transpose()) => line
                    .unwrap_or_else(|error| Err(error.into()))
                    .map_err(|error| Failure::other(format!("stdin could not be read: {error}"))),
                _ = tokio::signal::ctrl_c() => Err(Failure::Interrupted),
            },
            Self::Terminal(typed) => {
                let mut line = edit(typed);
                if let Err(ReadlineError::Interrupted) = line {
                    errln!("[Ctrl-C again leaves]");
                    line = edit(typed);
                }
                match line {
                    Ok(line) => {
                        typed.push(line.clone());
                        Ok(Some(line))
                    }
                    Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(None),
                    Err(error) => Err(Failure::other(format!("the terminal could not be read: {error}"))),
                }
            }
        }
    }
}

/// Lets the user type a line, with the earlier ones at hand.
fn edit(typed: &[String]) -> Result<String, ReadlineError> {
    let mut editor = DefaultEditor::new()?;
    for line in typed {
        editor.add_history_entry(line)?;
    }
    editor.readline("> ")
}
