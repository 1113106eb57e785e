//! The scenarios, in the order in which they run on one shared fleet.

mod faults;
mod identity;
mod index;
mod openai;
mod overlap;
mod packed;
mod pull;
mod second_turn;
mod sim;
mod store;
mod tokens;
mod ttft;

use crate::bed::Bed;
use crate::report::Line;

/// A scenario: one or several acceptance lines shown together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// Handed-off requests answer as a plain engine does, their KV arrives as it left, and the decode engine computes nothing.
    Identity,
    /// A cold long prompt's TTFT through the handoff, beside the plain engine's own.
    Ttft,
    /// The simulator says of a script what the fleet does with it.
    Sim,
    /// The second turn of a conversation hits where it is sent.
    SecondTurn,
    /// What a busy engine has cached is pulled by the other one.
    Pull,
    /// KV travels while its prompt is computed.
    Overlap,
    /// bf16 KV travels as fp8 where that is asked for.
    Packed,
    /// What the index says is cached is what the engine finds cached.
    Index,
    /// Token ids equal the engine's.
    Tokens,
    /// Errors, events, parameters and disconnects.
    OpenAi,
    /// An agent dies in the middle of a transfer, and comes back.
    AgentKilled,
    /// Corrupted memory at the source.
    CorruptBlock,
    /// Corrupted datagrams on the wire.
    WireFlip,
    /// The lease is over before the pull.
    LeaseExpired,
    /// The time for a transfer is over in the middle of it.
    Late,
    /// The client goes away in the middle of a transfer.
    ClientGone,
    /// The coordinator restarts, and etcd goes away.
    Store,
    /// An engine restarts between prefill and pull.
    EngineRestart,
}

impl Scenario {
    /// All of them, in order: the ones that break something come last.
    pub const ALL: [Scenario; 18] = [
        Scenario::Identity,
        Scenario::Ttft,
        Scenario::Sim,
        Scenario::SecondTurn,
        Scenario::Pull,
        Scenario::Overlap,
        Scenario::Packed,
        Scenario::Index,
        Scenario::Tokens,
        Scenario::OpenAi,
        Scenario::WireFlip,
        Scenario::CorruptBlock,
        Scenario::LeaseExpired,
        Scenario::Late,
        Scenario::ClientGone,
        Scenario::AgentKilled,
        Scenario::Store,
        Scenario::EngineRestart,
    ];

    /// Its name on the command line and before its lines.
    pub fn name(self) -> &'static str {
        match self {
            Scenario::Identity => "identity",
            Scenario::Ttft => "ttft",
            Scenario::Sim => "sim",
            Scenario::SecondTurn => "second_turn",
            Scenario::Pull => "pull",
            Scenario::Overlap => "overlap",
            Scenario::Packed => "packed",
            Scenario::Index => "index",
            Scenario::Tokens => "tokens",
            Scenario::OpenAi => "http",
            Scenario::AgentKilled => "fault.agent_killed",
            Scenario::CorruptBlock => "fault.corrupt_block",
            Scenario::WireFlip => "fault.wire_flip",
            Scenario::LeaseExpired => "fault.lease_expired",
            Scenario::Late => "fault.late",
            Scenario::ClientGone => "fault.client_gone",
            Scenario::Store => "store",
            Scenario::EngineRestart => "fault.engine_restart",
        }
    }

    /// Runs it. What cannot even be tried is a line that failed; the fleet is then brought back into order.
    pub async fn run(self, bed: &mut Bed) -> Vec<Line> {
        let result = match self {
            Scenario::Identity => identity::run(bed).await,
            Scenario::Ttft => ttft::run(bed).await,
            Scenario::Sim => sim::run(bed).await,
            Scenario::SecondTurn => second_turn::run(bed).await,
            Scenario::Pull => pull::run(bed).await,
            Scenario::Overlap => overlap::run(bed).await,
            Scenario::Packed => packed::run(bed).await,
            Scenario::Index => index::run(bed).await,
            Scenario::Tokens => tokens::run(bed).await,
            Scenario::OpenAi => openai::run(bed).await,
            Scenario::AgentKilled => faults::agent_killed(bed).await,
            Scenario::CorruptBlock => faults::corrupt_block(bed).await,
            Scenario::WireFlip => faults::wire_flip(bed).await,
            Scenario::LeaseExpired => faults::lease_expired(bed).await,
            Scenario::Late => faults::late(bed).await,
            Scenario::ClientGone => faults::client_gone(bed).await,
            Scenario::Store => store::run(bed).await,
            Scenario::EngineRestart => faults::engine_restart(bed).await,
        };
        let mut lines = result.unwrap_or_else(|error| vec![Line::failed(self.name(), &error)]);
        if lines.iter().any(|line| !line.ok)
            && let Err(error) = bed.mend().await
        {
            lines.push(Line::failed(format!("{}.mend", self.name()), &error));
        }
        lines
    }
}
