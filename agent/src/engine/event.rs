//! KV events as engines publish them.
//!
//! A batch is a msgpack array `[ts, [event…], data_parallel_rank]`. vLLM 0.32 writes an event as a map whose `type`
//! names it and leaves out fields at their defaults; older versions write an array whose first element names
//! it, the fields behind it in the order of their declaration. Both are read; unknown fields and unknown kinds
//! of events are passed over.

use std::fmt;

use serde::de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Deserializer};

/// Largest batch that is read. A step of 1M tokens makes one of about 10 MiB.
pub const MAX_BATCH: usize = 64 << 20;

/// An engine's own hash of a block, cut to 128 bits. Only ever compared with hashes of the same engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EngineHash(pub u128);

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub enum KvEvent {
    /// Blocks entered a cache.
    Stored(Stored),
    /// Blocks left a cache.
    Removed(Removed),
    /// Nothing is cached any more.
    Cleared,
    /// A kind of event that this build does not know.
    Unknown,
}

/// Blocks that entered a cache, in the order of their tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stored {
    /// One for each block.
    pub hashes: Vec<EngineHash>,
    /// The block before the first; `None` at the start of a prompt.
    pub parent: Option<EngineHash>,
    /// Tokens of all blocks, end to end.
    pub token_ids: Vec<u32>,
    /// Tokens in each block.
    pub block_size: u32,
    /// Number of the LoRA adapter in this engine.
    pub lora_id: Option<i64>,
    /// Name of the LoRA adapter.
    pub lora_name: Option<String>,
    /// Tier, as the engine names it; `None`: its GPU.
    pub medium: Option<String>,
    /// For each block, what its hash covers besides its tokens.
    pub extra_keys: Option<Vec<Option<Vec<ExtraValue>>>>,
    /// Which group of layers the blocks belong to.
    pub group_idx: Option<i64>,
    /// Kind of attention of that group.
    pub spec_kind: Option<String>,
    /// Tokens that its layers look back at, the token itself included, where that is bounded.
    pub sliding_window: Option<u32>,
    /// `REMOTE` where another engine's cache is meant.
    pub locality: Option<String>,
}

/// Blocks that left a cache.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Removed {
    /// The blocks.
    pub hashes: Vec<EngineHash>,
    /// As in [`Stored`].
    pub medium: Option<String>,
    /// As in [`Stored`].
    pub group_idx: Option<i64>,
    /// As in [`Stored`].
    pub locality: Option<String>,
}

/// An untagged extra key of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtraValue {
    /// LoRA name or cache salt.
    Text(String),
    /// Multimodal item and where it starts, in tokens from the block's start.
    Item(String, i64),
    /// Digest of prompt embeddings.
    Bytes(Vec<u8>),
    /// Something else.
    Unknown,
}

/// A batch that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// Larger than [`MAX_BATCH`].
    #[error("event batch of {0} bytes, at most {MAX_BATCH} are read")]
    TooLarge(usize),
    /// Not what the module's head describes.
    #[error("event batch: {0}")]
    Malformed(#[from] rmp_serde::decode::Error),
}

/// Reads a batch's events.
pub fn read_batch(payload: &[u8]) -> Result<Vec<KvEvent>, BatchError> {
    if payload.len() > MAX_BATCH {
        return Err(BatchError::TooLarge(payload.len()));
    }
    let Batch(events) = rmp_serde::from_slice(payload)?;
    Ok(events)
}

struct Batch(Vec<KvEvent>);

impl<'de> Deserialize<'de> for Batch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Batch;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("[time, events, data-parallel rank]")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Batch, A::Error> {
                seq.next_element::<IgnoredAny>()?.ok_or_else(|| A::Error::custom("no time"))?;
                let events = seq.next_element()?.ok_or_else(|| A::Error::custom("no events"))?;
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Batch(events))
            }
        }
        deserializer.deserialize_seq(Fields)
    }
}

