//! One model's tokenizer and templates, loaded from its directory as transformers loads them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use baton_proto::ContentKeys;
use serde_json::{Map, Value as Json};
use tokenizers::{AddedToken, Tokenizer};

use super::RenderError;
use super::prefixes::{Known, Prefixes, Tokens};
use super::template::{Chat, ChatTemplates};
use super::words::{Encoder, Words};
use crate::config::ModelConfig;

/// Named special tokens, in transformers' order.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Architectures whose chats vLLM renders in code of its own, not with the chat template.
const OWN_RENDERER: [&str; 9] = [
    "GptOssForCausalLM",
    "KimiK3ForConditionalGeneration",
    "DeepseekV32ForCausalLM",
    "DeepseekV4ForCausalLM",
    "DeepseekV4ForConditionalGeneration",
    "DeepseekV41ForCausalLM",
    "InklingForCausalLM",
    "InklingForConditionalGeneration",
    "MoonshotKimiaForCausalLM",
];

/// A model directory that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("models: {model}: {}: {problem}", .file.display())]
pub struct ModelError {
    /// The model's name.
    model: String,
    /// The file.
    file: PathBuf,
    /// What is wrong.
    problem: String,
}

/// A model's tokenizer.
pub struct Model {
    name: String,
    tokenizer: Tokenizer,
    cache: Option<Cache>,
    /// What the post-processor puts around a text.
    around: (Vec<u32>, Vec<u32>),
    chat: Result<ChatTemplates, &'static str>,
    max_model_len: u64,
}

/// What was tokenised before, for a tokenizer whose texts can be cut.
struct Cache {
    words: Words,
    prefixes: Prefixes,
}

/// A prompt's text, with what is known of it already.
pub struct Text {
    text: String,
    special: bool,
    known: Option<Known>,
}

impl Text {
    /// Bytes that are still to be tokenised.
    pub fn unknown_bytes(&self) -> usize {
        self.text.len() - self.known.as_ref().map_or(0, |known| known.bytes)
    }
}

impl Model {
    /// Loads `tokenizer.json`, `tokenizer_config.json`, `config.json` and the chat templates.
    pub fn load(config: &ModelConfig) -> Result<Self, ModelError> {
        let error = |file: &str, problem: String| ModelError {
            model: config.name.clone(),
            file: config.path.join(file),
            problem,
        };
        let directory = &config.path;
        let mut tokenizer = Tokenizer::from_file(directory.join("tokenizer.json"))
            .map_err(|problem| error("tokenizer.json", problem.to_string()))?;
        let settings =
            json(directory, "tokenizer_config.json").map_err(|e| error("tokenizer_config.json", e))?;
        let mut specials = special_tokens(&settings);
        if specials.is_empty() {
            let map = json(directory, "special_tokens_map.json")
                .map_err(|e| error("special_tokens_map.json", e))?;
            specials = special_tokens(&map);
        }
        adjust(&mut tokenizer, &settings, &specials)
            .map_err(|problem| error("tokenizer_config.json", problem))?;

        let architecture = json(directory, "config.json").map_err(|e| error("config.json", e))?;
        let chat = match own_renderer(&architecture) || directory.join("tekken.json").exists() {
            true => Err("unsupported_model"),
            false => {
                let templates =
                    templates(directory, &settings).map_err(|(file, problem)| error(&file, problem))?;
                match templates.is_empty() {
                    true => Err("no_chat_template"),
                    false => Ok(ChatTemplates::new(templates, specials)
                        .map_err(|problem| error("chat_template.jinja", problem.to_string()))?),
                }
            }
        };
        let around = around(&tokenizer);
        Ok(Self {
            name: config.name.clone(),
            cache: around
                .is_some()
                .then(|| Words::for_tokenizer(&tokenizer))
                .flatten()
                .map(|words| Cache { words, prefixes: Prefixes::default() }),
            around: around.unwrap_or_default(),
            tokenizer,
            chat,
            max_model_len: max_model_len(&architecture, &settings),
        })
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The longest context, as the model's own configuration has it; 0 where it does not say.
    pub fn max_model_len(&self) -> u64 {
        self.max_model_len
    }

    /// Whether chats can be rendered; else why not.
    pub fn can_chat(&self) -> Result<(), &'static str> {
        self.chat.as_ref().map(|_| ()).map_err(|why| *why)
    }

