//! A server under load: what it serves, and how it is reached.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use baton_fleet::Client;
use serde_json::{Value, json};

use crate::demo::workload::WORDS;

/// How long a question about the server itself may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A header that all requests carry.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) name: String,
    pub(super) value: String,
}

impl FromStr for Header {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let problem = || format!("`{text}` is no header like name:value");
        let (name, value) = text.split_once(':').ok_or_else(problem)?;
        let value = value.trim();
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if name.is_empty() || !name.bytes().all(is_name) || value.chars().any(char::is_control) {
            return Err(problem());
        }
        Ok(Self { name: name.to_owned(), value: value.to_owned() })
    }
}

/// A server, and the model that it is asked for.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    pub(super) client: Client,
    pub(super) headers: Vec<Header>,
    pub(super) model: String,
    /// Most tokens of prompt and answer, where the server says.
    pub(super) longest: Option<u64>,
    /// Whether it gets OpenAI's own parameters only.
    pub(super) plain: bool,
}

impl Endpoint {
    /// Asks a server for its models. Where the model is given, a server that does not list models will do.
    pub(super) async fn reach(
        url: &str,
        model: Option<&str>,
        headers: Vec<Header>,
        timeout: Duration,
        plain: bool,
    ) -> anyhow::Result<Self> {
        let client = Client::new(url)?;
        let listed = async {
            let reply = client.clone().deadline(PATIENCE).get("/v1/models").await?.ok()?.json()?;
            Ok::<Value, baton_fleet::http::HttpError>(reply)
        };
        let listed = match (listed.await, model) {
            (Ok(listed), _) => listed,
            (Err(_), Some(_)) => Value::Null,
            (Err(error), None) => {
                return Err(
                    anyhow::Error::new(error).context("which models are there? Name one with --model")
                );
            }
        };
        let models = listed["data"].as_array().map(Vec::as_slice).unwrap_or_default();
        let found = match model {
            Some(name) => models.iter().find(|listed| listed["id"] == name),
            None => models.first(),
        };
        let named = found.and_then(|found| found["id"].as_str());
        let model = model.or(named).context("it names no model: name one with --model")?.to_owned();
        let longest = found.and_then(|found| found["max_model_len"].as_u64());
        Ok(Self { client: client.deadline(timeout), headers, model, longest, plain })
    }

    /// Token ids of common words: none of them is special, all are in the vocabulary.
    pub(super) async fn common_tokens(&self) -> anyhow::Result<Vec<u32>> {
        let body = json!({"model": self.model, "prompt": WORDS, "add_special_tokens": false});
        let client = self.client.clone().deadline(PATIENCE);
        let reply = client.post("/tokenize", &body, &self.header_pairs()).await?.ok()?.json()?;
        let tokens = reply["tokens"].as_array().context("/tokenize: no tokens")?;
        let id = |token: &Value| token.as_u64().and_then(|id| u32::try_from(id).ok());
        let tokens: Vec<u32> = tokens.iter().filter_map(id).collect();
        ensure!(!tokens.is_empty(), "/tokenize: no tokens");
        Ok(tokens)
    }

    /// Its headers as the client takes them.
    pub(super) fn header_pairs(&self) -> Vec<(&str, &str)> {
        self.headers.iter().map(|header| (header.name.as_str(), header.value.as_str())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_checked_before_anything_is_sent() {
        let header: Header = "x-baton-policy: colocated".parse().unwrap();
        assert_eq!((header.name.as_str(), header.value.as_str()), ("x-baton-policy", "colocated"));
        for bad in ["", "x-baton-policy", ":x", "a b:c", "a:b\nc"] {
            assert!(bad.parse::<Header>().is_err(), "{bad:?}");
        }
    }
}
