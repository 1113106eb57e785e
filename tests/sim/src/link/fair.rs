//! Max-min fairness: nobody's rate can be raised without lowering that of somebody who has no more.
//!
//! By progressive filling (Bertsekas and Gallager, Data Networks, 6.5.2): all rates grow together; when a link is full, or a demand met, those on it stop growing.

/// Links that one demand crosses at most.
const MOST_LINKS: usize = 3;

/// What wants a rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    links: [u32; MOST_LINKS],
    count: u8,
    most: f64,
}

impl Demand {
    /// Over these links, at most this rate.
    ///
    /// # Panics
    /// With more than three links.
    pub fn new(links: &[u32], most: f64) -> Self {
        let mut array = [0; MOST_LINKS];
        array[..links.len()].copy_from_slice(links);
        Self { links: array, count: links.len() as u8, most }
    }

    /// The links.
    pub fn links(&self) -> impl Iterator<Item = usize> {
        self.links.into_iter().take(usize::from(self.count)).map(|link| link as usize)
    }

    /// The most that it wants.
    pub fn most(&self) -> f64 {
        self.most
    }
}

/// Computes shares in memory that is used again.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    rates: Vec<f64>,
    left: Vec<f64>,
    growing_on: Vec<u32>,
    growing: Vec<u32>,
    /// Links that any demand crosses.
    used: Vec<u32>,
}

impl Shares {
    /// The rate of each demand, over links of these capacities.
    pub fn compute(&mut self, capacities: &[f64], demands: &[Demand]) -> &[f64] {
        self.rates.clear();
        self.rates.resize(demands.len(), 0.0);
        self.left.clear();
        self.left.extend_from_slice(capacities);
        self.growing_on.clear();
        self.growing_on.resize(capacities.len(), 0);
        self.growing.clear();
        self.growing.extend(0..demands.len() as u32);
        self.used.clear();
        for link in demands.iter().flat_map(Demand::links) {
            if self.growing_on[link] == 0 {
                self.used.push(link as u32);
            }
            self.growing_on[link] += 1;
        }
        let mut level = 0.0;
        while !self.growing.is_empty() {
            let mut rise = f64::INFINITY;
            for link in self.used.iter().map(|link| *link as usize) {
                if self.growing_on[link] > 0 {
                    rise = rise.min(self.left[link] / f64::from(self.growing_on[link]));
                }
            }
            for at in &self.growing {
                rise = rise.min(demands[*at as usize].most - level);
            }
            if rise == f64::INFINITY {
                self.growing.iter().for_each(|at| self.rates[*at as usize] = f64::INFINITY);
                break;
            }
            level += rise.max(0.0);
            for link in self.used.iter().map(|link| *link as usize) {
                self.left[link] -= rise.max(0.0) * f64::from(self.growing_on[link]);
            }
            let before = self.growing.len();
            let (rates, left, growing_on) = (&mut self.rates, &self.left, &mut self.growing_on);
            // What rounding leaves of a link that is full.
            let full = |link: usize| left[link] <= capacities[link] * 1e-12;
            self.growing.retain(|at| {
                let demand = &demands[*at as usize];
                // The level may come out a rounding below what it was raised to.
                let stop = demand.most <= level * (1.0 + 1e-12) || demand.links().any(full);
                if stop {
                    rates[*at as usize] = level;
                    demand.links().for_each(|link| growing_on[link] -= 1);
                }
                !stop
            });
            assert!(self.growing.len() < before, "each round fills a link or meets a demand");
        }
        &self.rates
    }
}
