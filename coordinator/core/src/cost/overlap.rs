//! What of a handoff's transfer its prefill hides.
//!
//! An engine computes a long prompt in steps of at most `C` tokens, and what a step has computed may leave while the next ones are computed.
//!
//! # Formula
//! Of `n` tokens that the prefill engine computes in `P` seconds, in `k = max(1, n / C)` parts that are taken for equally long, the first part is there
//! `early = P·(1 - 1/k)` before the last one; for `C = 0`, where KV leaves only when all of the prompt is computed, `k` is 1. Of the `m` tokens that move,
//! those of the last part go alone: the share `last = min(1, n/k/m)`. A transfer that waits `W` seconds and then takes `T`, round trips `R` among them, so shows after
//! the prefill for `max(W + T - early, R + last·(T - R))` seconds, of which `max(W - early, 0)` are its wait.
//!
//! # When the answer is asked for
//! The decode engine takes room for all of the prompt when it begins to pull. So it is asked as late as it can be: when the prompt's first chunk was
//! scheduled `P - `[`EARLIER`]`·(min(early, W + T) + queue + request)` seconds ago, or at once, with the time that the request waits there behind others and what it takes itself.
//! Where no prefill of its engine was measured yet, `P` says nothing, and the answer is asked for when the prompt is computed
//! ([`crate::speed::SpeedEstimate::knows_prefill`]).
//! Of a prompt of one part nothing moves before the end of its prefill, and only the request's own time is hidden.

use super::{Plan, Priced, Term};
use crate::links::TransferSeconds;

/// By so much more than is predicted the answer is asked for ahead of the prefill's end: predictions are off by about as much. Too early only takes
/// room in the decode engine's cache; too late shows the transfer.
pub const EARLIER: f64 = 1.5;

/// For how long KV can leave before the prefill of so many tokens ends that takes so many seconds.
#[inline]
pub(crate) fn early_seconds(chunk_tokens: u32, computed: f64, prefill_seconds: f64) -> f64 {
    let chunk = f64::from(chunk_tokens);
    if chunk > 0.0 && computed > chunk { prefill_seconds * (1.0 - chunk / computed) } else { 0.0 }
}

/// The share that goes alone of what moves of a prompt in several parts, given one by the number of tokens that move.
#[inline]
pub(crate) fn last_share(chunk_tokens: f64, of_moving: f64) -> f64 {
    (chunk_tokens * of_moving).min(1.0)
}

/// As much of a transfer as shows after the prefill.
#[inline]
pub(crate) fn shown(way: TransferSeconds, early: f64, last: f64) -> TransferSeconds {
    let alone = way.round_trips + last * (way.transfer - way.round_trips);
    let wait = (way.wait - early).max(0.0);
    TransferSeconds { wait, transfer: (way.wait + way.transfer - early).max(alone) - wait, ..way }
}

impl Priced {
    /// A handoff's: its decode engine should be asked for the answer so many seconds after the prompt's first chunk was scheduled. `None` of other plans, and
    /// where KV leaves only when all of the prompt is computed: the answer is asked for then.
    pub fn answer_after_seconds(&self) -> Option<f64> {
        let early = self.early_seconds.filter(|_| matches!(self.plan, Plan::Disaggregated { .. }))?;
        let request = self.terms.get(Term::DecodeQueueWait) + self.terms.get(Term::FirstStep);
        Some((self.prefill_seconds - EARLIER * (self.transfer_seconds.min(early) + request)).max(0.0))
    }

