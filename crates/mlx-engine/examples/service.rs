//! An engine inside an axum service: `cargo run --example service -- MODEL 127.0.0.1:8080`.

use std::convert::Infallible;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::{Stream, StreamExt};
use mlx_engine::prelude::*;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model), Some(address)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: service MODEL ADDRESS");
        std::process::exit(2);
    };
    let engine = InferenceEngine::new();
    engine.load_model(&model).await?;
    let listener = tokio::net::TcpListener::bind(&address).await?;
    println!("listening on {}", listener.local_addr()?);
    axum::serve(listener, service(engine)).await?;
    Ok(())
}

/// The engine is the state: it is cheap to clone, and clones share the model.
fn service(engine: InferenceEngine) -> Router {
    Router::new()
        .route("/generate", post(generate))
        .route("/stream", post(stream))
        .route("/ready", get(ready))
        .route(
            "/metrics",
            get(|State(engine): State<InferenceEngine>| async move { engine.prometheus() }),
        )
        .with_state(engine)
}

fn params() -> GenerateParams {
    GenerateParams::default()
        .with_temperature(0.0)
        .with_max_tokens(64)
        .with_timeout_s(60.0)
}

async fn generate(
    State(engine): State<InferenceEngine>,
    question: String,
) -> Result<Json<GenerateOutput>, Refused> {
    Ok(Json(engine.generate(question, params()).await.map_err(Refused)?))
}

/// A client that goes away drops the stream, which cancels the request.
async fn stream(
    State(engine): State<InferenceEngine>,
    question: String,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Refused> {
    let events = engine.stream(question, params()).await.map_err(Refused)?;
    Ok(Sse::new(events.map(|event| {
        let event = match event {
            Ok(event) => Event::default().json_data(event),
            Err(error) => Ok(Event::default().event("error").data(error.to_string())),
        };
        Ok(event.unwrap_or_else(|error| Event::default().event("error").data(error.to_string())))
    })))
}

async fn ready(State(engine): State<InferenceEngine>) -> (StatusCode, String) {
    let report = engine.health();
    let code = if report.is_ready() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (code, format!("{:?}", report.status))
}

/// An engine's error as an answer over HTTP: what may succeed later says when.
pub(crate) struct Refused(pub(crate) EngineError);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let text = self.0.to_string();
        match self.0.retry_after() {
            Some(wait) => {
                let seconds = wait.as_secs().max(1).to_string();
                (
                    StatusCode::SERVICE_UNAVAILABLE,
                    [(header::RETRY_AFTER, seconds)],
                    text,
                )
                    .into_response()
            }
            None => (status(&self.0), text).into_response(),
        }
    }
}

/// Whose fault it is: what has the service to do, and what its caller?
fn status(error: &EngineError) -> StatusCode {
    match error {
        EngineError::NotLoaded { .. } => StatusCode::SERVICE_UNAVAILABLE,
        EngineError::DeadlineExceeded { .. } => StatusCode::GATEWAY_TIMEOUT,
        EngineError::Internal { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        error if error.is_retryable() => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::BAD_REQUEST,
    }
}
