//! What all benches ask for: what arrives, on which fleet, at which rate.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use baton_sim::bench::{Format, Mode, Workload};
use baton_sim::decision::Speeds;
use baton_sim::fleet::Fleet;

/// The fleet that is simulated where none is given.
const FLEET: &str = include_str!("../../../../benches/fleets/8b-h100x8.toml");

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Trace {
    /// A trace by path (its --format says what it is), or generated sessions: mix, chat, agent or documents
    #[arg(long, value_name = "PATH|NAME", default_value = "mix")]
    pub(crate) trace: String,
    /// What the trace is written in: mooncake, azure, sessions or multiturn
    #[arg(long)]
    pub(crate) format: Option<Format>,
    /// At most so many requests [default: all of a trace, 5,000 of generated sessions]
    #[arg(long)]
    pub(crate) requests: Option<u64>,
    /// Run a trace so many times over, each copy with contents of its own, spread over its time
    #[arg(long, default_value_t = 1)]
    pub(crate) copies: u32,
    /// Seed of everything that is random
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Tokens of a block [default: 512 for mooncake, else 64]
    #[arg(long)]
    pub(crate) block_tokens: Option<u32>,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Place {
    /// File that describes engines and links; examples are in benches/fleets [default: 8 H100 with an 8B model]
    #[arg(long, value_name = "FILE")]
    pub(crate) fleet: Option<PathBuf>,
    /// Width of hosts' network cards, instead of the fleet's own
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) gbit: Option<f64>,
    /// The decision knows the engines' speed from the start, instead of learning it from what it sees
    #[arg(long)]
    pub(crate) known_speeds: bool,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Shown {
    /// Print results as JSON instead of tables
    #[arg(long)]
    pub(crate) json: bool,
    /// Write a report with plots: one file that needs no other
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// Threads; results do not depend on it [default: one for each core]
    #[arg(long)]
    pub(crate) threads: Option<usize>,
}

impl Trace {
    pub(crate) fn workload(&self) -> anyhow::Result<Workload> {
        let block_tokens = self.block_tokens.unwrap_or(match self.format {
            Some(Format::Mooncake) => 512,
            _ => 64,
        });
        if !(1..=1 << 16).contains(&block_tokens) {
            bail!("--block-tokens: {block_tokens} is not between 1 and 65536");
        }
        let generated = Workload::named(&self.trace, block_tokens, self.seed);
        let workload = match (generated, self.format) {
            (Some(generated), None) => generated,
            (Some(_), Some(_)) => {
                bail!("--format: {} is generated; for a file of that name write ./{0}", self.trace)
            }
            (None, Some(format)) => Workload::file(Path::new(&self.trace), format, block_tokens, self.seed),
            (None, None) => bail!(
                "--trace: {} is none of the generated workloads ({}); for a file say its --format",
                self.trace,
                Workload::GENERATED.join(", ")
            ),
        };
        let workload = match self.requests {
            Some(0) => bail!("--requests: give at least 1"),
            Some(requests) => workload.with_requests(requests),
            None => workload,
        };
        workload.with_copies(self.copies).with_context(|| self.trace.clone())
    }
}

impl Place {
    pub(crate) fn fleet(&self) -> anyhow::Result<Fleet> {
        let fleet = match &self.fleet {
            Some(file) => Fleet::read(file).with_context(|| file.display().to_string())?,
            None => Fleet::parse(FLEET)?,
        };
        Ok(match self.gbit {
            Some(gbit) if gbit.is_finite() && gbit > 0.0 => fleet.with_gbit(gbit),
            Some(gbit) => bail!("--gbit: {gbit} is not a positive number"),
            None => fleet,
        })
    }

    pub(crate) fn speeds(&self) -> Speeds {
        if self.known_speeds { Speeds::Known } else { Speeds::Learned }
    }
}

/// The modes, or the usual ones; each can run on the fleet.
pub(crate) fn modes(given: &[Mode], fleet: &Fleet) -> anyhow::Result<Vec<Mode>> {
    let modes = if given.is_empty() { Mode::usual(fleet.len() as u32) } else { given.to_vec() };
    for mode in &modes {
        mode.fleet(fleet).with_context(|| format!("--policy {mode}"))?;
    }
    Ok(modes)
}

pub(crate) fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err(format!("{text} is not a positive number")),
    }
}