    /// Whether words are tokenised from a cache, some ten times as fast.
    pub fn caches_words(&self) -> bool {
        self.cache.is_some()
    }

    /// Token ids of a text.
    pub fn encode(&self, text: String, add_special_tokens: bool) -> Result<Vec<u32>, RenderError> {
        let text = self.find(text, add_special_tokens, &ContentKeys::default());
        Ok(self.complete(text)?.to_vec())
    }

    /// Looks up how much of a text is known under these keys.
    pub fn find(&self, text: String, add_special_tokens: bool, keys: &ContentKeys) -> Text {
        let known = self.cache.as_ref().map(|cache| cache.prefixes.find(&text, keys, add_special_tokens));
        Text { text, special: add_special_tokens, known }
    }

    /// Tokenises what is not known of a text.
    pub fn complete(&self, text: Text) -> Result<Tokens, RenderError> {
        let Text { text, special, known } = text;
        let (Some(cache), Some(known)) = (&self.cache, known) else {
            return encode(&self.tokenizer, &text, special).map(Tokens::from);
        };
        let tokens =
            cache.prefixes.complete(&text, known, |part| cache.words.encode(part, &self.tokenizer))?;
        Ok(if special { tokens.surround(&self.around.0, &self.around.1) } else { tokens })
    }

    /// The text that a chat becomes.
    pub fn render(&self, chat: Chat) -> Result<String, RenderError> {
        self.chat.as_ref().map_err(|why| RenderError::Unknown(why))?.render(chat)
    }

    /// The tokens' own texts.
    pub fn token_texts(&self, ids: &[u32]) -> Vec<Option<String>> {
        ids.iter().map(|id| self.tokenizer.id_to_token(*id)).collect()
    }
}

fn encode(tokenizer: &Tokenizer, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, RenderError> {
    tokenizer
        .encode_fast(text, add_special_tokens)
        .map(|encoding| encoding.get_ids().to_vec())
        .map_err(|_| RenderError::Unknown("tokenizer_failed"))
}

impl Encoder<RenderError> for Tokenizer {
    fn ids(&self, text: &str) -> Result<Vec<u32>, RenderError> {
        encode(self, text, false)
    }

    fn ids_and_starts(&self, text: &str) -> Result<Vec<(u32, usize)>, RenderError> {
        let encoding = self.encode(text, false).map_err(|_| RenderError::Unknown("tokenizer_failed"))?;
        let (ids, offsets) = (encoding.get_ids(), encoding.get_offsets());
        Ok(ids.iter().zip(offsets).map(|(id, offsets)| (*id, offsets.0)).collect())
    }
}

/// What the post-processor puts around a text, read off a sample; `None` where it does more than that.
fn around(tokenizer: &Tokenizer) -> Option<(Vec<u32>, Vec<u32>)> {
    let sample = "sample";
    let plain = encode(tokenizer, sample, false).ok()?;
    let with = encode(tokenizer, sample, true).ok()?;
    let extra = with.len().checked_sub(plain.len())?;
    let start = (0..=extra).find(|start| with[*start..start + plain.len()] == plain)?;
    let around = (with[..start].to_vec(), with[start + plain.len()..].to_vec());
    let empty = encode(tokenizer, "", true).ok()?;
    (empty == [&around.0[..], &around.1].concat()).then_some(around)
}

/// An optional file's JSON object.
fn json(directory: &Path, file: &str) -> Result<Map<String, Json>, String> {
    match std::fs::read(directory.join(file)) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| error.to_string()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(error) => Err(error.to_string()),
    }
}

/// A token's text: plain, or an object with its content.
fn token_text(token: &Json) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

fn special_tokens(settings: &Map<String, Json>) -> Vec<(String, String)> {
    let token = |name: &&str| Some(((*name).to_owned(), token_text(settings.get(*name)?)?.to_owned()));
    let mut tokens: Vec<(String, String)> = SPECIAL_TOKENS.iter().filter_map(token).collect();
    // A model may name tokens of its own: image_token and the like.
    let own = settings
        .iter()
        .filter(|(name, _)| name.ends_with("_token") && !SPECIAL_TOKENS.contains(&name.as_str()));
    tokens.extend(own.filter_map(|(name, token)| Some((name.clone(), token.as_str()?.to_owned()))));
    if let Some(Json::Object(named)) = settings.get("extra_special_tokens") {
        tokens.extend(
            named.iter().filter_map(|(name, token)| Some((name.clone(), token_text(token)?.to_owned()))),
        );
    }
    tokens
}

