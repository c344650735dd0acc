//! Chat templates, as Python's jinja2 renders them in transformers' settings.

use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Output, State, UndefinedBehavior, Value, context};
use serde_json::{Map, Value as Json};

use crate::strftime::strftime;
use crate::{TextError, python};

/// Steps of the template machine: a conversation of thousands of messages takes a fraction of it, a loop without end
/// all of it in a second.
const FUEL: u64 = 4_000_000;
/// Bytes of stack for a template, taken as they are touched. Each round of a loop can put a list into another one, and
/// minijinja frees them by recursion: this is enough for as many as the fuel can make.
const STACK: usize = 1 << 30;
const RECURSION_LIMIT: usize = 100;
const NAME: &str = "chat";
/// The detail under which `raise_exception` travels through minijinja.
const RAISED: &str = "raise_exception: ";

/// A compiled chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

/// What a template is rendered with.
#[derive(Clone, Debug)]
pub struct TemplateContext {
    messages: Json,
    tools: Option<Json>,
    add_generation_prompt: bool,
    bos_token: String,
    eos_token: String,
    arguments: Map<String, Json>,
    now: Option<SystemTime>,
}

impl TemplateContext {
    /// A conversation: a list of objects with `role` and `content`.
    pub fn new(messages: Json) -> Self {
        Self {
            messages,
            tools: None,
            add_generation_prompt: false,
            bos_token: String::new(),
            eos_token: String::new(),
            arguments: Map::new(),
            now: None,
        }
    }

    /// The tools that the model may call, a list of JSON schemas of functions.
    pub fn with_tools(mut self, tools: Option<Json>) -> Self {
        self.tools = tools;
        self
    }

    /// Whether to end with the beginning of the model's answer.
    pub fn with_generation_prompt(mut self, add: bool) -> Self {
        self.add_generation_prompt = add;
        self
    }

    /// The text of the tokens that begin and end a sequence.
    pub fn with_special_tokens(mut self, bos: &str, eos: &str) -> Self {
        bos.clone_into(&mut self.bos_token);
        eos.clone_into(&mut self.eos_token);
        self
    }

    /// Arguments of the template's own, such as `enable_thinking`.
    pub fn with_arguments(mut self, arguments: Map<String, Json>) -> Self {
        self.arguments = arguments;
        self
    }

    /// The time that `strftime_now` tells, in place of the clock's.
    pub fn with_now(mut self, now: SystemTime) -> Self {
        self.now = Some(now);
        self
    }
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    ///
    /// Where the template is no valid jinja, with the line.
    pub fn new(source: &str) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        let whitespace = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| failed(&error))?;
        environment.set_syntax(whitespace);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_recursion_limit(RECURSION_LIMIT);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(python::method);
        environment.set_formatter(print);
        environment.add_filter("tojson", python::tojson);
        environment.add_filter("string", python::str);
        environment.add_test("iterable", |value: &Value| {
            // minijinja iterates over none, Python does not.
            !value.is_none() && value.try_iter().is_ok()
        });
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("{RAISED}{message}"),
            ))
        });
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| failed(&error))?;
        Ok(Self { environment })
    }

    /// Renders a conversation.
    ///
    /// # Errors
    ///
    /// [`TextError::Refused`] where the template calls `raise_exception`, [`TextError::Template`] where it fails.
    pub fn render(&self, context: &TemplateContext) -> Result<String, TextError> {
        let mut environment = self.environment.clone();
        let now = context.now;
        environment.add_function("strftime_now", move |format: String| {
            strftime(&format, now.unwrap_or_else(SystemTime::now))
        });
        let render = || {
            let given = context! {
                messages => Value::from(Serde(&context.messages)),
                tools => Value::from(Serde(&context.tools)),
                documents => (),
                add_generation_prompt => context.add_generation_prompt,
                bos_token => context.bos_token.as_str(),
                eos_token => context.eos_token.as_str(),
            };
            let all = context! { ..Value::from(Serde(&context.arguments)), ..given };
            let template = environment.get_template(NAME).map_err(|error| failed(&error))?;
            template.render(all).map_err(|error| failed(&error))
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("chat-template".to_owned())
                .stack_size(STACK);
            let running = thread
                .spawn_scoped(scope, render)
                .map_err(|error| TextError::Template {
                    message: format!("no thread can be started for it: {error}"),
                    line: None,
                })?;
            running.join().unwrap_or_else(|_| {
                Err(TextError::Template {
                    message: "the template engine panicked".to_owned(),
                    line: None,
                })
            })
        })
    }
}

fn failed(error: &Error) -> TextError {
    let message = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    // An error inside a macro or a loop carries the first one as its source.
    let mut raised = message.strip_prefix(RAISED).map(str::to_owned);
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(detail) = inner.downcast_ref::<Error>().and_then(Error::detail)
            && let Some(message) = detail.strip_prefix(RAISED)
        {
            raised = Some(message.to_owned());
        }
        source = inner.source();
    }
    match raised {
        Some(message) => TextError::Refused { message },
        None => TextError::Template {
            message,
            line: error.line(),
        },
    }
}

/// Takes out `{% generation %}` and `{% endgeneration %}`, which mark the model's words for training and print
/// nothing. A comment takes their place, which trims the space around it in the same way.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%").map(|start| start + 2) {
        let Some(len) = rest[start..].find("%}") else {
            break;
        };
        let (inner, end) = (&rest[start..start + len], start + len + 2);
        let word = inner
            .trim_start_matches(['-', '+'])
            .trim_end_matches(['-', '+'])
            .trim();
        if word == "generation" || word == "endgeneration" {
            out.push_str(&rest[..start - 2]);
            out.push_str("{#");
            out.push_str(if inner.starts_with('-') { "-" } else { "" });
            out.push(' ');
            out.push_str(if inner.ends_with('-') { "-" } else { "" });
            out.push_str("#}");
        } else {
            out.push_str(&rest[..end]);
        }
        rest = &rest[end..];
    }
    out + rest
}

/// Prints a value as Python's `str` does.
fn print(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&python::str(state, value)?),
    }
    .map_err(Error::from)
}
