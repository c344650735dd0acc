//! An engine behind a user interface that knows no async: `cargo run --example desktop -- MODEL`.
//!
//! The thread of the interface sends questions and draws what comes; the engine has a thread of its own.

use std::sync::mpsc;
use std::thread;

use futures::StreamExt;
use mlx_engine::prelude::*;
use tokio::sync::{mpsc as commands, oneshot};

/// What the interface asks for.
struct Ask {
    question: String,
    /// Sending, or dropping the sender, stops the answer: a button, or a window that is closed.
    stop: oneshot::Receiver<()>,
}

/// What the interface is told.
enum Told {
    Ready,
    Text(String),
    Done { stopped: bool },
    Failed(String),
}

/// The life of the engine. It ends when the interface is gone.
async fn serve(
    model: &str,
    mut asked: commands::Receiver<Ask>,
    tell: &mpsc::Sender<Told>,
) -> Result<(), EngineError> {
    let engine = InferenceEngine::new();
    engine.load_model(model).await?;
    let params = GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(64);
    let mut chat = engine.chat().with_params(params);
    let _ = tell.send(Told::Ready);
    while let Some(mut ask) = asked.recv().await {
        let mut events = chat.stream(ask.question).await?;
        let stopped = loop {
            let event = tokio::select! {
                event = events.next() => event,
                // The stream is dropped below, which cancels the request before its next step.
                _ = &mut ask.stop => break true,
            };
            match event.transpose()? {
                Some(GenerationEvent::Text { text, .. }) => drop(tell.send(Told::Text(text))),
                Some(_) => {}
                None => break false,
            }
        };
        let _ = tell.send(Told::Done { stopped });
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some(model) = std::env::args().nth(1) else {
        eprintln!("usage: desktop MODEL");
        std::process::exit(2);
    };
    let (ask, asked) = commands::channel(1);
    let (tell, told) = mpsc::channel();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let worker = thread::spawn(move || {
        if let Err(error) = runtime.block_on(serve(&model, asked, &tell)) {
            let _ = tell.send(Told::Failed(error.to_string()));
        }
    });

    // The loop of the interface: a real one would draw, and look for messages once a frame.
    let mut stop = None;
    let mut questions = ["Tell me a long story.", "What is the capital of France?"].into_iter();
    for message in told {
        match message {
            Told::Ready | Told::Done { .. } => {
                if let Told::Done { stopped } = message {
                    println!("{}", if stopped { " [stopped]" } else { " [done]" });
                }
                let Some(question) = questions.next() else { break };
                let (sender, receiver) = oneshot::channel();
                stop = Some(sender);
                ask.blocking_send(Ask {
                    question: question.to_owned(),
                    stop: receiver,
                })?;
            }
            Told::Text(text) => {
                print!("{text}");
                // Somebody presses the button during the first answer.
                if questions.len() == 1 {
                    stop = None;
                }
            }
            Told::Failed(error) => return Err(error.into()),
        }
    }
    drop((ask, stop));
    worker.join().map_err(|_| "the engine's thread panicked")?;
    Ok(())
}
