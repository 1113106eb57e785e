//! Identifiers. Each is a type of its own, so that none can stand where another belongs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An identifier that does not have its form.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdError {
    /// Not a DNS label.
    #[error(
        "engine id {0:?}: use 1 to 63 lower-case letters, digits and inner hyphens (it is a DNS name in the engine's certificate)"
    )]
    Engine(String),
    /// A name of [`RESERVED_NAMES`].
    #[error("engine id {0:?} is reserved: use another")]
    Reserved(String),
    /// Not 32 hexadecimal digits.
    #[error("transfer id {0:?}: expected 32 hexadecimal digits")]
    Transfer(String),
}

/// Names in certificates that no engine may have: the coordinator's and the operators' own.
pub const RESERVED_NAMES: [&str; 2] = ["coordinator", "operator"];

/// Name of one engine, unique in the fleet: a DNS label of 1 to 63 bytes, since the certificates of its agent
/// carry it as a DNS name. None of [`RESERVED_NAMES`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EngineId(String);

impl EngineId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for EngineId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let label = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let ok = (1..=63).contains(&text.len())
            && text.bytes().all(label)
            && !text.starts_with('-')
            && !text.ends_with('-');
        if RESERVED_NAMES.contains(&text) {
            return Err(IdError::Reserved(text.to_owned()));
        }
        if ok { Ok(Self(text.to_owned())) } else { Err(IdError::Engine(text.to_owned())) }
    }
}

impl TryFrom<String> for EngineId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<EngineId> for String {
    fn from(id: EngineId) -> Self {
        id.0
    }
}

impl fmt::Display for EngineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One life of an engine together with its agent. It grows whenever either restarts; holds, ownership and
/// transfers of a smaller epoch are void.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names one handoff from its hold to its release. Random, 128 bits; 32 hexadecimal digits as text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TransferId([u8; 16]);

impl TransferId {
    /// The id that consists of these bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TransferId({self})")
    }
}

impl FromStr for TransferId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let plain = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match u128::from_str_radix(text, 16) {
            Ok(value) if plain => Ok(Self(value.to_be_bytes())),
            _ => Err(IdError::Transfer(text.to_owned())),
        }
    }
}

impl TryFrom<String> for TransferId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<TransferId> for String {
    fn from(id: TransferId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engine_ids_are_dns_labels() {
        for good in ["a", "gpu-7", "0", &"x".repeat(63)] {
            assert_eq!(good.parse::<EngineId>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "ä", &"x".repeat(64)] {
            assert_eq!(bad.parse::<EngineId>(), Err(IdError::Engine(bad.to_owned())));
        }
    }

    #[test]
    fn no_engine_takes_the_coordinators_name() {
        assert_eq!("coordinator".parse::<EngineId>(), Err(IdError::Reserved("coordinator".into())));
    }

    #[test]
    fn transfer_ids_are_32_hexadecimal_digits() {
        let text = "00ff00000000000000000000000000a1";
        assert_eq!(text.parse::<TransferId>().unwrap().to_string(), text);
        for bad in ["", "0", "+0ff00000000000000000000000000a1", "zz", &"0".repeat(33)] {
            assert!(bad.parse::<TransferId>().is_err());
        }
    }
}
