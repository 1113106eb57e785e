//! Makes a model folder: a tokenizer trained on generated text, a chat template and the configuration files that Hugging Face
//! and vLLM read. There are no weights. The same bytes come out every time.

mod corpus;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// Tokens of the vocabulary, special ones included.
const VOCABULARY: usize = 4096;
/// Tokens that the model's context holds.
const CONTEXT: usize = 131_072;
/// Output tokens of a chat where the client does not say: the mock hardly ever ends by itself.
const DEFAULT_OUTPUT: usize = 128;

const PAD: &str = "<|endoftext|>";
const BEGIN: &str = "<|im_start|>";
const END: &str = "<|im_end|>";

const CHAT_TEMPLATE: &str = include_str!("chat_template.jinja");

/// The model cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MakeModelError {
    /// A file cannot be written.
    #[error("{}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The tokenizer cannot be trained.
    #[error("cannot train the tokenizer: {0}")]
    Train(#[from] tokenizers::Error),
}

/// Writes the model's files into `folder`, which is made if need be.
pub fn make_model(folder: &Path) -> Result<(), MakeModelError> {
    let failed = |path: &Path, source| MakeModelError::Write { path: path.to_owned(), source };
    std::fs::create_dir_all(folder).map_err(|source| failed(folder, source))?;
    let tokenizer = train()?;
    let vocabulary = tokenizer.get_vocab_size(true);
    let id = |token| tokenizer.token_to_id(token).expect("special tokens are in the vocabulary");
    let (pad, begin, end) = (id(PAD), id(BEGIN), id(END));

    let special = |content: &str| {
        json!({
            "content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false,
            "special": true,
        })
    };
    let tokenizer_config = json!({
        "add_bos_token": false,
        "add_prefix_space": false,
        "added_tokens_decoder": {
            pad.to_string(): special(PAD), begin.to_string(): special(BEGIN), end.to_string(): special(END),
        },
        "bos_token": BEGIN,
        "clean_up_tokenization_spaces": false,
        "eos_token": END,
        "model_max_length": CONTEXT,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": PAD,
    });
    let special_tokens = json!({"bos_token": BEGIN, "eos_token": END, "pad_token": PAD, "unk_token": PAD});
    let generation_config = json!({
        "bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad, "max_new_tokens": DEFAULT_OUTPUT,
    });
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": begin,
        "eos_token_id": end,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.2,
        "intermediate_size": 256,
        "max_position_embeddings": CONTEXT,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "pad_token_id": pad,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": true,
        "torch_dtype": "float32",
        "use_cache": true,
        "vocab_size": vocabulary,
    });
    let text = |value: &Value| serde_json::to_string_pretty(value).expect("JSON has a text") + "\n";
    for (name, contents) in [
        ("tokenizer.json", tokenizer.to_string(true)?),
        ("tokenizer_config.json", text(&tokenizer_config)),
        ("special_tokens_map.json", text(&special_tokens)),
        ("generation_config.json", text(&generation_config)),
        ("config.json", text(&config)),
        ("chat_template.jinja", CHAT_TEMPLATE.to_owned()),
    ] {
        let path = folder.join(name);
        // Under its last name a file is always whole: engines may be reading it.
        let partial = folder.join(format!(".{name}.{}", std::process::id()));
        std::fs::write(&partial, contents)
            .and_then(|()| std::fs::rename(&partial, &path))
            .map_err(|source| failed(&path, source))?;
    }
    Ok(())
}

fn train() -> Result<Tokenizer, tokenizers::Error> {
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_post_processor(Some(ByteLevel::new(false, false, true)));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    let trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(VOCABULARY)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens([PAD, BEGIN, END].map(|token| AddedToken::from(token, true)).to_vec())
        .build();
    tokenizer.train(&mut TrainerWrapper::from(trainer), corpus::documents().into_iter())?;
    Ok(tokenizer)
}
