//! Chat templates, as Python's jinja2 renders them in transformers' settings.

use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, UndefinedBehavior, Value, context};
use serde::Serialize;
use serde_json::{Map, Value as Json};

use crate::TextError;
use crate::strftime::strftime;

/// Steps of the template machine: a conversation of thousands of messages takes a fraction of it, a loop without end
/// all of it in seconds.
const FUEL: u64 = 20_000_000;
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
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(print);
        environment.add_filter("tojson", tojson);
        environment.add_filter("string", |value: &Value| python_str(value));
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
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else {
            break;
        };
        let inner = &rest[start + 2..start + len];
        let word = inner
            .trim_start_matches(['-', '+'])
            .trim_end_matches(['-', '+'])
            .trim();
        if word == "generation" || word == "endgeneration" {
            out.push_str(&rest[..start]);
            out.push_str("{#");
            out.push_str(if inner.starts_with('-') { "-" } else { "" });
            out.push(' ');
            out.push_str(if inner.ends_with('-') { "-" } else { "" });
            out.push_str("#}");
        } else {
            out.push_str(&rest[..start + len + 2]);
        }
        rest = &rest[start + len + 2..];
    }
    out + rest
}

/// Prints a value as Python's `str` does.
fn print(out: &mut Output<'_>, _state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    out.write_str(&python_str(value)).map_err(Error::from)
}

fn python_str(value: &Value) -> String {
    value.as_str().map_or_else(|| python_repr(value), str::to_owned)
}

fn python_repr(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value
                .try_iter()
                .into_iter()
                .flatten()
                .map(|item| python_repr(&item))
                .collect::<Vec<_>>();
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let entries = value.try_iter().into_iter().flatten().map(|key| {
                let entry = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", python_repr(&key), python_repr(&entry))
            });
            format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
        }
        _ => value.to_string(),
    }
}

/// A string as Python's `repr` writes it.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::from(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            character if character == quote => out.extend(['\\', character]),
            character => out.push(character),
        }
    }
    out.push(quote);
    out
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`: spaces after the separators, no escapes for HTML.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands options over by value"
)]
fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // transformers takes these too, and templates pass the defaults.
    let _: Option<bool> = options.get("ensure_ascii")?;
    let _: Option<Value> = options.get("separators")?;
    let _: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let json = serde_json::to_value(value).map_err(|error| {
        Error::new(ErrorKind::BadSerialization, "value cannot be JSON").with_source(error)
    })?;
    let mut out = Vec::new();
    let indentation = " ".repeat(indent.unwrap_or(0).min(64));
    let written = match indent {
        Some(_) => {
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indentation.as_bytes());
            json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        None => json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    };
    written.map_err(|error| {
        Error::new(ErrorKind::BadSerialization, "value cannot be JSON").with_source(error)
    })?;
    Ok(Value::from_safe_string(
        String::from_utf8_lossy(&out).into_owned(),
    ))
}

/// Python's separators: `", "` and `": "`.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}
