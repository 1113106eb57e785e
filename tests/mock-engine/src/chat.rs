//! Chat messages to a prompt, with the model's own template, as Hugging Face renders it.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, Value};
use serde_json::{Map, Value as Json};

/// The model's chat template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// A file cannot be read.
    #[error("{0}")]
    Read(String),
    /// There is no template.
    #[error("the model has no chat template: add chat_template.jinja to its folder, or use /v1/completions")]
    NoTemplate,
    /// It does not take these messages.
    #[error("{0}")]
    Render(String),
    /// A message is not one.
    #[error("messages[{index}]{field}: {reason}")]
    Message {
        /// Its place.
        index: usize,
        /// What in it, beginning with a dot; or nothing.
        field: &'static str,
        /// What is wrong.
        reason: &'static str,
    },
}

/// A model's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Option<Environment<'static>>,
    tokens: Map<String, Json>,
}

/// What a template is rendered with.
#[derive(Clone, Debug, Default)]
pub struct ChatInput {
    /// The conversation.
    pub messages: Vec<Json>,
    /// The tools the model may call.
    pub tools: Option<Json>,
    /// Whether the prompt ends with the beginning of the answer.
    pub add_generation_prompt: bool,
    /// More names for the template.
    pub kwargs: Map<String, Json>,
}

impl ChatTemplate {
    /// Reads the template from a model's folder: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.
    pub fn load(model: &Path) -> Result<Self, ChatError> {
        let config = match std::fs::read(model.join("tokenizer_config.json")) {
            Ok(bytes) => serde_json::from_slice::<Map<String, Json>>(&bytes)
                .map_err(|error| ChatError::Read(format!("tokenizer_config.json: {error}")))?,
            Err(_) => Map::new(),
        };
        let source = match std::fs::read_to_string(model.join("chat_template.jinja")) {
            Ok(source) => Some(source),
            Err(_) => config.get("chat_template").and_then(Json::as_str).map(str::to_owned),
        };
        let tokens = ["bos_token", "eos_token", "pad_token", "unk_token"].into_iter().filter_map(|name| {
            let token = config.get(name)?;
            let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
            Some((name.to_owned(), Json::from(text)))
        });
        let environment = source.map(environment).transpose()?;
        Ok(Self { environment, tokens: tokens.collect() })
    }

    /// The prompt.
    pub fn render(&self, input: &ChatInput) -> Result<String, ChatError> {
        let environment = self.environment.as_ref().ok_or(ChatError::NoTemplate)?;
        let mut context = self.tokens.clone();
        context.extend(input.kwargs.clone());
        context.insert("messages".into(), messages(&input.messages)?.into());
        context.insert("tools".into(), input.tools.clone().unwrap_or(Json::Null));
        context.insert("add_generation_prompt".into(), input.add_generation_prompt.into());
        let template =
            environment.get_template("chat").map_err(|error| ChatError::Render(error.to_string()))?;
        let rendered = template.render(Serde(&context));
        rendered.map_err(|error| ChatError::Render(error.to_string()))
    }
}

/// Messages as vLLM hands them to a template that takes content as a string.
fn messages(messages: &[Json]) -> Result<Vec<Json>, ChatError> {
    messages.iter().enumerate().map(|(index, message)| message_for_template(index, message)).collect()
}

fn message_for_template(index: usize, message: &Json) -> Result<Json, ChatError> {
    let wrong = |field, reason| ChatError::Message { index, field, reason };
    let Some(mut message) = message.as_object().cloned() else {
        return Err(wrong("", "expected an object with role and content"));
    };
    if !message.get("role").is_some_and(Json::is_string) {
        return Err(wrong(".role", "expected a string"));
    }
    match message.get("content") {
        None | Some(Json::Null | Json::String(_)) => {}
        Some(Json::Array(parts)) => {
            let text = |part: &Json| Some(part.get("text")?.as_str()?.to_owned());
            let texts: Option<Vec<String>> = parts.iter().map(text).collect();
            let mut texts =
                texts.ok_or(wrong(".content", "only text parts can be read, not images or audio"))?;
            // vLLM leaves out empty parts.
            texts.retain(|text| !text.is_empty());
            message.insert("content".into(), texts.join("\n").into());
        }
        Some(_) => return Err(wrong(".content", "expected a string or a list of parts")),
    }
    if let Some(Json::Array(calls)) = message.get_mut("tool_calls") {
        for call in calls {
            let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments"))
            else {
                continue;
            };
            // Templates take the arguments as an object; clients send its JSON.
            if let Some(text) = arguments.as_str() {
                let text = if text.trim().is_empty() { "{}" } else { text };
                *arguments = serde_json::from_str(text)
                    .map_err(|_| wrong(".tool_calls", "function.arguments is not the JSON of an object"))?;
            }
        }
    }
    Ok(message.into())
}

fn environment(source: String) -> Result<Environment<'static>, ChatError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| ChatError::Read(error.to_string()))?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment
        .add_template_owned("chat", source)
        .map_err(|error| ChatError::Read(format!("chat template: {error}")))?;
    Ok(environment)
}

/// Python's `json.dumps` with `ensure_ascii=False`, as Hugging Face gives it to templates.
fn tojson(value: Value, kwargs: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    kwargs.assert_all_used()?;
    let json = serde_json::to_value(&value)
        .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
    let mut text = String::new();
    dump(&json, indent, 0, &mut text);
    Ok(Value::from_safe_string(text))
}

fn dump(value: &Json, indent: Option<usize>, depth: usize, into: &mut String) {
    let new_line = |depth: usize, into: &mut String| {
        if let Some(indent) = indent {
            into.push('\n');
            into.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let between = if indent.is_some() { "," } else { ", " };
    match value {
        Json::Array(items) if !items.is_empty() => {
            into.push('[');
            for (i, item) in items.iter().enumerate() {
                into.push_str(if i > 0 { between } else { "" });
                new_line(depth + 1, into);
                dump(item, indent, depth + 1, into);
            }
            new_line(depth, into);
            into.push(']');
        }
        Json::Object(fields) if !fields.is_empty() => {
            into.push('{');
            for (i, (name, field)) in fields.iter().enumerate() {
                into.push_str(if i > 0 { between } else { "" });
                new_line(depth + 1, into);
                into.push_str(&Json::from(name.as_str()).to_string());
                into.push_str(": ");
                dump(field, indent, depth + 1, into);
            }
            new_line(depth, into);
            into.push('}');
        }
        other => into.push_str(&other.to_string()),
    }
}
