//! A chat request's messages and tools, in the form in which vLLM hands them to the chat template.
//!
//! vLLM takes messages apart and builds them anew: only some members survive, in an order of its own, and content
//! becomes either one string or a list of parts, as the template wants it. Templates that print whole objects
//! show all of that, so it is mirrored here member by member.

use serde_json::{Map, Value};

use super::RenderError;

/// What a template expects a message's content to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ContentFormat {
    /// One string.
    String,
    /// A list of parts.
    Parts,
}

/// Members of content parts that vLLM knows; others are passed on to templates that take parts.
const KNOWN_PART_MEMBERS: [&str; 18] = [
    "audio_embeds",
    "audio_url",
    "closed",
    "data",
    "file",
    "image_embeds",
    "image_pil",
    "image_url",
    "input_audio",
    "name",
    "prompt_cache_breakpoint",
    "refusal",
    "text",
    "thinking",
    "type",
    "uuid",
    "video_embeds",
    "video_url",
];

/// Members that make a part one of images, sound or the like, whatever its type.
const MEDIA_MEMBERS: [&str; 11] = [
    "image_url",
    "input_image",
    "image_pil",
    "image_embeds",
    "audio_embeds",
    "video_embeds",
    "prompt_embeds",
    "audio_url",
    "input_audio",
    "video_url",
    "file",
];

/// A line that one client puts first in its system prompt, different in every request.
const BILLING_HEADER: &str = "x-anthropic-billing-header";

fn refused(problem: &str) -> RenderError {
    RenderError::Refused(format!("messages: {problem}"))
}

/// The conversation as the template sees it.
pub(super) fn conversation(messages: Vec<Value>, format: ContentFormat) -> Result<Vec<Value>, RenderError> {
    messages.into_iter().map(|message| one(message, format)).collect()
}

fn one(message: Value, format: ContentFormat) -> Result<Value, RenderError> {
    let Value::Object(mut message) = message else { return Err(refused("each must be an object")) };
    let Some(Value::String(role)) = message.remove("role") else {
        return Err(refused("each needs a role"));
    };
    let mut parts = match message.remove("content") {
        None | Some(Value::Null) => Vec::new(),
        Some(text @ Value::String(_)) => vec![text],
        Some(Value::Array(parts)) => parts,
        Some(_) => return Err(refused("content must be a string or a list of parts")),
    };
    if role == "system" {
        parts = parts.into_iter().filter_map(without_billing_header).collect();
    }
    let mut content = Vec::with_capacity(parts.len());
    for part in parts {
        // vLLM leaves out what is falsy in Python: an empty text, where it stands alone and not in an object.
        content.extend(text_part(part, format)?.filter(|text| text != ""));
    }
    let mut content = match format {
        ContentFormat::Parts => Value::Array(content),
        ContentFormat::String => Value::String(joined(&content)),
    };

    let mut built = Map::new();
    let mut extra = Map::new();
    match role.as_str() {
        "assistant" => {
            match message.remove("tool_calls") {
                None | Some(Value::Null) => {}
                Some(Value::Array(calls)) if calls.is_empty() => {}
                Some(Value::Array(calls)) => {
                    let calls = calls.into_iter().map(tool_call).collect::<Result<_, _>>()?;
                    extra.insert("tool_calls".into(), Value::Array(calls));
                }
                Some(_) => return Err(refused("tool_calls must be a list")),
            }
            let old_name = message.remove("reasoning_content").filter(|value| !value.is_null());
            let reasoning = message.remove("reasoning").filter(|value| !value.is_null()).or(old_name);
            if let Some(reasoning) = reasoning {
                extra.insert("reasoning".into(), reasoning.clone());
                extra.insert("reasoning_content".into(), reasoning);
            }
        }
        "tool" => {
            if let Some(id) = message.remove("tool_call_id") {
                extra.insert("tool_call_id".into(), id);
            }
            if let Value::Array(parts) = &content
                && parts.iter().all(|part| part["type"] == "text")
            {
                let texts: Vec<Value> = parts.iter().map(|part| part["text"].clone()).collect();
                content = Value::String(joined(&texts));
            }
        }
        _ => {}
    }
    for name in ["name", "task"] {
        if let Some(text @ Value::String(_)) = message.remove(name) {
            extra.insert(name.into(), text);
        }
    }
    if role == "developer" {
        extra.insert("tools".into(), message.remove("tools").unwrap_or(Value::Null));
    }
    built.insert("role".into(), Value::String(role));
    built.insert("content".into(), content);
    built.append(&mut extra);
    Ok(Value::Object(built))
}

fn joined(texts: &[Value]) -> String {
    let texts: Vec<&str> = texts.iter().filter_map(Value::as_str).collect();
    texts.join("\n")
}

