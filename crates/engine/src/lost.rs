//! The events of a request, which end also where the worker hangs and is given up.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::Stream;
use futures::future::BoxFuture;
use mlx_engine_core::{EngineError, GenerationEvent};
use tokio::sync::{mpsc, watch};

type Item = Result<GenerationEvent, EngineError>;

/// What those hear who wait for a worker that was given up.
pub(crate) fn hung() -> EngineError {
    EngineError::WorkerLost {
        message: "it hung and was given up".to_owned(),
    }
}

/// The events of a request.
pub(crate) struct Events {
    /// `None` once the worker was given up.
    events: Option<mpsc::UnboundedReceiver<Item>>,
    lost: BoxFuture<'static, ()>,
}

impl Events {
    /// `lost` becomes true when the worker is given up.
    pub(crate) fn new(events: mpsc::UnboundedReceiver<Item>, mut lost: watch::Receiver<bool>) -> Self {
        Self {
            events: Some(events),
            lost: Box::pin(async move {
                if lost.wait_for(|lost| *lost).await.is_err() {
                    // The engine has gone, and its worker before it: the events say the rest.
                    std::future::pending::<()>().await;
                }
            }),
        }
    }
}

impl Stream for Events {
    type Item = Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Item>> {
        let Some(events) = &mut self.events else {
            return Poll::Ready(None);
        };
        if let Poll::Ready(event) = events.poll_recv(cx) {
            return Poll::Ready(event);
        }
        if self.lost.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        self.events = None;
        Poll::Ready(Some(Err(hung())))
    }
}
