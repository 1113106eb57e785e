use std::process::{Child, Command, Stdio};
use std::time::Duration;

use baton_coordinator_core::kv_index::{Limits, Overlaps, Tier};
use baton_proto::control::v1;
use baton_proto::{BlockHash, Epoch};
use tokio::sync::mpsc;

use super::*;
use crate::config::TlsConfig;
use crate::registry::testing::register;

fn hash(n: u32) -> BlockHash {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&n.wrapping_mul(0x9e37_79b1).to_le_bytes());
    bytes[4..8].copy_from_slice(&n.to_le_bytes());
    BlockHash::from_bytes(bytes)
}

struct Fixture {
    registry: Registry,
    index: KvIndex,
    metrics: Metrics,
    ownership: Ownership,
}

impl Fixture {
    fn new(store: Box<dyn KvStore>) -> Self {
        Self {
            registry: Registry::new(8, crate::testing::client_tls()),
            index: KvIndex::new(Limits::of(1_000_000), 1),
            metrics: Metrics::new(),
            ownership: Ownership::new(store),
        }
    }

    fn register(&self, message: v1::Register) -> crate::registry::Registered {
        let (commands, _) = mpsc::channel(4);
        let registration = Registration::check(message).unwrap();
        let (epoch, groups) = (registration.epoch, registration.groups.clone());
        let registered = self.registry.register(registration, commands, Instant::now()).unwrap();
        self.index.open_groups(registered.entry.slot, epoch, &groups).unwrap();
        self.ownership.mark_all(&registered.entry);
        registered
    }

    fn store(&self, entry: &Entry, epoch: u64, seq: u64, blocks: std::ops::Range<u32>) {
        let hashes: Vec<BlockHash> = blocks.map(hash).collect();
        self.index.store(Holder::new(entry.slot, Epoch(epoch)), Tier::Gpu, Run::loose(&hashes)).unwrap();
        self.ownership.mark(entry, &hashes);
        entry.applied(seq);
    }

    fn remove(&self, entry: &Entry, epoch: u64, seq: u64, blocks: std::ops::Range<u32>) {
        let hashes: Vec<BlockHash> = blocks.map(hash).collect();
        self.index.remove(Holder::new(entry.slot, Epoch(epoch)), Tier::Gpu, &hashes).unwrap();
        self.ownership.mark(entry, &hashes);
        entry.applied(seq);
    }

    async fn flush(&self) -> Result<(), StoreError> {
        self.ownership.flush(&self.registry, &self.index, &self.metrics).await
    }

    async fn restore(&self) -> Restored {
        self.ownership.restore(&self.registry, &self.index, Instant::now()).await.unwrap()
    }

    fn overlap(&self, id: &str, blocks: std::ops::Range<u32>) -> u32 {
        let chain: Vec<BlockHash> = blocks.map(hash).collect();
        let slot = self.registry.get(&id.parse().unwrap()).unwrap().slot;
        let mut found = Overlaps::default();
        self.index.overlaps(&chain, &mut found);
        found.of(slot).blocks
    }
}

/// A restart keeps engines, blocks and sequence numbers, removals and erasures included.
async fn survives_a_restart(open: impl AsyncFn() -> Box<dyn KvStore>) {
    let before = Fixture::new(open().await);
    let one = before.register(v1::Register { last_event_seq: 9, ..register("e1", 3) }).entry;
    let ten = before.register(register("e10", 4)).entry;
    before.store(&one, 3, 7, 0..5000);
    before.store(&ten, 4, 1, 0..20);
    before.flush().await.unwrap();
    before.remove(&one, 3, 8, 1000..5000);
    let gone = before.register(register("gone", 1)).entry;
    before.store(&gone, 1, 1, 0..20);
    before.flush().await.unwrap();
    let later = Instant::now() + Duration::from_secs(100);
    one.heard(later);
    ten.heard(later);
    assert_eq!(before.registry.expire(later, Duration::from_secs(1), Duration::from_secs(1)).len(), 2);
    before.index.forget(gone.slot);
    before.ownership.erase(&gone.id);
    before.flush().await.unwrap();
    drop(before);

    let after = Fixture::new(open().await);
    assert_eq!(after.restore().await, Restored { engines: 2, blocks: 1020, incomplete: 0 });
    assert_eq!(after.overlap("e1", 0..2000), 1000);
    assert_eq!(after.overlap("e10", 0..2000), 20);
    let again = after.register(v1::Register { last_event_seq: 9, ..register("e1", 3) });
    assert_eq!((again.next_event_seq, again.emptied), (9, false), "goes on behind batch 8");
    let restarted = after.register(register("e10", 5));
    assert_eq!((restarted.next_event_seq, restarted.emptied), (0, true));

    // An engine's keys go without those of another whose name begins alike.
    let later = Instant::now() + Duration::from_secs(100);
    restarted.entry.heard(later);
    assert_eq!(after.registry.expire(later, Duration::from_secs(1), Duration::from_secs(1)).len(), 2);
    after.ownership.erase(&one.id);
    after.flush().await.unwrap();
    drop(after);
    let last = Fixture::new(open().await);
    assert_eq!(last.restore().await.engines, 1);
    assert!(last.registry.get(&"e10".parse().unwrap()).is_some());
}

fn boxed(store: impl KvStore + 'static) -> Box<dyn KvStore> {
    Box::new(store)
}

