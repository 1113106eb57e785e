//! How QUIC is tuned: for large transfers between hosts of one data centre.

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{AckFrequencyConfig, EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt};

use super::api::Limits;
use super::socket::MAX_UDP_PAYLOAD;

/// A connection without a sign of life for this long is dead.
const IDLE: Duration = Duration::from_secs(10);

/// Between signs of life where nothing else is sent.
const KEEP_ALIVE: Duration = Duration::from_secs(3);

/// Assumed until measured.
const INITIAL_RTT: Duration = Duration::from_millis(20);

/// Congestion window to begin with, in bytes: some milliseconds of 1 Gbit/s. Hosts of a fleet share a data centre, where a
/// burst of this size fits switch buffers; slow start and loss do the rest.
const INITIAL_WINDOW: u64 = 512 << 10;

/// The part of a transport that accepts streams: probes beside the pulls.
const PROBES: u32 = 2;

/// For connections over a path whose first hop carries UDP payloads of `payload` bytes. `accepts`: whether the peer may
/// open streams.
///
/// Memory of a connection, at worst: `window_bytes` received and not read, and as many sent and not acknowledged; the
/// latter lie in the engine's memory and cost descriptors only.
pub(super) fn transport(limits: &Limits, payload: u16, accepts: bool) -> Arc<TransportConfig> {
    let window = VarInt::from_u64(limits.window_bytes).unwrap_or(VarInt::MAX);
    let streams = if accepts { limits.max_served_per_peer.saturating_add(PROBES) } else { 0 };

    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(payload);

    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(8)).max_ack_delay(Some(Duration::from_millis(2)));

    let mut cubic = CubicConfig::default();
    cubic.initial_window(INITIAL_WINDOW);

    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(streams.into())
        .max_concurrent_uni_streams(0u8.into())
        .datagram_receive_buffer_size(None)
        .stream_receive_window(window)
        .receive_window(window)
        .send_window(limits.window_bytes)
        .max_idle_timeout(Some(IDLE.try_into().expect("fits")))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_rtt(INITIAL_RTT)
        .mtu_discovery_config(Some(mtu))
        .ack_frequency_config(Some(acks))
        .congestion_controller_factory(Arc::new(cubic));
    Arc::new(transport)
}

/// Of the endpoint as a whole.
pub(super) fn endpoint(reset_key: ring::hmac::Key) -> EndpointConfig {
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config.max_udp_payload_size(MAX_UDP_PAYLOAD).expect("above the least allowed");
    config
}