/// All fields of all events; in a map each may be missing.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Raw {
    r#type: String,
    block_hashes: Vec<EngineHash>,
    parent_block_hash: Option<EngineHash>,
    token_ids: Vec<u32>,
    block_size: u32,
    lora_id: Option<i64>,
    medium: Option<String>,
    lora_name: Option<String>,
    extra_keys: Option<Vec<Option<Vec<ExtraValue>>>>,
    group_idx: Option<i64>,
    kv_cache_spec_kind: Option<String>,
    kv_cache_spec_sliding_window: Option<Element>,
    locality: Option<String>,
}

impl From<Raw> for KvEvent {
    fn from(raw: Raw) -> Self {
        match raw.r#type.as_str() {
            STORED => Self::Stored(Stored {
                hashes: raw.block_hashes,
                parent: raw.parent_block_hash,
                token_ids: raw.token_ids,
                block_size: raw.block_size,
                lora_id: raw.lora_id,
                lora_name: raw.lora_name,
                medium: raw.medium,
                extra_keys: raw.extra_keys,
                group_idx: raw.group_idx,
                spec_kind: raw.kv_cache_spec_kind,
                sliding_window: match raw.kv_cache_spec_sliding_window {
                    Some(Element::Int(tokens)) => tokens.try_into().ok(),
                    _ => None,
                },
                locality: raw.locality,
            }),
            REMOVED => Self::Removed(Removed {
                hashes: raw.block_hashes,
                medium: raw.medium,
                group_idx: raw.group_idx,
                locality: raw.locality,
            }),
            CLEARED => Self::Cleared,
            _ => Self::Unknown,
        }
    }
}

const STORED: &str = "BlockStored";
const REMOVED: &str = "BlockRemoved";
const CLEARED: &str = "AllBlocksCleared";

impl<'de> Deserialize<'de> for KvEvent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = KvEvent;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an event as a map, or as an array that begins with its kind")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<KvEvent, A::Error> {
                Raw::deserialize(MapAccessDeserializer::new(map)).map(KvEvent::from)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<KvEvent, A::Error> {
                let kind: String = seq.next_element()?.ok_or_else(|| A::Error::custom("no kind"))?;
                let mut raw = Raw { r#type: kind, ..Raw::default() };
                match raw.r#type.as_str() {
                    STORED => {
                        required(&mut seq, &mut raw.block_hashes, "block_hashes")?;
                        required(&mut seq, &mut raw.parent_block_hash, "parent_block_hash")?;
                        required(&mut seq, &mut raw.token_ids, "token_ids")?;
                        required(&mut seq, &mut raw.block_size, "block_size")?;
                        optional(&mut seq, &mut raw.lora_id)?;
                        optional(&mut seq, &mut raw.medium)?;
                        optional(&mut seq, &mut raw.lora_name)?;
                        optional(&mut seq, &mut raw.extra_keys)?;
                        optional(&mut seq, &mut raw.group_idx)?;
                        optional(&mut seq, &mut raw.kv_cache_spec_kind)?;
                        optional(&mut seq, &mut raw.kv_cache_spec_sliding_window)?;
                    }
                    REMOVED => {
                        required(&mut seq, &mut raw.block_hashes, "block_hashes")?;
                        optional(&mut seq, &mut raw.medium)?;
                        optional(&mut seq, &mut raw.group_idx)?;
                    }
                    _ => {}
                }
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(raw.into())
            }
        }
        deserializer.deserialize_any(Either)
    }
}

fn required<'de, A: SeqAccess<'de>, T: Deserialize<'de>>(
    seq: &mut A,
    field: &mut T,
    name: &'static str,
) -> Result<(), A::Error> {
    *field = seq.next_element()?.ok_or_else(|| A::Error::missing_field(name))?;
    Ok(())
}