    /// By so many seconds more than another one the pull of a handoff may take whose answer is asked for ahead of the prefill's end: blocks come as they are
    /// computed, for as long as the prefill may take, what decoding sequences add to its steps included.
    pub fn longer_pull_seconds(&self) -> f64 {
        EARLIER * (self.prefill_seconds + self.terms.get(Term::MixedSteps))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cost::{Pricing, Slo};
    use crate::fleet::{Engine, Fleet};
    use crate::kv_index::Slot;
    use crate::links::Links;
    use crate::load::{Loads, Reserved};
    use crate::placement::testing::{engine, with};

    const HANDOFF: Plan = Plan::Disaggregated { prefill: 0, decode: 1 };
    const RTT: f64 = 1e-4;

    fn chunked(chunk_tokens: u32) -> Engine {
        with(engine(0), |info| info.chunk_tokens = chunk_tokens)
    }

    /// Over a link of so many bytes per second; `held` by each engine.
    fn priced(first: Engine, width: f64, held: [u32; 2], queued: f64, prompt_tokens: u64) -> Priced {
        let mut links = Links::default();
        let bytes = 1 << 30;
        links.observe(0.0, (Slot(0), Slot(1)), bytes, bytes as f64 / width + 2.0 * RTT, RTT);
        let fleet = Fleet::new(vec![first, engine(1)], links);
        let prefills = u64::from(queued > 0.0);
        let busy = Reserved { prefill_seconds: 2.0 * queued, prefills, ..Reserved::default() };
        let loads = Loads::new(vec![Reserved::default(), busy], Vec::new());
        let output = (128.0, Some(11));
        let priced =
            Pricing::new(&fleet, &loads, &held, prompt_tokens, output, Slo::default()).price(HANDOFF);
        assert!((priced.terms.total() / priced.seconds - 1.0).abs() < 1e-12, "{priced:?}");
        priced
    }

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-9, "{a} is not {b}");
    }

    #[test]
    fn the_prefill_hides_the_transfer_of_all_but_its_last_chunk() {
        let transfer = |priced: &Priced| priced.terms.get(Term::Transfer);
        for (chunk, parts) in [(2000, 10.0), (8000, 2.5), (40_000, 1.0), (0, 1.0)] {
            // Fast: a chunk is gone before the next one is computed.
            let fast = priced(chunked(chunk), 1e10, [0, 0], 0.0, 20_000);
            let bytes = 1250.0 * 100_000.0 / 1e10;
            near(transfer(&fast), 2.0 * RTT + bytes / parts);
            near(fast.transfer_seconds, 2.0 * RTT + bytes);
            // Slow: it begins with the first chunk's end.
            let slow = priced(chunked(chunk), 1e7, [0, 0], 0.0, 20_000);
            let early = slow.prefill_seconds * (1.0 - 1.0 / parts);
            near(transfer(&slow), slow.transfer_seconds - early);
            assert_eq!(slow.early_seconds, (chunk > 0).then_some(early));
        }
        // Computed in one chunk, or all of what moves being in the last one: nothing is hidden.
        for held in [[1200, 0], [0, 1200]] {
            let after = transfer(&priced(chunked(0), 1e7, held, 0.0, 20_000));
            let beside = transfer(&priced(chunked(2000), 1e7, held, 0.0, 20_000));
            near(beside, after);
        }
    }

    #[test]
    fn a_wait_for_the_link_is_hidden_first() {
        let way = TransferSeconds { wait: 1.0, transfer: 2.0, round_trips: 0.1 };
        let of = |early, last| {
            let shown = shown(way, early, last);
            (shown.wait, shown.transfer)
        };
        for ((early, last), (wait, transfer)) in [
            ((0.0, 1.0), (1.0, 2.0)),
            ((0.5, 0.1), (0.5, 2.0)),
            ((2.0, 0.1), (0.0, 1.0)),
            ((2.9, 0.1), (0.0, 0.29)),
            ((99.0, 0.0), (0.0, 0.1)),
        ] {
            let got = of(early, last);
            near(got.0, wait);
            near(got.1, transfer);
        }
    }

    #[test]
    fn the_answer_is_asked_for_so_late_that_the_pull_is_in_time() {
        let after = |chunk, width, queued, tokens| {
            let priced = priced(chunked(chunk), width, [0, 0], queued, tokens);
            (priced.answer_after_seconds(), priced)
        };
        assert_eq!(after(0, 1e9, 0.0, 20_000).0, None);
        let (some, priced) = after(2000, 1e9, 0.01, 20_000);
        let ahead = priced.transfer_seconds + 0.01 + priced.terms.get(Term::FirstStep);
        near(some.unwrap(), priced.prefill_seconds - EARLIER * ahead);
        assert!(some.unwrap() > 0.0);
        // One that takes longer than the prefill is begun at once.
        assert_eq!(after(2000, 1e7, 0.0, 20_000).0, Some(0.0));
        // One of one chunk is not asked for before there is something to pull, but for the request's own time.
        let (some, priced) = after(2000, 1e7, 0.0, 2000);
        near(some.unwrap(), priced.prefill_seconds - EARLIER * priced.terms.get(Term::FirstStep));
        let whole = Priced { plan: Plan::Colocated { engine: 0 }, ..priced };
        assert_eq!(whole.answer_after_seconds(), None);
        near(priced.longer_pull_seconds(), EARLIER * priced.prefill_seconds);
    }

    proptest! {
        #[test]
        fn what_shows_grows_with_the_transfer_and_shrinks_with_the_prefill(
            (wait, transfer, round_trips) in (0.0f64..3.0, 0.0f64..3.0, 0.0f64..0.1),
            (early, last, more) in (0.0f64..3.0, 0.0f64..1.0, 0.0f64..1.0),
        ) {
            let way = TransferSeconds { wait, transfer: round_trips + transfer, round_trips };
            let sum = |way, early, last| {
                let shown = shown(way, early, last);
                assert!(shown.wait >= 0.0 && shown.transfer >= 0.0, "{shown:?}");
                shown.wait + shown.transfer
            };
            let here = sum(way, early, last);
            prop_assert!(here >= round_trips && here <= wait + way.transfer + 1e-12);
            let longer = [
                TransferSeconds { wait: wait + more, ..way },
                TransferSeconds { transfer: way.transfer + more, ..way },
            ];
            for way in longer {
                prop_assert!(sum(way, early, last) >= here - 1e-12);
            }
            prop_assert!(sum(way, early + more, last) <= here + 1e-12);
        }
    }
}