fn without_billing_header(part: Value) -> Option<Value> {
    let text = match &part {
        Value::String(text) => text,
        Value::Object(members) if members.get("type").is_some_and(|of| of == "text") => {
            match members.get("text") {
                Some(Value::String(text)) => text,
                _ => return Some(part),
            }
        }
        _ => return Some(part),
    };
    if !text.starts_with(BILLING_HEADER) {
        return Some(part);
    }
    let rest = text.split_once('\n').map_or("", |split| split.1).to_owned();
    if rest.is_empty() {
        return None;
    }
    Some(match part {
        Value::Object(mut members) => {
            members.insert("text".into(), Value::String(rest));
            Value::Object(members)
        }
        _ => Value::String(rest),
    })
}

/// A part as the template sees it: `None` where vLLM leaves it out.
fn text_part(part: Value, format: ContentFormat) -> Result<Option<Value>, RenderError> {
    let wrap = |text: String, extra: Option<Map<String, Value>>| match format {
        ContentFormat::String => Value::String(text),
        ContentFormat::Parts => {
            let mut members = Map::new();
            members.insert("type".into(), Value::from("text"));
            members.insert("text".into(), Value::String(text));
            for (name, value) in extra.into_iter().flatten() {
                if !KNOWN_PART_MEMBERS.contains(&name.as_str()) {
                    members.insert(name, value);
                }
            }
            Value::Object(members)
        }
    };
    let mut members = match part {
        Value::String(text) => return Ok(Some(wrap(text, None))),
        Value::Object(members) => members,
        _ => return Err(refused("a content part must be a string or an object")),
    };
    if MEDIA_MEMBERS.iter().any(|name| members.contains_key(*name)) {
        return Err(RenderError::Unknown("multimodal"));
    }
    if members.get("uuid").is_some_and(|uuid| !uuid.is_null()) {
        return Err(refused("a text part has no uuid"));
    }
    let kind = match members.get("type") {
        Some(Value::String(kind)) => kind.clone(),
        _ => return Err(refused("a content part needs a type")),
    };
    let member = match kind.as_str() {
        "text" | "input_text" | "output_text" => "text",
        "refusal" => "refusal",
        "thinking" => "thinking",
        "tool_reference" => "name",
        _ => return Err(RenderError::Unknown("multimodal")),
    };
    let text = match members.remove(member) {
        Some(Value::String(text)) => text,
        None | Some(Value::Null) if kind == "text" || kind == "refusal" => return Ok(None),
        _ => return Err(refused("a text part needs its text")),
    };
    if kind == "tool_reference" && format == ContentFormat::Parts {
        return Ok(Some(serde_json::json!({ "type": "tool_reference", "name": text })));
    }
    Ok(Some(wrap(text, Some(members))))
}

/// A tool call with its members in vLLM's order and its arguments as an object.
fn tool_call(call: Value) -> Result<Value, RenderError> {
    let Value::Object(mut call) = call else { return Err(refused("a tool call must be an object")) };
    let Some(Value::Object(mut function)) = call.remove("function") else {
        return Err(refused("a tool call needs its function"));
    };
    let kind = call.remove("type").unwrap_or_else(|| Value::from("function"));
    if kind != "function" {
        return Err(refused("tool calls must be of type function"));
    }
    let arguments = match function.remove("arguments") {
        Some(Value::String(text)) => serde_json::from_str(&text).unwrap_or(Value::Null),
        Some(value) => value,
        None => Value::Null,
    };
    // What is no object counts as one without members.
    let arguments = if arguments.is_object() { arguments } else { Value::Object(Map::new()) };

    let mut ordered = Map::new();
    ordered.insert("arguments".into(), arguments);
    if let Some(name) = function.remove("name") {
        ordered.insert("name".into(), name);
    }
    ordered.append(&mut function);
    let mut built = Map::new();
    if let Some(id) = call.remove("id") {
        built.insert("id".into(), id);
    }
    built.insert("function".into(), Value::Object(ordered));
    built.insert("type".into(), kind);
    built.append(&mut call);
    Ok(Value::Object(built))
}

/// The tools with the members that vLLM keeps, in its order.
pub(super) fn tools(tools: Vec<Value>) -> Result<Vec<Value>, RenderError> {
    let wrong =
        || RenderError::Refused("tools: each must be of type function, with a function's name".into());
    tools
        .into_iter()
        .map(|tool| {
            let Value::Object(mut tool) = tool else { return Err(wrong()) };
            let Some(Value::Object(mut function)) = tool.remove("function") else { return Err(wrong()) };
            if tool.get("type").is_some_and(|kind| kind != "function") {
                return Err(wrong());
            }
            let defer = tool.remove("defer_loading").filter(|value| !value.is_null());
            let mut kept = Map::new();
            kept.insert("name".into(), function.remove("name").ok_or_else(wrong)?);
            for name in ["description", "parameters"] {
                kept.insert(name.into(), function.remove(name).unwrap_or(Value::Null));
            }
            let own_defer = function.remove("defer_loading").filter(|value| !value.is_null());
            for (name, value) in
                [("strict", function.remove("strict")), ("defer_loading", own_defer.or(defer.clone()))]
            {
                if let Some(value) = value.filter(|value| !value.is_null()) {
                    kept.insert(name.into(), value);
                }
            }
            let mut built = Map::new();
            built.insert("type".into(), Value::from("function"));
            built.insert("function".into(), Value::Object(kept));
            if let Some(defer) = defer {
                built.insert("defer_loading".into(), defer);
            }
            Ok(Value::Object(built))
        })
        .collect()
}

