//! The store of a single coordinator: one redb file.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::kv::{Change, KvStore, StoreError};

const TABLE: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("ownership");

/// A redb file. Its calls run on Tokio's blocking threads.
#[derive(Clone)]
pub struct Embedded {
    database: Arc<Database>,
}

impl Embedded {
    /// Opens the file, or makes it. One process at a time may have it open.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let with_path = |problem: &dyn std::fmt::Display| StoreError {
            store: "embedded",
            problem: format!("{}: {problem}", path.display()),
        };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| with_path(&error))?;
        }
        let database = Database::create(path).map_err(|error| with_path(&error))?;
        let this = Self { database: Arc::new(database) };
        // Makes the table, so that reading never finds it missing.
        this.change(|_| Ok(())).map_err(|error| with_path(&error.problem))?;
        Ok(this)
    }

    fn change(
        &self,
        change: impl FnOnce(&mut redb::Table<'_, &'static str, &'static [u8]>) -> Result<(), redb::Error>,
    ) -> Result<(), StoreError> {
        let run = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            {
                let mut table = transaction.open_table(TABLE)?;
                change(&mut table)?;
            }
            transaction.commit()?;
            Ok(())
        };
        run().map_err(|error| error_of(&error))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let this = self.clone();
        tokio::task::spawn_blocking(move || work(&this)).await.map_err(|error| error_of(&error))?
    }
}

fn error_of(error: &dyn std::fmt::Display) -> StoreError {
    StoreError { store: "embedded", problem: error.to_string() }
}

impl KvStore for Embedded {
    fn load<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<(String, Bytes)>, StoreError>> {
        let prefix = prefix.to_owned();
        Box::pin(self.blocking(move |this| {
            let run = || -> Result<Vec<(String, Bytes)>, redb::Error> {
                let table = this.database.begin_read()?.open_table(TABLE)?;
                let mut pairs = Vec::new();
                for pair in table.range(prefix.as_str()..)? {
                    let (key, value) = pair?;
                    if !key.value().starts_with(&prefix) {
                        break;
                    }
                    pairs.push((key.value().to_owned(), Bytes::copy_from_slice(value.value())));
                }
                Ok(pairs)
            };
            run().map_err(|error| error_of(&error))
        }))
    }

    fn write(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.blocking(move |this| {
            this.change(|table| {
                for (key, value) in &changes {
                    match value {
                        Some(value) => table.insert(key.as_str(), value.as_ref())?,
                        None => table.remove(key.as_str())?,
                    };
                }
                Ok(())
            })
        }))
    }

    fn delete_prefix<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(), StoreError>> {
        let prefix = prefix.to_owned();
        Box::pin(self.blocking(move |this| {
            this.change(|table| {
                let mut keys = Vec::new();
                for pair in table.range(prefix.as_str()..)? {
                    let key = pair?.0.value().to_owned();
                    if !key.starts_with(&prefix) {
                        break;
                    }
                    keys.push(key);
                }
                for key in keys {
                    table.remove(key.as_str())?;
                }
                Ok(())
            })
        }))
    }
}