/// Applies to `tokenizer.json` what transformers applies after loading it.
fn adjust(
    tokenizer: &mut Tokenizer,
    settings: &Map<String, Json>,
    specials: &[(String, String)],
) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| text(&error))?;

    let known: Vec<String> =
        tokenizer.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
    let mut added = Vec::new();
    if let Some(Json::Object(decoder)) = settings.get("added_tokens_decoder") {
        let mut tokens: Vec<(u64, &Json)> =
            decoder.iter().filter_map(|(id, token)| Some((id.parse().ok()?, token))).collect();
        tokens.sort_by_key(|(id, _)| *id);
        added.extend(tokens.into_iter().filter_map(|(_, token)| added_token(token)));
    }
    added.extend(specials.iter().map(|(_, token)| AddedToken::from(token.as_str(), true).normalized(false)));
    for name in ["extra_special_tokens", "additional_special_tokens"] {
        if let Some(Json::Array(tokens)) = settings.get(name) {
            let token = |token: &Json| Some(AddedToken::from(token_text(token)?, true).normalized(false));
            added.extend(tokens.iter().filter_map(token));
        }
    }
    for token in added {
        if !known.contains(&token.content) {
            tokenizer.add_tokens([token]).map_err(|error| text(&error))?;
        }
    }

    Ok(())
}

fn added_token(token: &Json) -> Option<AddedToken> {
    let flag = |name: &str, default: bool| token.get(name).and_then(Json::as_bool).unwrap_or(default);
    let special = flag("special", false);
    Some(
        AddedToken::from(token_text(token)?, special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special)),
    )
}

fn own_renderer(architecture: &Map<String, Json>) -> bool {
    let named = architecture.get("architectures").and_then(Json::as_array).into_iter().flatten();
    named.filter_map(Json::as_str).any(|name| OWN_RENDERER.contains(&name))
        || architecture.get("is_encoder_decoder") == Some(&Json::Bool(true))
}

/// The templates by name: files first, as transformers has it, then the tokenizer's settings.
fn templates(
    directory: &Path,
    settings: &Map<String, Json>,
) -> Result<BTreeMap<String, String>, (String, String)> {
    let mut templates = BTreeMap::new();
    let read = |file: &str| match std::fs::read_to_string(directory.join(file)) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err((file.to_owned(), error.to_string())),
    };
    if let Some(template) = read("chat_template.jinja")? {
        templates.insert("default".to_owned(), template);
    }
    for name in ["tool_use", "rag"] {
        if let Some(template) = read(&format!("additional_chat_templates/{name}.jinja"))? {
            templates.insert(name.to_owned(), template);
        }
    }
    if !templates.is_empty() {
        return Ok(templates);
    }
    match settings.get("chat_template") {
        Some(Json::String(template)) => {
            templates.insert("default".to_owned(), template.clone());
        }
        Some(Json::Array(named)) => {
            for entry in named {
                if let (Some(name), Some(template)) = (entry["name"].as_str(), entry["template"].as_str()) {
                    templates.insert(name.to_owned(), template.to_owned());
                }
            }
        }
        _ => {}
    }
    Ok(templates)
}

/// As vLLM derives it from the configuration's lengths, without its flags.
fn max_model_len(architecture: &Map<String, Json>, settings: &Map<String, Json>) -> u64 {
    let inner = architecture.get("text_config").and_then(Json::as_object).unwrap_or(architecture);
    let of = |name: &str| inner.get(name).and_then(Json::as_u64);
    let from_model =
        ["max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length"]
            .iter()
            .filter_map(|name| of(name))
            .min();
    // Where no length is known transformers writes a huge number.
    let from_tokenizer = settings.get("model_max_length").and_then(Json::as_u64).filter(|n| *n < 1 << 32);
    match (from_model, from_tokenizer) {
        (Some(model), Some(tokenizer)) => model.min(tokenizer),
        (model, tokenizer) => model.or(tokenizer).unwrap_or(0),
    }
}
