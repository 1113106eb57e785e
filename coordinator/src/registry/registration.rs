//! What an agent says about its engine, checked.

use std::net::IpAddr;
use std::sync::Arc;

use baton_coordinator_core::fleet::{EngineInfo, Role};
use baton_coordinator_core::kv_index::{Attention, Group, Slot};
use baton_proto::control::v1;
use baton_proto::{EngineId, Epoch};
use http::Uri;
use http::uri::{Authority, PathAndQuery, Scheme};

/// Most names of one engine's model.
const MAX_MODELS: usize = 64;
/// Most adapters of one engine.
const MAX_ADAPTERS: usize = 1024;
/// Longest name of a model or an adapter, in bytes.
const MAX_NAME: usize = 256;
/// Longest layout, address, URL or version, in bytes.
const MAX_TEXT: usize = 4096;
/// Most tokens in a block.
const MAX_BLOCK_SIZE: u32 = 1 << 16;
/// Most cache groups of an engine.
pub const MAX_GROUPS: usize = 32;

/// A registration that is refused: names the field and the mend.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {problem}")]
pub struct RegistrationError {
    /// Field of the Register message.
    pub field: &'static str,
    /// What is wrong, and what would mend it.
    pub problem: String,
}

/// Where an engine's server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineUrl {
    scheme: Scheme,
    authority: Authority,
    /// Without a slash at its end.
    path: String,
}

impl EngineUrl {
    fn parse(text: &str) -> Result<Self, String> {
        let uri: Uri = text.parse().map_err(|error| format!("{text:?} is no URL ({error})"))?;
        let parts = uri.into_parts();
        let (Some(scheme), Some(authority)) = (parts.scheme, parts.authority) else {
            return Err(format!("{text:?}: write https://host:port"));
        };
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let loopback =
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        if scheme != Scheme::HTTPS && !(scheme == Scheme::HTTP && loopback) {
            return Err(format!("{text:?}: use https; http is accepted on loopback only"));
        }
        let path =
            parts.path_and_query.as_ref().map_or("", PathAndQuery::path).trim_end_matches('/').to_owned();
        Ok(Self { scheme, authority, path })
    }

    /// The URL of a path on the server; `path` begins with a slash.
    pub fn join(&self, path: &str) -> Result<Uri, http::Error> {
        Uri::builder()
            .scheme(self.scheme.clone())
            .authority(self.authority.clone())
            .path_and_query(format!("{}{path}", self.path))
            .build()
    }

    /// Whether the server is spoken to over TLS.
    pub fn is_https(&self) -> bool {
        self.scheme == Scheme::HTTPS
    }
}

/// A checked registration.
#[derive(Clone, Debug)]
pub struct Registration {
    /// As it came.
    pub message: v1::Register,
    /// The engine's name.
    pub engine_id: EngineId,
    /// Its epoch.
    pub epoch: Epoch,
    /// Where its server is.
    pub url: EngineUrl,
    /// Its cache groups, at least one.
    pub groups: Vec<Group>,
    role: Role,
}

