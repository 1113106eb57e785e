use proptest::prelude::*;

use super::*;

fn widths(links: &Links, slot: u32) -> Widths {
    links.end(Slot(slot)).widths
}

const GIGABYTE: u64 = 1_000_000_000;

fn seconds(links: &Links, bytes: u64, queued: Queued) -> f64 {
    let TransferSeconds { wait, transfer, .. } = links.transfer(Slot(0), Slot(1), bytes, queued);
    wait + transfer
}

#[test]
fn an_unmeasured_link_has_the_stated_prior() {
    let links = Links::default();
    assert!(!links.get(Slot(0), Slot(1)).measured);
    assert_eq!(seconds(&links, 1_000_000_000, Queued::default()), 1.0 + 2e-3);
}

#[test]
fn bandwidth_is_learned_per_direction_and_from_large_transfers_only() {
    let mut links = Links::default();
    links.observe(0.0, (Slot(0), Slot(1)), 1024, 1.0, 1e-4);
    assert!(!links.get(Slot(0), Slot(1)).measured);
    assert_eq!(links.get(Slot(0), Slot(1)).rtt_seconds, 1e-4);
    links.observe(1.0, (Slot(0), Slot(1)), 100_000_000, 0.1 + 2e-4, 1e-4);
    let link = links.get(Slot(0), Slot(1));
    assert!((link.bytes_per_second - 1e9).abs() < 1e3, "{link:?}");
    assert!(!links.get(Slot(1), Slot(0)).measured);
    links.forget(Slot(1));
    assert!(!links.get(Slot(0), Slot(1)).measured);
    assert_eq!(widths(&links, 1), Widths::default());
    assert!(widths(&links, 0).out.is_some(), "the other host is still there");
}

#[test]
fn a_transfer_that_was_given_up_outweighs_all_before_it_until_another_one_ends() {
    let link = (Slot(0), Slot(1));
    let seen = |given_up: &[(u64, f64)]| {
        let mut links = Links::default();
        for n in 0..20 {
            links.observe(f64::from(n), link, GIGABYTE, 0.1 + 2e-4, 1e-4);
        }
        given_up.iter().for_each(|(bytes, seconds)| links.observe_given_up(30.0, link, *bytes, *seconds));
        links
    };
    let width = |links: &Links| links.get(link.0, link.1).bytes_per_second;
    assert!((width(&seen(&[])) / 1e10 - 1.0).abs() < 1e-9);
    let mut slow = seen(&[(GIGABYTE, 10.0)]);
    assert_eq!(width(&slow), 1e8);
    assert!(slow.alone(link.0, link.1, GIGABYTE) > 9.9);
    // Nothing came, or too little in too short a time.
    assert!((0.0..1.0).contains(&width(&seen(&[(0, 10.0)]))));
    for nothing in [(1024, 0.5), (0, 0.0), (GIGABYTE, 0.0), (GIGABYTE, f64::INFINITY), (GIGABYTE, f64::NAN)] {
        assert!((width(&seen(&[nothing])) / 1e10 - 1.0).abs() < 1e-9, "{nothing:?}");
    }
    // The link is slower for good: what it was before is forgotten.
    slow.observe(31.0, link, GIGABYTE, 2.0 + 2e-4, 1e-4);
    assert!((width(&slow) / 5e8 - 1.0).abs() < 1e-6, "{}", width(&slow));
}

#[test]
fn a_card_is_as_narrow_as_what_was_given_up_on_it_lately_says() {
    let (mut links, mut now) = (Links::default(), 0.0);
    for _ in 0..40 {
        cross(&mut links, &mut now, (0, 1), 1e10);
    }
    // One after another, with none that comes to its end; one that did may be remembered.
    for n in 1..=7 {
        assert!(links.width(Slot(0), Slot(2)) > 9e9, "{n}");
        now += 10.0;
        links.observe_given_up(now, (Slot(0), Slot(1)), GIGABYTE, 10.0);
    }
    assert!((links.width(Slot(0), Slot(2)) / 1e8 - 1.0).abs() < 1e-9, "a link that nothing crossed");
}

/// A transfer of a gigabyte at this rate, long after the last one.
fn cross(links: &mut Links, now: &mut f64, link: (u32, u32), bytes_per_second: f64) {
    *now += 1e3;
    let link = (Slot(link.0), Slot(link.1));
    links.observe(*now, link, GIGABYTE, GIGABYTE as f64 / bytes_per_second + 2e-4, 1e-4);
}

#[test]
fn an_unmeasured_link_is_as_fast_as_the_narrower_card() {
    let (mut links, mut now) = (Links::default(), 0.0);
    cross(&mut links, &mut now, (0, 2), 4e9);
    cross(&mut links, &mut now, (3, 1), 2e9);
    let link = links.get(Slot(0), Slot(1));
    assert!(!link.measured && (link.bytes_per_second - 2e9).abs() < 1e3, "{link:?}");
}

#[test]
fn what_is_queued_on_the_link_or_at_a_card_goes_first() {
    let (mut links, mut now) = (Links::default(), 0.0);
    cross(&mut links, &mut now, (0, 1), 1e9);
    cross(&mut links, &mut now, (2, 1), 4e9);
    let with = |link, out, into| {
        let source = HostQueue { out, into: 1 << 40, within: 1 << 40 };
        let destination = HostQueue { out: 1 << 40, into, within: 1 << 40 };
        let TransferSeconds { wait, transfer, .. } =
            links.transfer(Slot(0), Slot(1), GIGABYTE, Queued { link, source, destination });
        assert!((transfer - 1.0 - 2e-4).abs() < 1e-6);
        wait
    };
    assert_eq!(with(0, 0, 0), 0.0);
    assert!((with(GIGABYTE, GIGABYTE, GIGABYTE) - 1.0).abs() < 1e-6);
    assert!((with(0, GIGABYTE, 0) - 1.0).abs() < 1e-6, "nothing faster out of the source's host is known");
    assert_eq!(with(0, 0, GIGABYTE), 0.0, "the destination takes four times what the link carries");
    assert!((with(0, 0, 7 * GIGABYTE) - 1.0).abs() < 1e-6);
}

