//! The requests that the engine's process has, or will have once there is one.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mlx_engine_core::{EngineError, GenerateParams, GenerationEvent, Prompt};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use super::frame::{FrameError, ToChild, encode};

/// An item of a stream.
pub(super) type Item = Result<GenerationEvent, EngineError>;

/// Processes that a request that had not started is sent to. One that is the death of two is not sent to a third.
const MOST_SENT: u32 = 2;

#[derive(Debug)]
pub(super) enum Request {
    Generate {
        prompt: Prompt,
        params: Box<GenerateParams>,
        /// Who waits to hear that the engine took it.
        admitted: Option<oneshot::Sender<Result<(), EngineError>>>,
        events: mpsc::UnboundedSender<Item>,
        started: bool,
        /// When it was submitted: its time runs while there is no process.
        since: Instant,
    },
    Call {
        method: String,
        argument: Value,
        answer: oneshot::Sender<Result<Value, EngineError>>,
    },
}

impl Request {
    fn fail(self, error: EngineError) {
        // Whoever asked may be gone.
        match self {
            Self::Generate {
                admitted: Some(admitted),
                ..
            } => _ = admitted.send(Err(error)),
            Self::Generate { events, .. } => _ = events.send(Err(error)),
            Self::Call { answer, .. } => _ = answer.send(Err(error)),
        }
    }
}

#[derive(Debug)]
struct Entry {
    request: Request,
    /// Whether the process that runs has it.
    sent: bool,
    /// Processes that had it.
    times: u32,
}

/// Requests by their number, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Requests {
    next: u64,
    entries: BTreeMap<u64, Entry>,
}

impl Requests {
    pub(super) fn add(&mut self, request: Request) -> u64 {
        let id = self.next;
        self.next += 1;
        let entry = Entry {
            request,
            sent: false,
            times: 0,
        };
        self.entries.insert(id, entry);
        id
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Requests that no process has.
    pub(super) fn waiting(&self) -> usize {
        self.entries.values().filter(|entry| !entry.sent).count()
    }

    /// The frames of what no process has, which count as sent.
    pub(super) fn send(&mut self, now: Instant) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut refused = Vec::new();
        for (&id, entry) in self.entries.iter_mut().filter(|(_, entry)| !entry.sent) {
            let frame = match &entry.request {
                Request::Generate {
                    prompt,
                    params,
                    since,
                    ..
                } => match left(params, now.saturating_duration_since(*since)) {
                    Ok(params) => ToChild::Generate {
                        id,
                        prompt: prompt.clone(),
                        params: Box::new(params),
                    },
                    Err(late) => {
                        refused.push((id, late));
                        continue;
                    }
                },
                Request::Call { method, argument, .. } => ToChild::Call {
                    id,
                    method: method.clone(),
                    argument: argument.clone(),
                },
            };
            match encode(&frame, &mut bytes) {
                Ok(()) => {
                    entry.sent = true;
                    entry.times += 1;
                }
                Err(error) => refused.push((id, too_much(&error))),
            }
        }
        for (id, error) in refused {
            self.error(id, error);
        }
        bytes
    }

    pub(super) fn admitted(&mut self, id: u64) {
        let entry = self.entries.get_mut(&id).map(|entry| &mut entry.request);
        if let Some(Request::Generate { admitted, .. }) = entry
            && let Some(admitted) = admitted.take()
        {
            let _ = admitted.send(Ok(()));
        }
    }

    pub(super) fn event(&mut self, id: u64, event: GenerationEvent) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        let Request::Generate { events, started, .. } = &mut entry.request else {
            return;
        };
        *started = true;
        let last = matches!(event, GenerationEvent::Finished(_));
        // A caller who is gone cancels.
        let _ = events.send(Ok(event));
        if last {
            self.entries.remove(&id);
        }
    }

    pub(super) fn error(&mut self, id: u64, error: EngineError) {
        if let Some(entry) = self.entries.remove(&id) {
            entry.request.fail(error);
        }
    }

    pub(super) fn answer(&mut self, id: u64, value: Value) {
        match self.entries.remove(&id).map(|entry| entry.request) {
            Some(Request::Call { answer, .. }) => _ = answer.send(Ok(value)),
            Some(request) => request.fail(EngineError::internal("a request was answered as a call")),
            None => {}
        }
    }

    /// Takes a request out that nobody waits for; whether a process has it.
    pub(super) fn cancel(&mut self, id: u64) -> bool {
        self.entries.remove(&id).is_some_and(|entry| entry.sent)
    }

    /// The process has ended. What had not started waits for the next one; the rest gets the error.
    pub(super) fn lost(&mut self, error: &EngineError) {
        let over = |entry: &Entry| {
            let begun = matches!(entry.request, Request::Generate { started: true, .. });
            entry.sent && (begun || entry.times >= MOST_SENT)
        };
        for (_, entry) in self.entries.extract_if(.., |_, entry| over(entry)) {
            entry.request.fail(error.clone());
        }
        for entry in self.entries.values_mut() {
            entry.sent = false;
        }
    }

    /// No process will come.
    pub(super) fn fail_all(&mut self, error: &EngineError) {
        for entry in std::mem::take(&mut self.entries).into_values() {
            entry.request.fail(error.clone());
        }
    }
}

