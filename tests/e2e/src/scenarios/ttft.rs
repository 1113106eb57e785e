//! TTFT of a cold long prompt through the handoff, beside the plain engine's own, interleaved in one run.

use std::time::Duration;

use anyhow::ensure;

use crate::bed::Bed;
use crate::report::Line;

/// What the handoff may add, besides a share of the plain engine's time.
const ALLOWED: Duration = Duration::from_millis(150);

/// That share.
const ALLOWED_SHARE: f64 = 0.05;

pub(super) async fn run(bed: &mut Bed) -> anyhow::Result<Vec<Line>> {
    let mut line = Line::new("ttft");
    let (mut plain, mut handoff) = (Vec::new(), Vec::new());
    for round in 0..bed.scale.rounds {
        let asks = [bed.fresh_ask(bed.scale.longest).await?, bed.fresh_ask(bed.scale.longest).await?];
        let [first, second] = asks.map(|ask| ask.with("max_tokens", 1).streamed());
        // Which goes first alternates, so that a drift of the machine's speed falls on both.
        for through_handoff in if round % 2 == 0 { [false, true] } else { [true, false] } {
            if through_handoff {
                let answer = first.send(&bed.coordinator(), &[("x-baton-policy", "disaggregated")]).await?;
                ensure!(answer.header("x-baton-mode") == "disaggregated", "the request was not handed off");
                handoff.push(answer.ttft);
            } else {
                plain.push(second.send(&bed.plain(), &[]).await?.ttft);
            }
        }
    }
    let (plain, handoff) = (median(plain), median(handoff));
    let allowed = plain.mul_f64(1.0 + ALLOWED_SHARE) + ALLOWED;
    line.figure("prompt_tokens", bed.scale.longest)
        .figure("rounds", bed.scale.rounds)
        .figure("plain_ms", ms(plain))
        .figure("handoff_ms", ms(handoff))
        .figure("allowed_ms", ms(allowed))
        .check(handoff <= allowed, || {
            format!("{:.0} ms through the handoff, {:.0} ms allowed", ms(handoff), ms(allowed))
        });
    Ok(vec![line])
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e5).round() / 100.0
}

/// The middle value, or the mean of the two middle ones.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    let n = times.len();
    if n % 2 == 1 { times[n / 2] } else { (times[n / 2 - 1] + times[n / 2]) / 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_even_and_odd_counts() {
        let times = |ms: &[u64]| ms.iter().map(|ms| Duration::from_millis(*ms)).collect::<Vec<_>>();
        assert_eq!(median(times(&[9, 1, 5])), Duration::from_millis(5));
        assert_eq!(median(times(&[9, 1, 5, 7])), Duration::from_millis(6));
    }
}
