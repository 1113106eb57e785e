//! The agent's metrics. Families are registered once; handles are cheap to clone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use baton_kv_transfer::Stats;
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::Registry;

use crate::ownership::Ignored;

/// How a gap in the engine's events was mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GapMend {
    /// The engine replayed what was missing.
    Replayed,
    /// What was known was forgotten and learnt anew.
    Resynced,
}

impl GapMend {
    /// As a label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Replayed => "replayed",
            Self::Resynced => "resynced",
        }
    }
}

/// How a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldEnd {
    /// Pulled by every rank, or released by the coordinator.
    Released,
    /// Its lease was over.
    Expired,
    /// The engine's epoch ended, or the blocks could not be held.
    Dropped,
}

impl HoldEnd {
    /// As a label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Released => "released",
            Self::Expired => "expired",
            Self::Dropped => "dropped",
        }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PullLabels {
    result: &'static str,
    error: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct MendLabel {
    mend: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// A counter whose full name is given: `holds_total` stands beside the gauge `holds`, and a family of counters named
/// `holds` would declare that name twice.
#[derive(Clone, Debug, Default)]
struct NamedTotal(Counter);

impl EncodeMetric for NamedTotal {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> std::fmt::Result {
        encoder.encode_gauge(&self.0.get())
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

impl TypedMetric for NamedTotal {
    const TYPE: MetricType = MetricType::Unknown;
}

/// Handles to all metrics.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    pulls: Family<PullLabels, Counter>,
    pull_seconds: Histogram,
    pull_waited_seconds: Counter<f64, AtomicU64>,
    checksum_seconds: Histogram,
    holds: Gauge,
    holds_ended: Family<ResultLabel, NamedTotal>,
    received_bytes: Counter,
    direct_bytes: Counter,
    packed_bytes: Counter,
    sent_bytes: Counter,
    corrupt_blocks: Counter,
    connections: Gauge,
    event_gaps: Family<MendLabel, Counter>,
    events_ignored: Family<ReasonLabel, Counter>,
    owned_blocks: Gauge,
    snapshots: Counter,
    epoch: Gauge<u64, AtomicU64>,
    connector_up: Gauge,
    engine_up: Gauge,
    coordinator_up: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("baton_agent");
        macro_rules! register {
            ($name:literal, $help:literal, $metric:expr) => {{
                let metric = $metric;
                registry.register($name, $help, metric.clone());
                metric
            }};
        }
        let pulls = register!("pulls", "Pulls that ended, by result and wire error", Family::default());
        let pull_seconds = register!(
            "pull_seconds",
            "Seconds from a connector's pull to its end",
            Histogram::new(exponential_buckets(0.001, 2.0, 16))
        );
        let pull_waited_seconds = register!(
            "pull_waited_seconds",
            "Seconds that pulls waited for blocks that were not computed yet",
            Counter::default()
        );
        let checksum_seconds = register!(
            "hold_checksum_seconds",
            "Seconds from blocks coming to be held, of one rank, to their checksums",
            Histogram::new(exponential_buckets(0.0001, 2.0, 16))
        );
        let holds = register!("holds", "Requests whose blocks are held", Gauge::default());
        let holds_ended = register!("holds_total", "Holds that ended, by result", Family::default());
        let received_bytes = register!(
            "received_bytes",
            "Bytes of KV received for the engine, as they travelled",
            Counter::default()
        );
        let direct_bytes = register!(
            "direct_bytes",
            "Bytes of those received that were copied from the memory of an engine on this host, without QUIC",
            Counter::default()
        );
        let packed_bytes = register!(
            "packed_bytes",
            "Bytes of those received that came packed to fp8, for about twice as many in the engine",
            Counter::default()
        );
        let sent_bytes = register!("sent_bytes", "Bytes of KV sent to other agents", Counter::default());
        let corrupt_blocks =
            register!("corrupt_blocks", "Blocks that arrived with a wrong checksum", Counter::default());
        let connections = register!("connections", "Connections with other agents", Gauge::default());
        let event_gaps = register!(
            "event_gaps",
            "Gaps in the engine's KV events, by how they were mended",
            Family::default()
        );
        let events_ignored = register!(
            "events_ignored",
            "KV events, or parts of them, that do not count as owned, by reason",
            Family::default()
        );
        let owned_blocks = register!("owned_blocks", "Blocks that the engine owns", Gauge::default());
        let snapshots = register!(
            "snapshots",
            "Times that all owned blocks were sent to the coordinator",
            Counter::default()
        );
        let epoch = register!("epoch", "Epoch of the engine", Gauge::<u64, AtomicU64>::default());
        let connector_up =
            register!("connector_up", "Whether the engine's connector is attached", Gauge::default());
        let engine_up = register!("engine_up", "Whether the engine's HTTP server answers", Gauge::default());
        let coordinator_up = register!(
            "coordinator_up",
            "Whether the coordinator has registered this agent",
            Gauge::default()
        );
        Self {
            registry: Arc::new(registry),
            pulls,
            pull_seconds,
            pull_waited_seconds,
            checksum_seconds,
            holds,
            holds_ended,
            received_bytes,
            direct_bytes,
            packed_bytes,
            sent_bytes,
            corrupt_blocks,
            connections,
            event_gaps,
            events_ignored,
            owned_blocks,
            snapshots,
            epoch,
            connector_up,
            engine_up,
            coordinator_up,
        }
    }
}

impl Metrics {
    /// All metrics in Prometheus' text format.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        match text::encode(&mut out, &self.registry) {
            Ok(()) => out,
            // Writing to a string does not fail.
            Err(error) => format!("# {error}\n"),
        }
    }

    /// What /health tells: the engine, its connector, the coordinator.
    pub fn up(&self) -> [bool; 3] {
        [&self.engine_up, &self.connector_up, &self.coordinator_up].map(|up| up.get() != 0)
    }

    /// A pull ended; `error` is empty when all blocks arrived. `waited` is for how much of that time the source had nothing to send.
    pub fn pull_ended(&self, error: &'static str, elapsed: Duration, waited: Duration) {
        self.pull_waited_seconds.inc_by(waited.as_secs_f64());
        let result = if error.is_empty() { "completed" } else { "failed" };
        self.pulls.get_or_create(&PullLabels { result, error }).inc();
        self.pull_seconds.observe(elapsed.as_secs_f64());
    }

    /// So many holds are alive.
    pub fn set_holds(&self, live: usize) {
        self.holds.set(live as i64);
    }

    /// A hold ended.
    pub fn hold_ended(&self, end: HoldEnd) {
        self.holds_ended.get_or_create(&ResultLabel { result: end.label() }).0.inc();
    }

    /// Checksums were made of blocks, so long after these came to be held.
    pub fn checksums_made(&self, elapsed: Duration) {
        self.checksum_seconds.observe(elapsed.as_secs_f64());
    }

    /// Takes over the transfer endpoint's running totals.
    pub fn set_transfer_totals(&self, totals: Stats) {
        self.received_bytes.inner().store(totals.received_bytes, Ordering::Relaxed);
        self.direct_bytes.inner().store(totals.direct_bytes, Ordering::Relaxed);
        self.packed_bytes.inner().store(totals.packed_bytes, Ordering::Relaxed);
        self.sent_bytes.inner().store(totals.sent_bytes, Ordering::Relaxed);
        self.corrupt_blocks.inner().store(totals.corrupt_blocks, Ordering::Relaxed);
        self.connections.set(totals.connections as i64);
    }

    /// A gap in the engine's events was mended.
    pub fn event_gap(&self, mend: GapMend) {
        self.event_gaps.get_or_create(&MendLabel { mend: mend.label() }).inc();
    }

    /// A part of an event did not count.
    pub fn event_ignored(&self, reason: Ignored) {
        self.events_ignored.get_or_create(&ReasonLabel { reason: reason.label() }).inc();
    }

    /// The engine owns so many blocks.
    pub fn set_owned(&self, blocks: usize) {
        self.owned_blocks.set(blocks as i64);
    }

    /// All owned blocks are sent to the coordinator.
    pub fn snapshot(&self) {
        self.snapshots.inc();
    }

    /// The engine's epoch.
    pub fn set_epoch(&self, epoch: u64) {
        self.epoch.set(epoch);
    }

    /// Whether the engine's connector is attached.
    pub fn set_connector_up(&self, up: bool) {
        self.connector_up.set(up.into());
    }

    /// Whether the engine's HTTP server answers.
    pub fn set_engine_up(&self, up: bool) {
        self.engine_up.set(up.into());
    }

    /// Whether the coordinator has registered this agent.
    pub fn set_coordinator_up(&self, up: bool) {
        self.coordinator_up.set(up.into());
    }
}