#[tokio::test]
async fn an_embedded_store_survives_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state/c.redb");
    survives_a_restart(async || boxed(Embedded::open(&path).unwrap())).await;
}

#[tokio::test]
async fn cache_groups_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.redb");
    let group = |attention: v1::Attention, window| v1::CacheGroup {
        attention: attention.into(),
        window,
        block_size: 16,
    };
    let groups = vec![group(v1::Attention::Full, 0), group(v1::Attention::SlidingWindow, 40)];
    let before = Fixture::new(boxed(Embedded::open(&path).unwrap()));
    let entry = before.register(v1::Register { groups: groups.clone(), ..register("e0", 1) }).entry;
    let blocks: Vec<BlockHash> = (0..10).map(hash).collect();
    let holder = Holder::new(entry.slot, Epoch(1));
    before.index.store(holder, Tier::Gpu, Run::loose(&blocks)).unwrap();
    before.index.store(holder.group(1), Tier::Gpu, Run::loose(&blocks[4..7])).unwrap();
    before.ownership.mark_all(&entry);
    entry.applied(3);
    before.flush().await.unwrap();
    assert_eq!(before.overlap("e0", 0..10), 7);
    drop(before);

    let after = Fixture::new(boxed(Embedded::open(&path).unwrap()));
    assert_eq!(after.restore().await, Restored { engines: 1, blocks: 13, incomplete: 0 });
    assert_eq!(after.overlap("e0", 0..10), 7);
    let again = after.register(v1::Register { groups, last_event_seq: 3, ..register("e0", 1) });
    assert_eq!((again.next_event_seq, again.emptied), (4, false));
    // Without its groups the same engine is another one to the index.
    let plain = after.register(v1::Register { last_event_seq: 3, ..register("e0", 1) });
    assert_eq!((plain.next_event_seq, plain.emptied), (0, true));
    assert_eq!(after.overlap("e0", 0..10), 0);
}

#[tokio::test]
async fn etcd_survives_a_restart() {
    let etcd = EtcdProcess::start();
    survives_a_restart(async || boxed(etcd.connect().await)).await;
}

#[tokio::test]
async fn buckets_of_another_epoch_are_not_taken_for_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.redb");
    let before = Fixture::new(Box::new(Embedded::open(&path).unwrap()));
    let entry = before.register(register("e1", 3)).entry;
    before.store(&entry, 3, 7, 0..100);
    before.flush().await.unwrap();
    let key = record::bucket_key(&entry.id, bucket_of(&hash(5)));
    let other = record::encode_bucket(Epoch(2), &[(hash(5), 0, Tiers::from(Tier::Gpu))]);
    before.ownership.store.write(vec![(key, Some(other))]).await.unwrap();
    drop(before);

    let after = Fixture::new(Box::new(Embedded::open(&path).unwrap()));
    assert_eq!(after.restore().await, Restored { engines: 1, blocks: 0, incomplete: 1 });
    assert_eq!(after.register(register("e1", 3)).next_event_seq, 0);
}

#[tokio::test]
async fn a_dead_etcd_is_found_out_at_the_start_and_ridden_out_later() {
    let tls = TlsConfig { ca: "x".into(), cert: "x".into(), key: "x".into() };
    let error = Etcd::connect(&["http://127.0.0.1:1".into()], &tls).await.err().unwrap();
    assert_eq!(error.store, "etcd");

    let mut etcd = EtcdProcess::start();
    let fixture = Fixture::new(Box::new(etcd.connect().await));
    let entry = fixture.register(register("e1", 3)).entry;
    fixture.store(&entry, 3, 1, 0..100);
    fixture.flush().await.unwrap();
    etcd.kill();
    fixture.store(&entry, 3, 2, 100..200);
    fixture.flush().await.unwrap_err();
    fixture.flush().await.unwrap_err();
    assert_eq!(fixture.metrics.store_errors.get(), 2);
    assert!(fixture.metrics.store_dirty_buckets.get() > 0);
    etcd.restart();
    fixture.flush().await.unwrap();
    assert_eq!(fixture.metrics.store_dirty_buckets.get(), 0);

    let after = Fixture::new(Box::new(etcd.connect().await));
    assert_eq!(after.restore().await, Restored { engines: 1, blocks: 200, incomplete: 0 });
}

/// An etcd of its own, on free ports, with its data in a temporary directory.
struct EtcdProcess {
    directory: tempfile::TempDir,
    ports: [u16; 2],
    child: Child,
}

impl EtcdProcess {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ports = [free_port(), free_port()];
        let child = Self::spawn(directory.path(), ports);
        Self { directory, ports, child }
    }

    fn spawn(directory: &std::path::Path, [client, peer]: [u16; 2]) -> Child {
        let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        Command::new("etcd")
            .arg("--data-dir")
            .arg(directory.join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd is installed (Debian: etcd-server)")
    }

    async fn connect(&self) -> Etcd {
        let urls = [format!("http://127.0.0.1:{}", self.ports[0])];
        let tls = TlsConfig { ca: "x".into(), cert: "x".into(), key: "x".into() };
        for _ in 0..100 {
            if let Ok(etcd) = Etcd::connect(&urls, &tls).await {
                return etcd;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("etcd did not start");
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        self.child = Self::spawn(self.directory.path(), self.ports);
        let address = ("127.0.0.1", self.ports[0]);
        while std::net::TcpStream::connect(address).is_err() {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for EtcdProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