impl Registration {
    /// Checks a message. Everything in it is bounded afterwards.
    pub fn check(message: v1::Register) -> Result<Self, RegistrationError> {
        let field = |field, problem: String| RegistrationError { field, problem };
        let engine_id: EngineId = message
            .engine_id
            .parse()
            .map_err(|error: baton_proto::ids::IdError| field("engine_id", error.to_string()))?;
        if message.models.is_empty() || message.models.len() > MAX_MODELS {
            let problem = format!("{} names: give 1 to {MAX_MODELS}", message.models.len());
            return Err(field("models", problem));
        }
        if message.models.iter().any(|name| name.is_empty() || name.len() > MAX_NAME) {
            return Err(field("models", format!("a name has 1 to {MAX_NAME} bytes")));
        }
        if message.adapters.len() > MAX_ADAPTERS {
            let problem = format!("{} names: give at most {MAX_ADAPTERS}", message.adapters.len());
            return Err(field("adapters", problem));
        }
        if message.adapters.iter().any(|name| name.is_empty() || name.len() > MAX_NAME) {
            return Err(field("adapters", format!("a name has 1 to {MAX_NAME} bytes")));
        }
        for (name, text) in [
            ("engine_url", &message.engine_url),
            ("transfer_address", &message.transfer_address),
            ("layout", &message.layout),
            ("version", &message.version),
        ] {
            if text.len() > MAX_TEXT {
                return Err(field(name, format!("{} bytes: at most {MAX_TEXT}", text.len())));
            }
        }
        let url = EngineUrl::parse(&message.engine_url).map_err(|problem| field("engine_url", problem))?;
        if !(1..=MAX_BLOCK_SIZE).contains(&message.block_size) {
            return Err(field("block_size", format!("{}: 1 to {MAX_BLOCK_SIZE} tokens", message.block_size)));
        }
        if message.can_transfer && message.transfer_address.rsplit_once(':').is_none() {
            let problem = format!("{:?}: write host:port", message.transfer_address);
            return Err(field("transfer_address", problem));
        }
        if message.epoch == 0 {
            return Err(field("epoch", "must be at least 1".into()));
        }
        let role = match message.role() {
            v1::Role::Unspecified | v1::Role::Both => Role::Both,
            v1::Role::Prefill => Role::Prefill,
            v1::Role::Decode => Role::Decode,
        };
        let groups = groups(&message).map_err(|problem| field("groups", problem))?;
        Ok(Self { engine_id, epoch: Epoch(message.epoch), url, groups, role, message })
    }

    /// The host of its agent, by the address of its transfers; empty where that names none.
    pub fn host(&self) -> &str {
        self.message.transfer_address.rsplit_once(':').map_or("", |(host, _)| host)
    }

    /// What the decision reads of it.
    pub fn info(&self, slot: Slot) -> Arc<EngineInfo> {
        Arc::new(EngineInfo {
            slot,
            id: self.engine_id.clone(),
            epoch: self.epoch,
            host: self.host().to_owned(),
            // The first names the namespace, also for the adapters.
            models: self.message.models.iter().chain(&self.message.adapters).cloned().collect(),
            role: self.role,
            block_size: self.message.block_size,
            block_bytes: self.message.block_bytes,
            wire_block_bytes: match self.message.wire_block_bytes {
                0 => self.message.block_bytes,
                bytes => bytes,
            },
            num_blocks: self.message.num_blocks,
            layout: self.message.layout.clone(),
            chunk_tokens: self.message.chunk_tokens,
            // Who can hold and pull needs nothing further for it.
            can_pull_cached: true,
        })
    }
}