/// For templates that do not know the role `developer`: such messages become the system's, and all of the
/// system's messages one, at the start.
pub(super) fn developer_to_system(conversation: Vec<Value>) -> Vec<Value> {
    let converted: Vec<Value> = conversation
        .into_iter()
        .map(|mut message| {
            if message["role"] == "developer"
                && let Some(members) = message.as_object_mut()
            {
                members.insert("role".into(), Value::from("system"));
                members.shift_remove("tools");
            }
            message
        })
        .collect();
    let is_system = |message: &Value| message["role"] == "system";
    let later = converted.iter().skip(1).any(is_system);
    if !later {
        return converted;
    }
    let (system, others): (Vec<Value>, Vec<Value>) = converted.into_iter().partition(is_system);
    let contents: Vec<String> = system
        .iter()
        .map(|message| match &message["content"] {
            Value::Array(parts) => {
                let text = |part: &Value| part.as_str().or(part["text"].as_str()).map(str::to_owned);
                parts.iter().filter_map(text).collect::<Vec<_>>().join("\n")
            }
            content => content.as_str().unwrap_or_default().to_owned(),
        })
        .filter(|content| !content.is_empty())
        .collect();
    let merged = serde_json::json!({ "role": "system", "content": contents.join("\n\n") });
    std::iter::once(merged).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn text(messages: Value, format: ContentFormat) -> String {
        let Value::Array(messages) = messages else { panic!() };
        serde_json::to_string(&conversation(messages, format).unwrap()).unwrap()
    }

    #[test]
    fn members_survive_in_vllms_order() {
        let messages = json!([{
            "content": null, "extra": 1, "role": "assistant", "name": "n", "reasoning_content": "why",
            "tool_calls": [{"type": "function", "index": 0, "id": "a", "function": {"x": 1, "name": "f", "arguments": "{\"b\": 1, \"a\": 2.50}"}}],
        }]);
        assert_eq!(
            text(messages, ContentFormat::String),
            r#"[{"role":"assistant","content":"","tool_calls":[{"id":"a","function":{"arguments":{"b":1,"a":2.5},"name":"f","x":1},"type":"function","index":0}],"reasoning":"why","reasoning_content":"why","name":"n"}]"#
        );
    }

    #[test]
    fn content_takes_the_templates_form() {
        let messages = json!([
            {"role": "user", "content": [{"text": "a", "type": "text", "cache_control": {"type": "x"}}, "b"]},
            {"role": "tool", "tool_call_id": "t", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]},
        ]);
        assert_eq!(
            text(messages.clone(), ContentFormat::String),
            r#"[{"role":"user","content":"a\nb"},{"role":"tool","content":"1\n2","tool_call_id":"t"}]"#
        );
        assert_eq!(
            text(messages, ContentFormat::Parts),
            r#"[{"role":"user","content":[{"type":"text","text":"a","cache_control":{"type":"x"}},{"type":"text","text":"b"}]},{"role":"tool","content":"1\n2","tool_call_id":"t"}]"#
        );
    }

    #[test]
    fn images_are_left_to_the_engine() {
        for part in [
            json!({"type": "image_url", "image_url": {"url": "data:"}}),
            json!({"image_url": "x"}),
            json!({"type": "input_audio", "input_audio": {}}),
        ] {
            let messages = vec![json!({"role": "user", "content": [part]})];
            assert_eq!(conversation(messages, ContentFormat::Parts), Err(RenderError::Unknown("multimodal")));
        }
    }

    #[test]
    fn tools_keep_what_vllm_keeps() {
        let given = vec![
            json!({"function": {"parameters": {"z": 1, "a": 2}, "name": "f", "strict": true, "q": 1}, "hm": 1}),
            json!({"type": "function", "function": {"name": "g"}}),
        ];
        assert_eq!(
            serde_json::to_string(&tools(given).unwrap()).unwrap(),
            r#"[{"type":"function","function":{"name":"f","description":null,"parameters":{"z":1,"a":2},"strict":true}},{"type":"function","function":{"name":"g","description":null,"parameters":null}}]"#
        );
    }

    #[test]
    fn a_developers_messages_join_the_systems() {
        let conversation = vec![
            json!({"role": "system", "content": "a"}),
            json!({"role": "user", "content": "u"}),
            json!({"role": "developer", "content": "b", "tools": null}),
        ];
        assert_eq!(
            developer_to_system(conversation),
            [json!({"role": "system", "content": "a\n\nb"}), json!({"role": "user", "content": "u"})]
        );
    }

    #[test]
    fn a_billing_header_is_dropped_from_system_prompts() {
        let messages = json!([{"role": "system", "content": "x-anthropic-billing-header: cch=1\nreal"}]);
        assert_eq!(text(messages, ContentFormat::String), r#"[{"role":"system","content":"real"}]"#);
    }
}
