//! A model's chat templates, rendered as transformers renders them.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};
use serde_json::{Map, Value as Json};

use super::content_format::detect;
use super::messages::ContentFormat;
use super::python::{from_json, is_space, print, tojson};
use super::{RenderError, messages};

/// What transformers appends to the message that is to be continued, to find its end again.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// One template.
struct Template {
    source: String,
    format: ContentFormat,
}

/// The templates of one model.
pub(super) struct ChatTemplates {
    environment: Environment<'static>,
    templates: BTreeMap<String, Template>,
    /// `bos_token` and the like, by name.
    special_tokens: Vec<(String, String)>,
}

/// A chat, as far as its template sees it.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    /// As the client sent them.
    pub messages: Vec<Json>,
    /// As the client sent them.
    pub tools: Option<Vec<Json>>,
    /// `documents`
    pub documents: Option<Json>,
    /// Whether the answer's opening is appended.
    pub add_generation_prompt: bool,
    /// Whether the last message is left open.
    pub continue_final_message: bool,
    /// `reasoning_effort`
    pub reasoning_effort: Option<String>,
    /// `chat_template_kwargs`
    pub kwargs: Map<String, Json>,
}

impl ChatTemplates {
    /// Compiles the templates, by name; `default` is the one that is used without tools.
    pub(super) fn new(
        templates: BTreeMap<String, String>,
        special_tokens: Vec<(String, String)>,
    ) -> Result<Self, Error> {
        let mut environment = environment()?;
        let mut compiled = BTreeMap::new();
        for (name, source) in templates {
            let plain = without_generation_tags(&source);
            environment.add_template_owned(name.clone(), plain.clone())?;
            compiled.insert(name, Template { format: detect(&plain), source });
        }
        Ok(Self { environment, templates: compiled, special_tokens })
    }

    /// The prompt's text.
    pub(super) fn render(&self, chat: Chat) -> Result<String, RenderError> {
        if chat.messages.is_empty() {
            return Err(RenderError::Refused("messages: give at least one".into()));
        }
        if chat.continue_final_message && chat.add_generation_prompt {
            let message = "continue_final_message: set add_generation_prompt to false with it";
            return Err(RenderError::Refused(message.into()));
        }
        let name = match &chat.tools {
            Some(_) if self.templates.contains_key("tool_use") => "tool_use",
            _ => "default",
        };
        let Some(template) = self.templates.get(name) else {
            return Err(RenderError::Unknown("no_chat_template"));
        };
        let mut conversation = messages::conversation(chat.messages, template.format)?;
        let knows_developer =
            template.source.contains("\"developer\"") || template.source.contains("'developer'");
        if !knows_developer && conversation.iter().any(|message| message["role"] == "developer") {
            conversation = messages::developer_to_system(conversation);
        }
        let final_message = match chat.continue_final_message {
            true => Some(open_final_message(&mut conversation, &template.source)?),
            false => None,
        };

        // Kwargs overwrite special tokens, the request's own members overwrite kwargs, and kwargs that are null or
        // "auto" count as not given.
        let mut context: BTreeMap<String, Value> = self
            .special_tokens
            .iter()
            .map(|(name, token)| (name.clone(), Value::from(token.as_str())))
            .collect();
        let tools = chat.tools.map(messages::tools).transpose()?;
        let tools = tools.map_or(Json::Null, Json::Array);
        context.insert("tools".into(), from_json(&tools));
        context.insert("documents".into(), Value::from(()));
        let thinks = chat.kwargs.contains_key("enable_thinking");
        for (name, value) in chat.kwargs {
            if !value.is_null() && value != "auto" {
                context.insert(name, from_json(&value));
            }
        }
        if let Some(documents) = chat.documents {
            context.insert("documents".into(), from_json(&documents));
        }
        if let Some(effort) = chat.reasoning_effort {
            if !thinks {
                context.insert("enable_thinking".into(), Value::from(effort != "none"));
            }
            context.insert("reasoning_effort".into(), Value::from(effort));
        }
        context.insert("messages".into(), from_json(&Json::Array(conversation)));
        context.insert("add_generation_prompt".into(), Value::from(chat.add_generation_prompt));

        let rendered = self
            .environment
            .get_template(name)
            .and_then(|template| template.render(Value::from_pairs(context)))
            .map_err(|error| RenderError::Template(reason(&error)))?;
        match final_message {
            Some(text) => cut_at_tag(rendered, &text),
            None => Ok(rendered),
        }
    }
}

fn reason(error: &Error) -> String {
    error.detail().map_or_else(|| error.to_string(), str::to_owned)
}

fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, _, value| print(out, value));
    environment.add_filter("tojson", tojson);
    // In Python strings and mappings have a length and items, too.
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    environment.add_test("iterable", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Iterable)
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| -> Result<String, Error> {
        let mut text = String::new();
        jiff::fmt::strtime::BrokenDownTime::from(&jiff::Zoned::now())
            .format(&format, &mut text)
            .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
        Ok(text)
    });
    Ok(environment)
}

