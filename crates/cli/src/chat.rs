//! `mlx-engine chat`.

use std::io::IsTerminal;

use futures::StreamExt;
use mlx_engine::{ChatSession, GenerationEvent};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::args::Chat;
use crate::failure::Failure;
use crate::generate::report;
use crate::output::{errln, outln, write};
use crate::{load, stats};

const HELP: &str = "\
/help     this list
/history  what was said
/stats    what was counted, and how the engine is
/clear    forget the conversation, but for the system prompt
/quit     leave (so does Ctrl-D)
Ctrl-C stops an answer or drops a line; twice on a line it leaves.";

pub(crate) async fn run(args: Chat) -> Result<(), Failure> {
    let params = args.sampling.params();
    params.validate().map_err(mlx_engine::EngineError::from)?;
    let engine = load::load(&args.model).await?;
    let mut session = engine.chat().with_params(params);
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
                }
            }
            command if command.starts_with('/') => errln!("`{command}` is no command; /help lists them"),
            text => failed |= !answer(&mut session, text, lines.is_interactive()).await?,
        }
    }
    // At a terminal the user has seen it; a script has only the exit code.
    if failed && !lines.is_interactive() {
        return Err(Failure::Told);
    }
    Ok(())
}

/// Streams one answer. Ctrl-C stops it, and the program where nobody types; an error is told and the conversation goes on.
/// Returns whether there was none.
async fn answer(session: &mut ChatSession, text: &str, interactive: bool) -> Result<bool, Failure> {
    let mut well = true;
    let mut stream = match session.stream(text).await {
        Ok(stream) => stream,
        Err(error) => {
            Failure::from(error).report();
            return Ok(false);
        }
    };
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
            Some(Ok(_)) => {}
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
