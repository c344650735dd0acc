//! Conversations.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::Stream;
use mlx_engine_core::{
    ChatMessage, EngineError, EventStream, GenerateOutput, GenerateParams, GenerationEvent, LlmEngine,
    ParamError, PartialOutput, Prompt, Role, ToolCall, ToolChoice, ToolDefinition, collect_events,
};

/// A conversation that remembers what was said.
///
/// The engine keeps the keys and values of the conversation, so that a turn computes what is new alone;
/// `usage.cached_tokens` of an answer says how much was taken over. The history is plain data: [`history`](Self::history)
/// gives it, and [`with_history`](Self::with_history) goes on with it later, in another process if need be.
///
/// ```
/// use mlx_engine::{BackendChoice, InferenceEngine, MockScript};
///
/// # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
/// let script = MockScript::reply("Where the needle points.");
/// let engine = InferenceEngine::new().with_backend(BackendChoice::Mock).with_mock(script);
/// engine.load_model("tiny").await?;
///
/// let mut chat = engine.chat().with_system("Be brief.");
/// let answer = chat.send("Which way is north?").await?;
/// assert_eq!(answer.text, "Where the needle points.");
/// // The system prompt, the question and the answer.
/// assert_eq!(chat.history().len(), 3);
/// # Ok::<(), mlx_engine::EngineError>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ChatSession {
    engine: Arc<dyn LlmEngine>,
    messages: Vec<ChatMessage>,
    params: GenerateParams,
    tools: Vec<ToolDefinition>,
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
            tools: Vec::new(),
        }
    }

    /// Begins with a system prompt, in place of the one that there may be.
    pub fn with_system(mut self, text: impl Into<String>) -> Self {
        self.messages.retain(|message| message.role != Role::System);
        self.messages.insert(0, ChatMessage::system(text));
        self
    }

    /// Sets how answers are generated.
    pub fn with_params(mut self, params: GenerateParams) -> Self {
        self.params = params;
        self
    }

    /// Offers tools to the model. Where it calls some, [`pending_calls`](Self::pending_calls) has the calls, and
    /// [`send_results`](Self::send_results) gives it what came of them.
    pub fn with_tools(mut self, tools: impl IntoIterator<Item = ToolDefinition>) -> Self {
        self.tools = tools.into_iter().collect();
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
        self.messages.retain(|message| message.role == Role::System);
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
        let params = self.params.clone();
        self.add(vec![ChatMessage::user(text)], params).await
    }

    /// The calls of the last answer that wait for their results.
    pub fn pending_calls(&self) -> &[ToolCall] {
        self.messages.last().map_or(&[], |message| &message.tool_calls)
    }

    /// Gives the model the results of its calls, each with the id of its call, and waits for the answer.
    ///
    /// # Errors
    ///
    /// As [`stream_results`](Self::stream_results).
    pub async fn send_results<I, C>(
        &mut self,
        results: impl IntoIterator<Item = (I, C)>,
    ) -> Result<GenerateOutput, EngineError>
    where
        I: Into<String>,
        C: Into<String>,
    {
        let stream = self.stream_results(results).await?;
        collect_events(stream).await
    }

    /// Gives the model the results of its calls and gives the answer piece by piece. Where
    /// [`tool_choice`](GenerateParams::tool_choice) makes the model call a tool, it is free to answer now.
    ///
    /// # Errors
    ///
    /// [`EngineError::InvalidParameter`] where a pending call has no result or a result no pending call, and those of the
    /// engine.
    pub async fn stream_results<I, C>(
        &mut self,
        results: impl IntoIterator<Item = (I, C)>,
    ) -> Result<ChatStream<'_>, EngineError>
    where
        I: Into<String>,
        C: Into<String>,
    {
        let mut results: Vec<(String, String)> = results
            .into_iter()
            .map(|(id, content)| (id.into(), content.into()))
            .collect();
        let mut added = Vec::new();
        for call in self.pending_calls() {
            let at = results.iter().position(|(id, _)| *id == call.id);
            let at = at.ok_or_else(|| {
                ParamError::new(
                    "results",
                    "incomplete",
                    format_args!("one for call `{}` of `{}`", call.id, call.name),
                )
            })?;
            let (id, content) = results.remove(at);
            added.push(ChatMessage::tool(id, content).with_name(call.name.clone()));
        }
        if let Some((id, _)) = results.first() {
            return Err(ParamError::new("results", id, "the ids of calls that are pending").into());
        }
        if added.is_empty() {
            return Err(ParamError::new("results", "given", "none while no call is pending").into());
        }
        let mut params = self.params.clone();
        if params.tool_choice != ToolChoice::None {
            params.tool_choice = ToolChoice::Auto;
        }
        self.add(added, params).await
    }

    async fn add(
        &mut self,
        added: Vec<ChatMessage>,
        params: GenerateParams,
    ) -> Result<ChatStream<'_>, EngineError> {
        let messages = self.messages.iter().chain(&added).cloned();
        let prompt = Prompt::chat(messages).with_tools(self.tools.iter().cloned());
        let events = self.engine.stream(prompt, params).await?;
        let count = added.len();
        self.messages.extend(added);
        Ok(ChatStream {
            messages: &mut self.messages,
            added: count,
            events,
            answer: PartialOutput::default(),
            failed: false,
        })
    }
}

/// The events of one answer. What it gave is added to the history when it is dropped.
pub struct ChatStream<'a> {
    messages: &'a mut Vec<ChatMessage>,
    /// Messages that the answer answers.
    added: usize,
    events: EventStream,
    answer: PartialOutput,
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
            Some(Ok(event)) => drop(self.answer.take(event.clone())),
            Some(Err(_)) => self.failed = true,
            None => {}
        }
        Poll::Ready(event)
    }
}

impl Drop for ChatStream<'_> {
    fn drop(&mut self) {
        if self.failed || self.answer.is_empty() {
            self.messages.truncate(self.messages.len() - self.added);
        } else {
            self.messages.push(self.answer.message());
        }
    }
}
