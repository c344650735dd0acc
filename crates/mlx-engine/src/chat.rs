//! Conversations.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::Stream;
use mlx_engine_core::{
    ChatMessage, EngineError, EventStream, GenerateOutput, GenerateParams, GenerationEvent, LlmEngine,
    Prompt, collect_events,
};

/// A conversation that remembers what was said.
///
/// The engine keeps the keys and values of the conversation, so that a turn computes what is new alone;
/// `usage.cached_tokens` of an answer says how much was taken over. The history is plain data: [`history`](Self::history)
/// gives it, and [`with_history`](Self::with_history) goes on with it later, in another process if need be.
pub struct ChatSession {
    engine: Arc<dyn LlmEngine>,
    messages: Vec<ChatMessage>,
    params: GenerateParams,
}

impl fmt::Debug for ChatSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatSession")
            .field("messages", &self.messages)
            .field("params", &self.params)
            .finish_non_exhaustive()
    }
}

impl ChatSession {
    /// A conversation without messages, on any engine.
    pub fn new(engine: Arc<dyn LlmEngine>) -> Self {
        Self {
            engine,
            messages: Vec::new(),
            params: GenerateParams::default(),
        }
    }

    /// Begins with a system prompt, in place of the one that there may be.
    pub fn with_system(mut self, text: impl Into<String>) -> Self {
        self.messages
            .retain(|message| message.role != mlx_engine_core::Role::System);
        self.messages.insert(0, ChatMessage::system(text));
        self
    }

    /// Sets how answers are generated.
    pub fn with_params(mut self, params: GenerateParams) -> Self {
        self.params = params;
        self
    }

    /// Goes on with a conversation that was had before.
    pub fn with_history(mut self, messages: impl IntoIterator<Item = ChatMessage>) -> Self {
        self.messages = messages.into_iter().collect();
        self
    }

    /// What was said, the system prompt included.
    pub fn history(&self) -> &[ChatMessage] {
        &self.messages
    }

    /// Forgets all but the system prompt.
    pub fn clear(&mut self) {
        self.messages
            .retain(|message| message.role == mlx_engine_core::Role::System);
    }

    /// Says something and waits for the answer. After an error the history is as before.
    ///
    /// # Errors
    ///
    /// Those of the engine.
    pub async fn send(&mut self, text: impl Into<String>) -> Result<GenerateOutput, EngineError> {
        let stream = self.stream(text).await?;
        collect_events(stream).await
    }

    /// Says something and gives the answer piece by piece. What was received of an answer that is dropped stays in the
    /// history; where nothing was, the question is taken back.
    ///
    /// # Errors
    ///
    /// Those of the engine.
    pub async fn stream(&mut self, text: impl Into<String>) -> Result<ChatStream<'_>, EngineError> {
        let question = ChatMessage::user(text);
        let messages = self.messages.iter().cloned().chain([question.clone()]);
        let events = self
            .engine
            .stream(Prompt::chat(messages), self.params.clone())
            .await?;
        self.messages.push(question);
        Ok(ChatStream {
            messages: &mut self.messages,
            events,
            answer: String::new(),
            failed: false,
        })
    }
}

/// The events of one answer. What it gave is added to the history when it is dropped.
pub struct ChatStream<'a> {
    messages: &'a mut Vec<ChatMessage>,
    events: EventStream,
    answer: String,
    failed: bool,
}

impl fmt::Debug for ChatStream<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatStream")
            .field("answer", &self.answer)
            .finish_non_exhaustive()
    }
}

impl Stream for ChatStream<'_> {
    type Item = Result<GenerationEvent, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let event = std::task::ready!(self.events.as_mut().poll_next(context));
        match &event {
            Some(Ok(GenerationEvent::Text { text, .. })) => self.answer.push_str(text),
            Some(Err(_)) => self.failed = true,
            _ => {}
        }
        Poll::Ready(event)
    }
}

impl Drop for ChatStream<'_> {
    fn drop(&mut self) {
        if self.failed || self.answer.is_empty() {
            self.messages.pop();
        } else {
            self.messages
                .push(ChatMessage::assistant(std::mem::take(&mut self.answer)));
        }
    }
}
