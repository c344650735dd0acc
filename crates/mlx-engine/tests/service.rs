//! What the service of the examples says of errors over HTTP. The service itself is run by the tests of the examples.

#[expect(dead_code, reason = "the program around it is not run here")]
#[path = "../examples/service.rs"]
mod service;

use std::time::Duration;

use axum::http::header::RETRY_AFTER;
use axum::response::IntoResponse;
use mlx_engine::EngineError;
use service::Refused;

#[test]
fn an_error_is_told_by_its_status_and_says_when_to_come_again() {
    let check = |error: EngineError, status: u16, after: Option<&str>| {
        let told = error.to_string();
        let response = Refused(error).into_response();
        let wait = response.headers().get(RETRY_AFTER);
        let wait = wait.map(|wait| wait.to_str().expect("a number"));
        assert_eq!((response.status().as_u16(), wait), (status, after), "{told}");
    };
    let name = || "x".to_owned();
    // What the caller has to change.
    check(EngineError::EmptyPrompt, 400, None);
    let long = EngineError::PromptTooLong {
        prompt_tokens: 9,
        context_length: 8,
    };
    check(long, 400, None);
    check(EngineError::unsupported("no such thing"), 400, None);
    // What may succeed later.
    let full = |retry_after| EngineError::QueueFull { retry_after };
    check(full(Duration::from_secs(7)), 503, Some("7"));
    check(full(Duration::from_millis(20)), 503, Some("1"));
    let unavailable = EngineError::Unavailable {
        reason: name(),
        retry_after: Duration::ZERO,
    };
    check(unavailable, 503, Some("1"));
    check(EngineError::NotLoaded { model: name() }, 503, None);
    check(EngineError::OutOfMemory, 503, None);
    check(EngineError::WorkerLost { message: name() }, 503, None);
    // What is nobody's fault out there.
    let limit = Duration::from_mins(1);
    check(EngineError::DeadlineExceeded { limit }, 504, None);
    check(EngineError::internal("x"), 500, None);
}