/// The cache groups as the index counts them.
fn groups(message: &v1::Register) -> Result<Vec<Group>, String> {
    if message.groups.is_empty() {
        return Ok(vec![Group::new(Attention::Full)]);
    }
    if message.groups.len() > MAX_GROUPS {
        return Err(format!("{} groups: at most {MAX_GROUPS}", message.groups.len()));
    }
    let group = |(i, group): (usize, &v1::CacheGroup)| {
        let size = group.block_size;
        if size == 0 || size > MAX_BLOCK_SIZE || !size.is_multiple_of(message.block_size) {
            return Err(format!("block_size {size} of group {i}: a multiple of {}", message.block_size));
        }
        let attention = match group.attention() {
            v1::Attention::Full => Attention::Full,
            v1::Attention::SlidingWindow if group.window > 0 => Attention::window(group.window, size),
            v1::Attention::SlidingWindow => return Err(format!("window of group {i}: at least 1")),
            v1::Attention::State => Attention::State,
            v1::Attention::Unspecified => return Err(format!("attention of group {i}: not known here")),
        };
        Ok(Group { attention, stride: size / message.block_size })
    };
    message.groups.iter().enumerate().map(group).collect()
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub(crate) fn register(id: &str, epoch: u64) -> v1::Register {
        v1::Register {
            engine_id: id.into(),
            epoch,
            models: vec!["m".into()],
            engine_url: "http://127.0.0.1:1".into(),
            transfer_address: "127.0.0.1:2".into(),
            block_size: 16,
            num_blocks: 100,
            block_bytes: 4096,
            wire_block_bytes: 0,
            chunk_tokens: 0,
            role: v1::Role::Both as i32,
            can_transfer: true,
            layout: "l".into(),
            last_event_seq: 0,
            version: "1".into(),
            groups: Vec::new(),
            adapters: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::register;
    use super::*;

    #[test]
    fn engines_of_one_address_share_a_host() {
        let host = |transfer_address: &str| {
            let message = v1::Register { transfer_address: transfer_address.into(), ..register("e0", 1) };
            let message = v1::Register { can_transfer: !transfer_address.is_empty(), ..message };
            Registration::check(message).unwrap().info(Slot(0)).host.clone()
        };
        assert_eq!(
            ["10.0.0.1:2", "10.0.0.1:3", "[::1]:4", ""].map(host),
            ["10.0.0.1", "10.0.0.1", "[::1]", ""]
        );
    }

    #[test]
    fn fields_are_checked_by_name() {
        type Change = fn(&mut v1::Register);
        let group = |attention: v1::Attention, window, block_size| v1::CacheGroup {
            attention: attention.into(),
            window,
            block_size,
        };
        let mut hybrid = register("e0", 1);
        hybrid.groups = vec![
            group(v1::Attention::SlidingWindow, 100, 16),
            group(v1::Attention::Full, 0, 32),
            group(v1::Attention::State, 0, 16),
        ];
        assert_eq!(
            Registration::check(hybrid).unwrap().groups,
            [
                Group::new(Attention::SlidingWindow { blocks: 7 }),
                Group { attention: Attention::Full, stride: 2 },
                Group::new(Attention::State),
            ]
        );
        let cases: [(&str, Change); 15] = [
            ("groups", |message| message.groups = vec![v1::CacheGroup::default(); 33]),
            ("groups", |message| {
                let attention = v1::Attention::Full.into();
                message.groups = vec![v1::CacheGroup { attention, window: 0, block_size: 24 }];
            }),
            ("groups", |message| {
                let attention = v1::Attention::SlidingWindow.into();
                message.groups = vec![v1::CacheGroup { attention, window: 0, block_size: 16 }];
            }),
            ("groups", |message| {
                message.groups = vec![v1::CacheGroup { attention: 9, window: 0, block_size: 16 }];
            }),
            ("engine_id", |message| message.engine_id = "Coordinator".into()),
            ("engine_id", |message| message.engine_id = "coordinator".into()),
            ("models", |message| message.models.clear()),
            ("models", |message| message.models[0] = "x".repeat(257)),
            ("adapters", |message| message.adapters = vec!["a".into(); 1025]),
            ("adapters", |message| message.adapters = vec![String::new()]),
            ("engine_url", |message| message.engine_url = "http://10.0.0.1:8000".into()),
            ("engine_url", |message| message.engine_url = "/v1".into()),
            ("block_size", |message| message.block_size = 0),
            ("transfer_address", |message| message.transfer_address = "nowhere".into()),
            ("epoch", |message| message.epoch = 0),
        ];
        for (field, change) in cases {
            let mut message = register("e0", 1);
            change(&mut message);
            assert_eq!(Registration::check(message).unwrap_err().field, field);
        }
        let plain = Registration::check(register("e0", 1)).unwrap();
        assert_eq!(plain.groups, [Group::new(Attention::Full)]);
    }

    #[test]
    fn urls_keep_their_path_and_plain_http_stays_on_loopback() {
        let join =
            |base: &str| Ok::<_, String>(EngineUrl::parse(base)?.join("/v1/models").unwrap().to_string());
        assert_eq!(join("https://gpu-7:8443/").as_deref(), Ok("https://gpu-7:8443/v1/models"));
        assert_eq!(join("http://[::1]:8000").as_deref(), Ok("http://[::1]:8000/v1/models"));
        assert_eq!(join("http://localhost:1/base").as_deref(), Ok("http://localhost:1/base/v1/models"));
        assert!(join("http://gpu-7:8000").is_err());
    }
}
