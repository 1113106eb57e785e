//! Transfers between hosts that share links fairly.
//!
//! Each host has a network card with a direction out and one in, each of its own width (full duplex). Above them there may be a spine that
//! all traffic between hosts crosses and that is narrower than the cards together. Engines of one host exchange blocks through its memory. At any time each
//! transfer has the rate that max-min fairness gives it ([`fair`]), as congestion control comes near to in the long run; rates change when
//! transfers begin and end, and when a card gets another width. Rates are of payload: what the transport costs is taken off the width beforehand. Round trips are the caller's.

pub mod fair;

use self::fair::{Demand, Shares};
use crate::Nanos;

/// Widths in bytes per second of payload.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Widths {
    /// A host's card, each direction.
    pub host: f64,
    /// Within a host.
    pub local: f64,
    /// All traffic between hosts, where it is bounded.
    pub spine: Option<f64>,
    /// One transfer, where it is bounded.
    pub transfer: Option<f64>,
}

/// Traffic of others, which takes its share like a transfer that wants this rate and never ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Background {
    /// From this host.
    pub from: u32,
    /// To this one.
    pub to: u32,
    /// Bytes per second.
    pub rate: f64,
}

#[derive(Clone, Copy, Debug)]
struct Transfer {
    name: u64,
    left: f64,
    rate: f64,
}

/// The links of a fleet.
#[derive(Debug)]
pub struct Network {
    widths: Widths,
    /// Out of each host, into each, within each; the spine last.
    capacities: Vec<f64>,
    hosts: u32,
    transfers: Vec<Transfer>,
    /// Those of the background first, then one for each transfer.
    demands: Vec<Demand>,
    background: usize,
    shares: Shares,
    now: Nanos,
    next: Option<Nanos>,
    version: u64,
    moved: f64,
}

impl Network {
    /// Idle links between so many hosts.
    pub fn new(hosts: u32, widths: Widths, background: &[Background]) -> Self {
        let count = hosts as usize;
        let mut capacities = vec![widths.host; 2 * count];
        capacities.resize(3 * count, widths.local);
        capacities.push(widths.spine.unwrap_or(f64::INFINITY));
        let mut network = Self {
            widths,
            capacities,
            hosts,
            transfers: Vec::new(),
            demands: Vec::new(),
            background: background.len(),
            shares: Shares::default(),
            now: 0,
            next: None,
            version: 0,
            moved: 0.0,
        };
        network.demands = background.iter().map(|of| network.demand(of.from, of.to, of.rate)).collect();
        network
    }

    fn demand(&self, from: u32, to: u32, most: f64) -> Demand {
        let hosts = self.hosts;
        match from == to {
            true => Demand::new(&[2 * hosts + from], most),
            false if self.widths.spine.is_some() => Demand::new(&[from, hosts + to, 3 * hosts], most),
            false => Demand::new(&[from, hosts + to], most),
        }
    }

    /// A transfer begins.
    pub fn start(&mut self, now: Nanos, name: u64, from: u32, to: u32, bytes: f64) {
        self.advance(now);
        let most = if from == to { f64::INFINITY } else { self.widths.transfer.unwrap_or(f64::INFINITY) };
        self.demands.push(self.demand(from, to, most));
        self.transfers.push(Transfer { name, left: bytes.max(0.0), rate: 0.0 });
        self.share();
    }

    /// A host's card has this width from now on, each direction; 0 where nothing goes through.
    pub fn set_card(&mut self, now: Nanos, host: u32, width: f64) {
        self.advance(now);
        for link in [host, self.hosts + host] {
            self.capacities[link as usize] = width;
        }
        self.share();
    }

    /// A transfer ends before its time. Returns how many of its bytes have not come; `None` where it is not under way.
    pub fn cancel(&mut self, now: Nanos, name: u64) -> Option<f64> {
        let at = self.transfers.iter().position(|transfer| transfer.name == name)?;
        self.advance(now);
        let left = self.transfers.remove(at).left;
        self.demands.remove(self.background + at);
        self.share();
        Some(left)
    }

    /// When a transfer ends next, and the version of this answer; as of an engine's `next`.
    pub fn next(&self) -> Option<(Nanos, u64)> {
        self.next.map(|at| (at, self.version))
    }

    /// Takes the transfers that have ended by now, in the order in which they began.
    pub fn ended(&mut self, now: Nanos, into: &mut Vec<u64>) {
        self.advance(now);
        // What is sent within a nanosecond is lost in rounding.
        let done = |transfer: &Transfer| transfer.left <= transfer.rate * 1e-9 + 1e-6;
        let mut kept = 0;
        for at in 0..self.transfers.len() {
            let transfer = self.transfers[at];
            if done(&transfer) {
                into.push(transfer.name);
                continue;
            }
            self.transfers[kept] = transfer;
            self.demands[self.background + kept] = self.demands[self.background + at];
            kept += 1;
        }
        if kept < self.transfers.len() {
            self.transfers.truncate(kept);
            self.demands.truncate(self.background + kept);
            self.share();
        } else {
            self.predict();
        }
    }

    /// Transfers under way.
    pub fn active(&self) -> usize {
        self.transfers.len()
    }

    /// Bytes sent so far, those of the background left out.
    pub fn moved(&self) -> f64 {
        self.moved
    }

    fn advance(&mut self, now: Nanos) {
        let passed = now.saturating_sub(self.now) as f64 / 1e9;
        self.now = self.now.max(now);
        if passed > 0.0 {
            for transfer in &mut self.transfers {
                let sent = (transfer.rate * passed).min(transfer.left);
                transfer.left -= sent;
                self.moved += sent;
            }
        }
    }

    fn share(&mut self) {
        let rates = self.shares.compute(&self.capacities, &self.demands);
        for (transfer, rate) in self.transfers.iter_mut().zip(&rates[self.background..]) {
            transfer.rate = *rate;
        }
        self.predict();
    }

    fn predict(&mut self) {
        let moving = self.transfers.iter().filter(|transfer| transfer.rate > 0.0);
        let soonest = moving.map(|transfer| transfer.left / transfer.rate).min_by(f64::total_cmp);
        // At least a nanosecond: time goes on.
        self.next = soonest.map(|seconds| self.now + ((seconds * 1e9).ceil() as Nanos).max(1));
        self.version += 1;
    }
}
