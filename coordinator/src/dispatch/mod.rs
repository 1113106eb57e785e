//! A request on its way through the engines.
//!
//! ```text
//! decide ──▶ no room? wait, then decide anew
//!   │
//!   ├─────▶ co-located ───────────────────────────────▶ answer leg on E
//!   │
//!   ├─────▶ pull ──────────▶ source leg on K ──▶ hold? ─▶ answer leg on J, with or without a plan
//!   │
//!   └─────▶ disaggregated ─▶ prefill leg on P ─▶ hold? ─▶ answer leg on D, with or without a plan
//!                                    └ hold taken, P computes in chunks ─▶ answer leg on D, beside it
//! ```
//!
//! The first byte of the answer leg commits it. Before that, an engine that cannot be reached or fails (5xx) is left out and the
//! request placed anew, at most [`MAX_ATTEMPTS`] times in all. A first leg that fails costs time only: the
//! answer leg goes on without a plan, and its engine computes. Everything a request holds (reservations, the hold on the
//! other engine, connections) hangs on guards, so a client that goes away frees it all.

mod account;
mod admit;
mod flow;
mod handoff;
mod hold;
mod legs;
mod noted;
mod place;
mod prompt;
mod relay;
mod upstream;
mod waiting;

pub use self::flow::{Endpoint, MAX_ATTEMPTS, serve};
pub use self::place::{Placement, Unplaced, Wanted};
pub use self::prompt::{Found, Prompt};
pub use self::upstream::{Upstream, UpstreamError};
pub use self::waiting::{NoRoom, WaitingRoom};
