//! Agents as a whole: real sockets, real shared memory, real transfers. Only the engine and the coordinator are doubles, and speak
//! the real protocols.

mod connector;
mod coordinator;
mod engine;
mod events;
mod fleet;
mod handoff;
mod session;
