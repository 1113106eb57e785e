//! Many pulls between two agents on virtual time, over a network that delays, loses, repeats and reorders packets, cuts
//! streams and restarts the holder. What QUIC does about packets is done here too, in a few lines, so that a stream is
//! what it is in life: ordered bytes that arrive in odd pieces, at odd times, or end early.

mod cases;
mod direct;
mod packed;
mod pair;
mod storms;
