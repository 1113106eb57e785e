//! The store that ownership needs: a sorted map of short keys and small values that outlives the process.

use bytes::Bytes;
use futures::future::BoxFuture;

/// Largest value that a store must take.
pub const MAX_VALUE: usize = 1 << 20;

/// A store that did not do what it was asked. Asking again later may help.
#[derive(Debug, thiserror::Error)]
#[error("{store}: {problem}")]
pub struct StoreError {
    /// Which store.
    pub store: &'static str,
    /// What it said.
    pub problem: String,
}

/// One change. `None` deletes the key.
pub type Change = (String, Option<Bytes>);

/// A store. Each call is complete when it returns: what was written is durable.
pub trait KvStore: Send + Sync {
    /// All pairs whose key begins with the prefix, in order of their keys.
    fn load<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<(String, Bytes)>, StoreError>>;

    /// Makes the changes, in order. After an error a leading part of them may be made.
    fn write(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Deletes every key that begins with the prefix.
    fn delete_prefix<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(), StoreError>>;
}
