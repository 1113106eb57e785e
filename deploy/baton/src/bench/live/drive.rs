//! When requests are sent: the open loop and the closed one.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use baton_sim::rng::Rng;
use baton_sim::trace::Conversation;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::session::{Session, Side, wait_until};

/// Sessions that may be due and not begun at one server, before the other one has to wait too. They are in memory with their text.
const BACKLOG: usize = 64;

/// What decides when a session begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pace {
    /// Its own time.
    Open,
    /// The end of another one.
    Closed {
        /// How many there are at once.
        sessions: usize,
    },
}

/// A session that is due.
struct Opening {
    session: Session,
    due: Instant,
}

/// Sends all conversations to all sides; ends when the last answer is there, or soon after `stop` turned true.
pub(super) async fn run(
    pace: Pace,
    sides: &[Arc<Side>],
    conversations: &mut dyn Iterator<Item = Conversation>,
    seed: u64,
    started: Instant,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    match pace {
        Pace::Open => open(sides, conversations, seed, started, stop).await,
        Pace::Closed { sessions } => closed(sides, conversations, seed, sessions, stop).await,
    }
}

/// The sides in the order in which they get a turn: which one is first is drawn.
fn order(sides: usize, seed: u64, conversation: u64, turn: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sides).collect();
    if Rng::new(seed).fork(conversation).fork(turn).bits() & 1 == 1 {
        order.reverse();
    }
    order
}

async fn open(
    sides: &[Arc<Side>],
    conversations: &mut dyn Iterator<Item = Conversation>,
    seed: u64,
    started: Instant,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut senders = Vec::new();
    let mut serving = JoinSet::new();
    for side in sides {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        senders.push(sender);
        serving.spawn(serve(Arc::clone(side), receiver));
    }
    'all: for conversation in conversations {
        let conversation = Arc::new(conversation);
        let due = started + Duration::from_nanos(conversation.opens_at);
        // All is read and written before its time comes.
        let mut sessions: Vec<Option<Session>> =
            sides.iter().map(|side| Some(Session::new(side, &conversation))).collect();
        if !wait_until(due, &stop).await {
            break;
        }
        for at in order(sides.len(), seed, conversation.number, 0) {
            let Some(session) = sessions[at].take() else { continue };
            if senders[at].send(Opening { session, due }).await.is_err() {
                break 'all;
            }
        }
    }
    drop(senders);
    while let Some(served) = serving.join_next().await {
        served.context("a server's sessions")??;
    }
    Ok(())
}

/// Begins a server's sessions as far as requests may be under way.
async fn serve(side: Arc<Side>, mut openings: mpsc::Receiver<Opening>) -> anyhow::Result<()> {
    let mut playing = JoinSet::new();
    // Where the run ends early, what is left in the channel was due: `permit` counts it.
    while let Some(Opening { mut session, due }) = openings.recv().await {
        let Some(permit) = side.permit().await else { continue };
        playing.spawn(async move {
            let mut ended = session.ask(due, permit).await;
            while let (Some(end), Some(pause)) = (ended, session.pause()) {
                let due = end + pause;
                if !session.side().wait_until(due).await {
                    break;
                }
                let Some(permit) = session.side().permit().await else { break };
                ended = session.ask(due, permit).await;
            }
        });
        while let Some(played) = playing.try_join_next() {
            played.context("a session")?;
        }
    }
    rest(playing).await
}

/// Waits for the sessions that are still played.
async fn rest(mut playing: JoinSet<()>) -> anyhow::Result<()> {
    while let Some(played) = playing.join_next().await {
        played.context("a session")?;
    }
    Ok(())
}

async fn closed(
    sides: &[Arc<Side>],
    conversations: &mut dyn Iterator<Item = Conversation>,
    seed: u64,
    sessions: usize,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut playing = JoinSet::new();
    for conversation in conversations {
        while playing.len() >= sessions {
            playing.join_next().await.transpose().context("a session")?;
        }
        if *stop.borrow() {
            break;
        }
        let conversation = Arc::new(conversation);
        let number = conversation.number;
        let there = sides.iter().map(|side| Session::new(side, &conversation)).collect();
        playing.spawn(in_turn(there, seed, number, stop.clone()));
    }
    rest(playing).await
}

/// Plays a session at all servers, turn by turn: one server has answered before the next is asked.
async fn in_turn(mut sessions: Vec<Session>, seed: u64, number: u64, stop: watch::Receiver<bool>) {
    let mut ended = Instant::now();
    for turn in 0.. {
        let Some(pause) = sessions.iter().filter_map(Session::pause).max() else { return };
        let mut due = ended + pause;
        if !wait_until(due, &stop).await {
            return;
        }
        for at in order(sessions.len(), seed, number, turn) {
            let session = &mut sessions[at];
            if session.pause().is_none() {
                continue;
            }
            let Some(permit) = session.side().permit().await else { return };
            let Some(end) = session.ask(due, permit).await else { return };
            (ended, due) = (end, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_server_is_first_about_as_often_and_the_draw_repeats() {
        let first = |seed: u64| (0..1000).filter(|number| order(2, seed, *number, 0)[0] == 0).count();
        assert!((400..600).contains(&first(1)), "{}", first(1));
        let draws = |seed: u64| (0..64).map(|turn| order(2, seed, 3, turn)).collect::<Vec<_>>();
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
        assert_eq!(order(1, 1, 0, 0), [0]);
    }
}