fn optional<'de, A: SeqAccess<'de>, T: Deserialize<'de>>(
    seq: &mut A,
    field: &mut Option<T>,
) -> Result<(), A::Error> {
    *field = seq.next_element::<Option<T>>()?.flatten();
    Ok(())
}

impl<'de> Deserialize<'de> for EngineHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BytesOrInt;
        impl Visitor<'_> for BytesOrInt {
            type Value = EngineHash;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a block hash: bytes or an integer")
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<EngineHash, E> {
                let mut hash = [0; 16];
                let n = bytes.len().min(hash.len());
                hash[..n].copy_from_slice(&bytes[..n]);
                Ok(EngineHash(u128::from_be_bytes(hash)))
            }
            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<EngineHash, E> {
                Ok(EngineHash(value.into()))
            }
            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<EngineHash, E> {
                Ok(EngineHash((value as u64).into()))
            }
        }
        deserializer.deserialize_any(BytesOrInt)
    }
}

impl<'de> Deserialize<'de> for ExtraValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = ExtraValue;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an extra key")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ExtraValue, E> {
                Ok(ExtraValue::Text(text.to_owned()))
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<ExtraValue, E> {
                Ok(ExtraValue::Bytes(bytes.to_owned()))
            }
            fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<ExtraValue, E> {
                Ok(ExtraValue::Unknown)
            }
            fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<ExtraValue, E> {
                Ok(ExtraValue::Unknown)
            }
            fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<ExtraValue, E> {
                Ok(ExtraValue::Unknown)
            }
            fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<ExtraValue, E> {
                Ok(ExtraValue::Unknown)
            }
            fn visit_unit<E: serde::de::Error>(self) -> Result<ExtraValue, E> {
                Ok(ExtraValue::Unknown)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ExtraValue, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(ExtraValue::Unknown)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<ExtraValue, A::Error> {
                let identifier = seq.next_element::<Element>()?;
                let offset = seq.next_element::<Element>()?;
                let mut more = false;
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    more = true;
                }
                Ok(match (identifier, offset, more) {
                    (Some(Element::Text(identifier)), Some(Element::Int(offset)), false) => {
                        ExtraValue::Item(identifier, offset)
                    }
                    _ => ExtraValue::Unknown,
                })
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// An element of a nested extra key, and a field of which not every version is known.
#[derive(Deserialize)]
#[serde(untagged)]
enum Element {
    Text(String),
    Int(i64),
    Other(IgnoredAny),
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pack(value: &impl serde::Serialize) -> Vec<u8> {
        rmp_serde::to_vec_named(value).unwrap()
    }

    #[test]
    fn maps_with_fields_left_out() {
        let payload = pack(&json!([1.5, [
            {"type": "BlockStored", "block_hashes": [1, 2], "parent_block_hash": null, "token_ids": [5, 6, 7, 8],
             "block_size": 2, "lora_id": null, "medium": "GPU", "lora_name": null, "session_id": "s", "new_field": {"a": [1]}},
            {"type": "BlockRemoved", "block_hashes": [-1], "medium": "CPU", "group_idx": 1},
            {"type": "AllBlocksCleared"},
            {"type": "BlockMoved", "from": 1},
        ], 0]));
        let events = read_batch(&payload).unwrap();
        assert_eq!(
            events[0],
            KvEvent::Stored(Stored {
                hashes: vec![EngineHash(1), EngineHash(2)],
                token_ids: vec![5, 6, 7, 8],
                block_size: 2,
                medium: Some("GPU".into()),
                ..Stored::default()
            })
        );
        assert_eq!(
            events[1],
            KvEvent::Removed(Removed {
                hashes: vec![EngineHash(u64::MAX.into())],
                medium: Some("CPU".into()),
                group_idx: Some(1),
                locality: None,
            })
        );
        assert_eq!(events[2..], [KvEvent::Cleared, KvEvent::Unknown]);
    }

    #[test]
    fn arrays_of_older_versions_with_fewer_and_more_fields() {
        let payload = pack(&json!([
            1.5,
            [
                ["BlockStored", [9], 8, [5, 6], 2, null],
                [
                    "BlockStored",
                    [9],
                    null,
                    [5, 6],
                    2,
                    3,
                    "CPU",
                    "adapter",
                    [["adapter", ["img", -3]], null],
                    1,
                    "mamba",
                    128,
                    "x",
                    "y"
                ],
                ["BlockRemoved", [9]],
                ["BlockRemoved", [9], "GPU", 2, "x"],
                ["AllBlocksCleared"],
                ["Other", 1, 2],
            ]
        ]));
        let events = read_batch(&payload).unwrap();
        let plain = Stored {
            hashes: vec![EngineHash(9)],
            parent: Some(EngineHash(8)),
            token_ids: vec![5, 6],
            block_size: 2,
            ..Stored::default()
        };
        assert_eq!(events[0], KvEvent::Stored(plain.clone()));
        assert_eq!(
            events[1],
            KvEvent::Stored(Stored {
                parent: None,
                lora_id: Some(3),
                lora_name: Some("adapter".into()),
                medium: Some("CPU".into()),
                extra_keys: Some(vec![
                    Some(vec![ExtraValue::Text("adapter".into()), ExtraValue::Item("img".into(), -3)]),
                    None
                ]),
                group_idx: Some(1),
                spec_kind: Some("mamba".into()),
                sliding_window: Some(128),
                ..plain
            })
        );
        let removed = Removed { hashes: vec![EngineHash(9)], ..Removed::default() };
        assert_eq!(events[2], KvEvent::Removed(removed.clone()));
        assert_eq!(
            events[3],
            KvEvent::Removed(Removed { medium: Some("GPU".into()), group_idx: Some(2), ..removed })
        );
        assert_eq!(events[4..], [KvEvent::Cleared, KvEvent::Unknown]);
    }

    #[test]
    fn hashes_and_digests_may_be_bytes() {
        // {"type": "BlockStored", "block_hashes": [bin], "extra_keys": [[bin, nil, [1, 2, 3]]]}
        let mut payload = vec![0x92, 0xc0, 0x91, 0x83];
        payload.extend(pack(&"type"));
        payload.extend(pack(&"BlockStored"));
        payload.extend(pack(&"block_hashes"));
        payload.extend([0x91, 0xc4, 32]);
        payload.extend(1..=32u8);
        payload.extend(pack(&"extra_keys"));
        payload.extend([0x91, 0x93, 0xc4, 2, 0xaa, 0xbb, 0xc0, 0x93, 1, 2, 3]);
        let events = read_batch(&payload).unwrap();
        let KvEvent::Stored(stored) = &events[0] else { panic!("{events:?}") };
        assert_eq!(stored.hashes, [EngineHash(0x0102030405060708090a0b0c0d0e0f10)]);
        assert_eq!(
            stored.extra_keys,
            Some(vec![Some(vec![
                ExtraValue::Bytes(vec![0xaa, 0xbb]),
                ExtraValue::Unknown,
                ExtraValue::Unknown
            ])])
        );
    }

    #[test]
    fn what_is_no_batch_is_an_error() {
        for bad in [
            json!(null),
            json!([]),
            json!([1.0]),
            json!([1.0, {"a": 1}]),
            json!([1.0, [["BlockStored", [1]]]]),
            json!([1.0, [{"type": "BlockStored", "token_ids": ["x"]}]]),
            json!([1.0, [3]]),
        ] {
            assert!(matches!(read_batch(&pack(&bad)), Err(BatchError::Malformed(_))), "{bad}");
        }
        assert!(matches!(read_batch(&vec![0; MAX_BATCH + 1]), Err(BatchError::TooLarge(_))));
        // An array that claims four billion elements and ends.
        assert!(read_batch(&[0x92, 0xc0, 0xdd, 0xff, 0xff, 0xff, 0xff]).is_err());
    }
}
