//! One outcome for each handoff, from the pulls of all ranks.

use std::collections::VecDeque;
use std::time::Duration;

use baton_proto::TransferId;
use baton_proto::control::v1;

/// Handoffs whose ranks have not all ended; of more, the oldest is given up, which happens only where a rank never
/// pulled.
const MAX_OPEN: usize = 1024;

struct Open {
    transfer_id: TransferId,
    left: u32,
    bytes: u64,
    elapsed: Duration,
    error: &'static str,
}

/// Handoffs of which some ranks have ended.
#[derive(Default)]
pub(super) struct Outcomes(VecDeque<Open>);

impl Outcomes {
    /// The pull of one rank of `ranks` ended; `error` is empty when all its blocks arrived.
    pub(super) fn rank_ended(
        &mut self,
        transfer_id: TransferId,
        ranks: u32,
        bytes: u64,
        elapsed: Duration,
        error: &'static str,
    ) -> Option<v1::TransferOutcome> {
        let at = self.0.iter().position(|open| open.transfer_id == transfer_id).unwrap_or_else(|| {
            if self.0.len() == MAX_OPEN {
                self.0.pop_front();
            }
            self.0.push_back(Open { transfer_id, left: ranks, bytes: 0, elapsed: Duration::ZERO, error: "" });
            self.0.len() - 1
        });
        let open = &mut self.0[at];
        open.left = open.left.saturating_sub(1);
        open.bytes += bytes;
        open.elapsed = open.elapsed.max(elapsed);
        if open.error.is_empty() {
            open.error = error;
        }
        if open.left > 0 {
            return None;
        }
        let open = self.0.remove(at)?;
        let state =
            if open.error.is_empty() { v1::TransferState::Completed } else { v1::TransferState::Failed };
        Some(v1::TransferOutcome {
            transfer_id: transfer_id.as_bytes().to_vec().into(),
            state: state.into(),
            bytes: open.bytes,
            seconds: open.elapsed.as_secs_f64(),
            error: open.error.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handoff_has_one_outcome_when_all_ranks_have_ended() {
        let mut outcomes = Outcomes::default();
        let (a, b) = (TransferId::from_bytes([1; 16]), TransferId::from_bytes([2; 16]));
        let ms = Duration::from_millis;
        assert_eq!(outcomes.rank_ended(a, 2, 10, ms(30), ""), None);
        let single = outcomes.rank_ended(b, 1, 5, ms(1), "").unwrap();
        assert_eq!((single.state(), single.bytes), (v1::TransferState::Completed, 5));
        let both = outcomes.rank_ended(a, 2, 0, ms(20), "deadline").unwrap();
        assert_eq!((both.state(), both.bytes, both.seconds), (v1::TransferState::Failed, 10, 0.03));
        assert_eq!(both.error, "deadline");
        for i in 0..MAX_OPEN as u128 + 5 {
            outcomes.rank_ended(TransferId::from_bytes(i.to_le_bytes()), 2, 0, ms(0), "");
        }
        assert_eq!(outcomes.0.len(), MAX_OPEN);
    }
}