/// Replaces `{% generation %}`, which marks the assistant's own words for training and prints nothing, by a
/// condition that always holds.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let end = start + length;
        let inner = rest[start + 2..end].trim_matches(['-', '+']).trim();
        let replacement = match inner {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        match replacement {
            Some(replacement) => out.push_str(&rest[..end].replacen(inner, replacement, 1)),
            None => out.push_str(&rest[..end]),
        }
        out.push_str("%}");
        rest = &rest[end + 2..];
    }
    out.push_str(rest);
    out
}

/// Appends the tag to the last message's text, and gives that text.
fn open_final_message(conversation: &mut [Json], template: &str) -> Result<String, RenderError> {
    let refused = |problem: &str| RenderError::Refused(format!("continue_final_message: {problem}"));
    if !template.contains("content") {
        return Err(refused("the chat template shows no content"));
    }
    let content = conversation.last_mut().map(|message| &mut message["content"]);
    let text = match content {
        Some(Json::String(text)) => Some(text),
        Some(Json::Array(parts)) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
            Some(Json::String(text)) => Some(text),
            _ => None,
        }),
        _ => None,
    };
    let text = text.ok_or_else(|| refused("the final message has no text"))?;
    let before = text.clone();
    text.push_str(CONTINUE_TAG);
    Ok(before)
}

/// Cuts the prompt where the final message ends.
fn cut_at_tag(rendered: String, final_message: &str) -> Result<String, RenderError> {
    let tag = CONTINUE_TAG.trim_end();
    let at = rendered.rfind(tag).filter(|_| rendered.contains(final_message.trim_matches(is_space)));
    let Some(at) = at else {
        let message = "continue_final_message: the chat template does not show the final message as it is";
        return Err(RenderError::Refused(message.into()));
    };
    let kept = match rendered[at..].starts_with(CONTINUE_TAG) {
        true => &rendered[..at],
        // The template trims messages: so does the open one.
        false => rendered[..at].trim_end_matches(is_space),
    };
    Ok(kept.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chat(messages: Json) -> Chat {
        let Json::Array(messages) = messages else { panic!() };
        Chat { messages, add_generation_prompt: true, ..Chat::default() }
    }

    fn render(template: &str, chat: Chat) -> Result<String, RenderError> {
        let templates = BTreeMap::from([("default".to_owned(), template.to_owned())]);
        let specials = vec![("bos_token".to_owned(), "<s>".to_owned())];
        ChatTemplates::new(templates, specials).unwrap().render(chat)
    }

    const CHATML: &str = "{{ bos_token }}{% for m in messages %}\n    {% generation %}\n<{{ m.role }}>{{ m.content }}\n    {%- endgeneration %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}\n";

    #[test]
    fn blocks_are_trimmed_and_generation_tags_print_nothing() {
        let prompt = render(CHATML, chat(json!([{"role": "user", "content": "hi"}]))).unwrap();
        assert_eq!(prompt, "<s><user>hi<assistant>");
    }

    #[test]
    fn a_final_message_is_left_open() {
        let open = |content: &str, template: &str| {
            let mut chat = chat(json!([{"role": "assistant", "content": content}]));
            chat.add_generation_prompt = false;
            chat.continue_final_message = true;
            render(template, chat)
        };
        assert_eq!(open("so ", "{{ messages[0].content }}</s>").unwrap(), "so ");
        assert_eq!(open("so ", "{{ messages[0].content | trim }}</s>").unwrap(), "so");
        assert!(open("so", "{{ messages[0].content[:1] }}</s>").is_err());
        let mut both = chat(json!([{"role": "assistant", "content": "x"}]));
        both.continue_final_message = true;
        assert!(matches!(render("{{ messages[0].content }}", both), Err(RenderError::Refused(_))));
    }

    #[test]
    fn kwargs_reach_the_template_as_vllm_merges_them() {
        let mut chat = chat(json!([{"role": "user", "content": "x"}]));
        chat.reasoning_effort = Some("low".into());
        chat.kwargs =
            json!({"bos_token": "B", "a": null, "b": "auto", "c": 1, "add_generation_prompt": false})
                .as_object()
                .unwrap()
                .clone();
        let template = "{{ bos_token }} {{ a is defined }} {{ b is defined }} {{ c }} {{ add_generation_prompt }} {{ enable_thinking }} {{ reasoning_effort }} {{ tools is none }} {{ documents is none }}";
        assert_eq!(render(template, chat).unwrap(), "B False False 1 True True low True True");
    }

    #[test]
    fn a_templates_own_refusal_carries_its_words() {
        let template = "{{ raise_exception('roles must alternate') }}";
        let error = render(template, chat(json!([{"role": "user", "content": "x"}]))).unwrap_err();
        assert_eq!(error, RenderError::Template("roles must alternate".into()));
    }

    #[test]
    fn the_date_is_written_as_strftime_does() {
        let prompt =
            render("{{ strftime_now('%d %b %Y') }}", chat(json!([{"role": "user", "content": "x"}])));
        let prompt = prompt.unwrap();
        assert!(prompt.len() == 11 && prompt.split(' ').count() == 3, "{prompt}");
    }
}
