//! The model folder: always the same bytes, and read as Hugging Face reads it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use baton_mock_engine::chat::{ChatInput, ChatTemplate};
use baton_mock_engine::make_model::make_model;
use baton_mock_engine::tokenizer::Tokenizer;
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Map, Value};

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
    };
    std::fs::read_dir(folder).unwrap().map(read).collect()
}

#[test]
fn it_is_made_the_same_every_time() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_model(one.path()).unwrap();
    make_model(&other.path().join("a/b")).unwrap();
    let made = files(one.path());
    assert_eq!(
        made.keys().collect::<Vec<_>>(),
        [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    assert_eq!(files(&other.path().join("a/b")), made);
    make_model(one.path()).unwrap();
    assert_eq!(files(one.path()), made);
}

#[derive(Deserialize)]
struct Golden {
    special: BTreeMap<String, u32>,
    texts: Vec<Text>,
    chats: Vec<Chat>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Value>,
    tools: Option<Value>,
    #[serde(default = "yes")]
    add_generation_prompt: bool,
    prompt: String,
    ids: Vec<u32>,
}

fn yes() -> bool {
    true
}

/// What Hugging Face's tokenizer made of this model; `data/hf_golden.py` writes it anew.
#[test]
fn it_reads_as_with_hugging_face() {
    let golden: Golden = serde_json::from_str(include_str!("data/hf_golden.json")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    make_model(folder.path()).unwrap();
    let tokenizer = Tokenizer::load(folder.path()).unwrap();
    let chat = ChatTemplate::load(folder.path()).unwrap();
    let config: Value = serde_json::from_slice(&files(folder.path())["config.json"]).unwrap();
    for (name, id) in &golden.special {
        assert_eq!(config[format!("{name}_token_id")], *id);
    }
    for Text { text, ids } in &golden.texts {
        assert_eq!(tokenizer.encode(text, true).unwrap(), *ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids), *text);
    }
    for golden in golden.chats {
        let input = ChatInput {
            messages: golden.messages,
            tools: golden.tools,
            add_generation_prompt: golden.add_generation_prompt,
            kwargs: Map::new(),
        };
        let prompt = chat.render(&input).unwrap();
        assert_eq!(prompt, golden.prompt);
        assert_eq!(tokenizer.encode(&prompt, false).unwrap(), golden.ids);
    }
}

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        make_model(folder.path()).unwrap();
        Tokenizer::load(folder.path()).unwrap()
    });
    &TOKENIZER
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_fast_way_and_the_slow_one_agree(
        text in prop_oneof![
            "[ -~\t\r\n\x0b\x0c\x1f\x00]{0,60}",
            "(('s|'t|'re|'ve|'m|'ll|'d|'S| |  |\n|the|The|a1|22|--|<\\|im_end\\|>|<\\|im|Ge|ü|é |\u{a0}|世)){0,30}",
            "(a|b| ){240,300}",
        ]
    ) {
        let tokenizer = tokenizer();
        prop_assert_eq!(tokenizer.encode(&text, true).unwrap(), tokenizer.encode_slowly(&text, true).unwrap());
    }
}

#[test]
fn tool_arguments_may_be_json_text() {
    let folder = tempfile::tempdir().unwrap();
    make_model(folder.path()).unwrap();
    let chat = ChatTemplate::load(folder.path()).unwrap();
    let render = |arguments: Value| {
        let message = serde_json::json!({
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
        });
        chat.render(&ChatInput { messages: vec![message], ..ChatInput::default() })
    };
    let object = serde_json::json!({"b": 1, "a": "ü"});
    let prompt = render(object.clone()).unwrap();
    assert!(prompt.contains(r#""arguments": {"b": 1, "a": "ü"}"#), "{prompt}");
    assert_eq!(render(Value::from(object.to_string())).unwrap(), prompt);
    assert!(render(Value::from("")).unwrap().contains(r#""arguments": {}"#));
    assert!(render(Value::from("{")).unwrap_err().to_string().contains("messages[0].tool_calls"));
}
