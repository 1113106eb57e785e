//! The store of a fleet: etcd.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use etcd_client::{
    Certificate, Client, ConnectOptions, DeleteOptions, GetOptions, Identity, SortOrder, SortTarget,
    TlsOptions, Txn, TxnOp,
};
use futures::future::BoxFuture;

use super::kv::{Change, KvStore, StoreError};
use crate::config::TlsConfig;

/// etcd takes 128 operations in a transaction by default.
const MAX_OPERATIONS: usize = 100;
/// etcd takes 1.5 MiB in a request by default.
const MAX_REQUEST: usize = 1 << 20;
/// Keys of one range request: with values of at most a few KiB each an answer stays in the megabytes.
const PAGE: i64 = 256;
/// A call that takes longer failed.
const TIMEOUT: Duration = Duration::from_secs(5);

/// An etcd cluster.
#[derive(Clone)]
pub struct Etcd {
    client: Arc<Client>,
}

impl Etcd {
    /// Connects and asks once, so that a cluster that does not answer is found out here. https members must show
    /// a certificate of the fleet's CA, and are shown the coordinator's.
    pub async fn connect(urls: &[String], tls: &TlsConfig) -> Result<Self, StoreError> {
        let mut options = ConnectOptions::new().with_timeout(TIMEOUT).with_connect_timeout(TIMEOUT);
        if urls.iter().any(|url| url.starts_with("https://")) {
            let read = |path: &std::path::Path| {
                std::fs::read(path).map_err(|error| error_of(&format!("{}: {error}", path.display())))
            };
            let identity = Identity::from_pem(read(&tls.cert)?, read(&tls.key)?);
            let ca = Certificate::from_pem(read(&tls.ca)?);
            options = options.with_tls(TlsOptions::new().identity(identity).ca_certificate(ca));
        }
        let client = Client::connect(urls, Some(options)).await.map_err(|error| error_of(&error))?;
        let this = Self { client: Arc::new(client) };
        let mut kv = this.client.kv_client();
        match tokio::time::timeout(TIMEOUT, kv.get("/baton/", None)).await {
            Ok(Ok(_)) => Ok(this),
            Ok(Err(error)) => Err(error_of(&error)),
            Err(_) => Err(error_of(&format!("no answer within {} s", TIMEOUT.as_secs()))),
        }
    }
}

fn error_of(error: &dyn std::fmt::Display) -> StoreError {
    StoreError { store: "etcd", problem: error.to_string() }
}

impl KvStore for Etcd {
    fn load<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<(String, Bytes)>, StoreError>> {
        Box::pin(async move {
            let mut kv = self.client.kv_client();
            let end = prefix_end(prefix);
            let mut pairs = Vec::new();
            let mut from = prefix.as_bytes().to_vec();
            loop {
                let options = GetOptions::new()
                    .with_range(end.clone())
                    .with_limit(PAGE)
                    .with_sort(SortTarget::Key, SortOrder::Ascend);
                let answer = kv.get(from, Some(options)).await.map_err(|error| error_of(&error))?;
                for pair in answer.kvs() {
                    let key = pair.key_str().map_err(|error| error_of(&error))?.to_owned();
                    pairs.push((key, Bytes::copy_from_slice(pair.value())));
                }
                match answer.kvs().last() {
                    Some(last) if answer.more() => from = [last.key(), &[0]].concat(),
                    _ => return Ok(pairs),
                }
            }
        })
    }

    fn write(&self, changes: Vec<Change>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let mut kv = self.client.kv_client();
            let mut operations = Vec::new();
            let mut bytes = 0;
            let mut changes = changes.into_iter().peekable();
            while let Some((key, value)) = changes.next() {
                bytes += key.len() + value.as_ref().map_or(0, Bytes::len);
                operations.push(match value {
                    Some(value) => TxnOp::put(key, value.to_vec(), None),
                    None => TxnOp::delete(key, None),
                });
                let next =
                    changes.peek().map_or(0, |(key, value)| key.len() + value.as_ref().map_or(0, Bytes::len));
                if changes.peek().is_none()
                    || operations.len() == MAX_OPERATIONS
                    || bytes + next > MAX_REQUEST
                {
                    let transaction = Txn::new().and_then(std::mem::take(&mut operations));
                    kv.txn(transaction).await.map_err(|error| error_of(&error))?;
                    bytes = 0;
                }
            }
            Ok(())
        })
    }

    fn delete_prefix<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let options = DeleteOptions::new().with_range(prefix_end(prefix));
            let deleted = self.client.kv_client().delete(prefix, Some(options)).await;
            deleted.map(|_| ()).map_err(|error| error_of(&error))
        })
    }
}

/// The first key after all those that begin with the prefix. Our prefixes end in ASCII.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}