/// What a process is asked for a while after the caller asked: what is left of the caller's time.
fn left(params: &GenerateParams, waited: Duration) -> Result<GenerateParams, EngineError> {
    let mut params = params.clone();
    for limit in [&mut params.timeout_s, &mut params.queue_timeout_s] {
        let Some(seconds) = limit.as_mut() else {
            continue;
        };
        // What was validated is a duration.
        let given = Duration::try_from_secs_f64(*seconds).unwrap_or(Duration::MAX);
        let left = given.saturating_sub(waited);
        if left.is_zero() {
            return Err(EngineError::DeadlineExceeded { limit: given });
        }
        if !waited.is_zero() {
            *seconds = left.as_secs_f64();
        }
    }
    Ok(params)
}

fn too_much(error: &FrameError) -> EngineError {
    EngineError::internal(format!("the request cannot be handed over: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started() -> GenerationEvent {
        GenerationEvent::Started {
            prompt_tokens: 1,
            cached_tokens: 0,
        }
    }

    struct Caller {
        admitted: oneshot::Receiver<Result<(), EngineError>>,
        events: mpsc::UnboundedReceiver<Item>,
    }

    fn generate(requests: &mut Requests) -> (u64, Caller) {
        let (admitted, waits) = oneshot::channel();
        let (events, receiver) = mpsc::unbounded_channel();
        let id = requests.add(Request::Generate {
            prompt: Prompt::text("x"),
            params: Box::default(),
            admitted: Some(admitted),
            events,
            started: false,
            since: Instant::now(),
        });
        let caller = Caller {
            admitted: waits,
            events: receiver,
        };
        (id, caller)
    }

    #[test]
    fn the_time_of_a_request_runs_while_there_is_no_process() {
        let second = Duration::from_secs(1);
        let params = GenerateParams::default().with_timeout_s(5.0);
        let asked = left(&params, second * 2).unwrap();
        assert_eq!((asked.timeout_s, asked.queue_timeout_s), (Some(3.0), None));
        assert_eq!(left(&params, Duration::ZERO).unwrap(), params);
        let params = params.with_queue_timeout_s(1.0);
        assert!(matches!(
            left(&params, second * 2),
            Err(EngineError::DeadlineExceeded { limit }) if limit == second
        ));

        let mut requests = Requests::default();
        let (admitted, mut waits) = oneshot::channel();
        let (events, _receiver) = mpsc::unbounded_channel();
        let since = Instant::now();
        requests.add(Request::Generate {
            prompt: Prompt::text("x"),
            params: Box::new(params),
            admitted: Some(admitted),
            events,
            started: false,
            since,
        });
        assert!(requests.send(since + second).is_empty() && requests.is_empty());
        assert!(matches!(
            waits.try_recv(),
            Ok(Err(EngineError::DeadlineExceeded { .. }))
        ));
    }

    fn lost() -> EngineError {
        EngineError::WorkerLost {
            message: "signal 9".to_owned(),
        }
    }

    #[test]
    fn what_had_not_started_goes_to_the_next_process_and_no_third() {
        let mut requests = Requests::default();
        let (running, mut one) = generate(&mut requests);
        let (waits, mut two) = generate(&mut requests);
        assert!(!requests.send(Instant::now()).is_empty());
        requests.admitted(running);
        requests.event(running, started());
        requests.lost(&lost());
        assert_eq!(one.admitted.try_recv().unwrap().ok(), Some(()));
        assert!(matches!(one.events.try_recv(), Ok(Ok(_))));
        assert!(matches!(
            one.events.try_recv(),
            Ok(Err(EngineError::WorkerLost { .. }))
        ));
        assert!(two.admitted.try_recv().is_err() && requests.waiting() == 1);

        assert!(!requests.send(Instant::now()).is_empty());
        assert!(requests.send(Instant::now()).is_empty(), "once each");
        requests.lost(&lost());
        assert!(matches!(
            two.admitted.try_recv(),
            Ok(Err(EngineError::WorkerLost { .. }))
        ));
        assert!(requests.is_empty() && !requests.cancel(waits));
    }

    #[test]
    fn a_request_that_was_admitted_and_not_started_is_admitted_once() {
        let mut requests = Requests::default();
        let (id, mut caller) = generate(&mut requests);
        requests.send(Instant::now());
        requests.admitted(id);
        requests.lost(&lost());
        requests.send(Instant::now());
        requests.admitted(id);
        requests.event(id, started());
        requests.error(id, EngineError::OutOfMemory);
        assert_eq!(caller.admitted.try_recv().unwrap().ok(), Some(()));
        assert!(matches!(
            caller.events.try_recv(),
            Ok(Ok(GenerationEvent::Started { .. }))
        ));
        assert!(matches!(
            caller.events.try_recv(),
            Ok(Err(EngineError::OutOfMemory))
        ));
        assert!(caller.events.try_recv().is_err() && requests.is_empty());
    }

    #[test]
    fn a_call_that_was_answered_by_nobody_is_asked_again() {
        let mut requests = Requests::default();
        let (answer, mut waits) = oneshot::channel();
        let id = requests.add(Request::Call {
            method: "score".to_owned(),
            argument: Value::Null,
            answer,
        });
        requests.send(Instant::now());
        requests.lost(&lost());
        assert!(waits.try_recv().is_err());
        requests.send(Instant::now());
        requests.answer(id, Value::from(1));
        assert_eq!(waits.try_recv().unwrap().unwrap(), 1);
        requests.answer(id, Value::Null);
        requests.event(7, started());
        requests.fail_all(&EngineError::Cancelled);
    }
}