#[test]
fn engines_of_a_host_share_its_card_and_bypass_it_between_them() {
    let (mut links, mut now) = (Links::default(), 0.0);
    for (slot, host) in [(0, "a"), (1, "a"), (2, "b"), (3, "")] {
        links.place(Slot(slot), host);
    }
    cross(&mut links, &mut now, (0, 2), 1e9);
    cross(&mut links, &mut now, (0, 1), 20e9);
    let near = |width: Option<f64>, expected: f64| (width.unwrap() / expected - 1.0).abs() < 1e-9;
    let seen = widths(&links, 1);
    assert_eq!(seen, widths(&links, 0));
    assert!(near(seen.out, 1e9) && near(seen.within, 20e9) && seen.into.is_none(), "{seen:?}");
    assert!(near(widths(&links, 2).into, 1e9));
    assert_eq!(widths(&links, 3), Widths::default());
    let busy = HostQueue { out: GIGABYTE, into: GIGABYTE, within: 0 };
    let queued = Queued { link: 0, source: busy, destination: busy };
    assert_eq!(links.transfer(Slot(0), Slot(1), GIGABYTE, queued).wait, 0.0);
    assert!((links.transfer(Slot(1), Slot(2), GIGABYTE, queued).wait - 1.0).abs() < 1e-6);
    // The card stays as long as an engine of the host does, and is not another host's.
    links.forget(Slot(0));
    assert!(near(widths(&links, 1).out, 1e9));
    links.place(Slot(1), "c");
    assert_eq!(widths(&links, 1), Widths::default());
    links.place(Slot(0), "a");
    assert_eq!(widths(&links, 0), Widths::default());
}

#[test]
fn a_card_that_many_transfers_share_is_as_wide_as_all_of_them_together() {
    let mut links = Links::default();
    for slot in 0..8 {
        links.place(Slot(slot), if slot < 4 { "a" } else { "b" });
    }
    for n in 0..200 {
        let (from, to) = (n % 4, 4 + n / 4 % 4);
        let now = f64::from(n) * 0.25;
        links.observe(now, (Slot(from), Slot(to)), GIGABYTE, 1.0, 1e-4);
    }
    for width in [widths(&links, 3).out, widths(&links, 5).into] {
        assert!((width.unwrap() / 4e9 - 1.0).abs() < 0.05, "{width:?}");
    }
}

fn queue() -> impl Strategy<Value = HostQueue> {
    (0u64..1 << 35, 0u64..1 << 35, 0u64..1 << 35).prop_map(|(out, into, within)| HostQueue {
        out,
        into,
        within,
    })
}

proptest! {
    #[test]
    fn the_bounds_are_some_and_a_restored_copy_is_equal_to_the_bit(
        hosts in prop::collection::vec(0usize..4, 6),
        samples in prop::collection::vec(
            (0.0f64..0.3, 0u32..6, 0u32..6, 1u64..1 << 32, 1e-3f64..2.0, 1e-5f64..1e-2), 0..60),
        bytes in 0u64..1 << 33,
        link in 0u64..1 << 33,
        ends in (queue(), queue()),
    ) {
        let names = ["", "a", "b", "c"];
        let (mut links, mut now) = (Links::default(), 0.0);
        for (slot, host) in hosts.iter().enumerate() {
            links.place(Slot(slot as u32), names[*host]);
        }
        for (passed, source, destination, bytes, seconds, rtt) in samples {
            now += passed;
            links.observe(now, (Slot(source), Slot(destination)), bytes, seconds, rtt);
        }
        let copy = Links::restore(links.known(), links.hosts());
        for source in (0..7).map(Slot) {
            for destination in (0..7).map(Slot) {
                if source == destination {
                    continue;
                }
                let queued = Queued { link, source: ends.0, destination: ends.1 };
                let TransferSeconds { wait, transfer, round_trips } =
                    links.transfer(source, destination, bytes, queued);
                prop_assert!(wait >= 0.0 && transfer.is_finite());
                let all = (wait + transfer) * (1.0 + 1e-12);
                let alone = transfer * (1.0 + 1e-12);
                let [a, b] = [source, destination].map(|slot| hosts.get(slot.0 as usize).copied());
                let within = a == b && a.is_some_and(|host| host > 0);
                // At the two ends of a transfer within a host the same is queued.
                let [from, to] = if within { [ends.0; 2] } else { [ends.0, ends.1] };
                let least = links.at_least_into(destination, bytes, to);
                prop_assert!(least.behind <= all && least.round_trips + least.bytes <= alone);
                prop_assert!(least.round_trips <= round_trips);
                let least = links.at_least_out_of(source, from)[usize::from(within)];
                prop_assert!(least.behind + least.bytes * bytes as f64 <= all);
                prop_assert!(least.round_trips + least.bytes * bytes as f64 <= alone);
                prop_assert_eq!(
                    copy.transfer(source, destination, bytes, queued), TransferSeconds { wait, transfer, round_trips });
                prop_assert_eq!(
                    copy.at_least_into(destination, bytes, to), links.at_least_into(destination, bytes, to));
            }
        }
    }
}
