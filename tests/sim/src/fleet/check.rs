//! What a fleet file must hold, each fault with the field and the mend.

use std::path::Path;

use super::Fleet;
use crate::engine::speed::{Speed, TABLE};

/// Most engines of a fleet.
const MOST_ENGINES: usize = 1000;

/// A file that is no fleet.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FleetError {
    /// The file cannot be read.
    #[error("{path}: {problem}")]
    Unreadable {
        /// The file.
        path: String,
        /// What the system says.
        problem: String,
    },
    /// It is not TOML, or has fields that a fleet does not have, or lacks some.
    #[error("not a fleet: {0}")]
    Form(String),
    /// A field holds what it must not.
    #[error("{field}: {problem}; {mend}")]
    Field {
        /// Its path.
        field: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        mend: String,
    },
}

fn field(field: impl Into<String>, problem: impl Into<String>, mend: impl Into<String>) -> FleetError {
    FleetError::Field { field: field.into(), problem: problem.into(), mend: mend.into() }
}

impl Fleet {
    /// Reads a fleet.
    ///
    /// # Errors
    /// The first fault, with its field and how to mend it.
    pub fn parse(text: &str) -> Result<Self, FleetError> {
        let fleet: Self =
            toml::from_str(text).map_err(|error| FleetError::Form(error.to_string().trim().to_owned()))?;
        fleet.check()?;
        Ok(fleet)
    }

    /// Reads a file; see [`Fleet::parse`].
    ///
    /// # Errors
    /// As there, or the file cannot be read.
    pub fn read(path: &Path) -> Result<Self, FleetError> {
        let unreadable = |error: std::io::Error| FleetError::Unreadable {
            path: path.display().to_string(),
            problem: error.to_string(),
        };
        Self::parse(&std::fs::read_to_string(path).map_err(unreadable)?)
    }

    /// Whether it is consistent.
    ///
    /// # Errors
    /// The first fault.
    pub fn check(&self) -> Result<(), FleetError> {
        if self.engines.is_empty() {
            return Err(field("engines", "there are none", "add an [[engines]] table"));
        }
        for at in 0..self.engines.len() {
            self.check_kind(at)?;
        }
        if self.len() > MOST_ENGINES {
            let problem = format!("{} engines in all", self.len());
            return Err(field("engines", problem, format!("at most {MOST_ENGINES} are simulated")));
        }
        let kib: Vec<f64> =
            self.engines.iter().filter_map(|kind| self.speed(kind)).map(|speed| speed.kv_kib).collect();
        if kib.iter().any(|other| *other != kib[0]) {
            let mend = "engines of one fleet serve one model: give all of them the same kv_kib";
            return Err(field("engines.constants.kv_kib", "differs between kinds", mend));
        }
        self.check_links()?;
        let hosts = self.hosts();
        for (at, of) in self.background.iter().enumerate() {
            for (name, host) in [("from", of.from), ("to", of.to)] {
                if host >= hosts {
                    let mend = format!("hosts are numbered from 0 to {}", hosts - 1);
                    return Err(field(
                        format!("background[{at}].{name}"),
                        format!("there is no host {host}"),
                        mend,
                    ));
                }
            }
            if of.from == of.to {
                let mend = "traffic of others goes between two hosts";
                return Err(field(format!("background[{at}].to"), "is `from` again", mend));
            }
            positive(&format!("background[{at}].gbit"), of.gbit)?;
        }
        self.check_failures()?;
        let control = &self.control;
        not_negative("control.dispatch_us", control.dispatch_us)?;
        not_negative("control.event_delay_ms", control.event_delay_ms)?;
        positive("control.load_interval_ms", control.load_interval_ms)?;
        positive("control.hold_seconds", control.hold_seconds)?;
        positive("control.pull_deadline_ms", control.pull_deadline_ms)?;
        positive("control.max_requests", control.max_requests as f64)?;
        positive("control.max_engine_requests", f64::from(control.max_engine_requests))?;
        if let Some(slo) = &self.slo {
            positive("slo.ttft_ms", slo.ttft_ms)?;
            positive("slo.tpot_ms", slo.tpot_ms)?;
        }
        Ok(())
    }

    fn check_kind(&self, at: usize) -> Result<(), FleetError> {
        let kind = &self.engines[at];
        let name = |name: &str| format!("engines[{at}].{name}");
        match &kind.constants {
            Some(constants) => check_speed(&name("constants"), constants)?,
            None if self.speed(kind).is_none() => {
                let pairs: Vec<String> = TABLE.iter().map(|row| format!("{} on {}", row.0, row.1)).collect();
                let problem =
                    format!("no constants are known for the model `{}` on `{}`", self.model, kind.gpu);
                let mend = format!("give `constants`, or one of: {}", pairs.join(", "));
                return Err(field(name("gpu"), problem, mend));
            }
            None => {}
        }
        for (what, value) in
            [("count", kind.count), ("per_host", kind.per_host), ("max_num_seqs", kind.max_num_seqs)]
        {
            if value == 0 {
                return Err(field(name(what), "is 0", "give at least 1"));
            }
        }
        if kind.max_num_batched_tokens < kind.max_num_seqs {
            let problem =
                format!("{} is less than max_num_seqs, {}", kind.max_num_batched_tokens, kind.max_num_seqs);
            let mend =
                "every sequence that decodes takes one token of a step: raise it, or lower max_num_seqs";
            return Err(field(name("max_num_batched_tokens"), problem, mend));
        }
        if !(1024..=1 << 32).contains(&kind.kv_tokens) {
            let mend = "vLLM prints it at its start (GPU KV cache size); 1,024 to 2^32";
            return Err(field(name("kv_tokens"), format!("{} tokens of KV", kind.kv_tokens), mend));
        }
        if kind.host_kv_tokens > 1 << 32 {
            let problem = format!("{} tokens of KV", kind.host_kv_tokens);
            return Err(field(name("host_kv_tokens"), problem, "at most 2^32"));
        }
        positive(&name("host_gbit"), kind.host_gbit)?;
        Ok(())
    }

    fn check_failures(&self) -> Result<(), FleetError> {
        let outages = self.outages.iter().map(|of| (of.engine, of.from_seconds, of.until_seconds));
        check_times("outages", "engine", self.len() as u32, outages.collect())?;
        let cards = self.cards.iter().map(|of| (of.host, of.from_seconds, of.until_seconds));
        check_times("cards", "host", self.hosts(), cards.collect())?;
        for (at, card) in self.cards.iter().enumerate() {
            not_negative(&format!("cards[{at}].gbit"), card.gbit)?;
        }
        Ok(())
    }

    fn check_links(&self) -> Result<(), FleetError> {
        let links = &self.links;
        positive("links.gbit", links.gbit)?;
        for (at, choice) in links.choices.iter().enumerate() {
            positive(&format!("links.choices[{at}]"), *choice)?;
        }
        positive("links.efficiency", links.efficiency)?;
        if links.efficiency > 1.0 {
            let problem = format!("{} is more than the whole", links.efficiency);
            return Err(field("links.efficiency", problem, "give a share between 0 and 1"));
        }
        for (name, gbit) in [("transfer_gbit", links.transfer_gbit), ("spine_gbit", links.spine_gbit)] {
            gbit.map_or(Ok(()), |gbit| positive(&format!("links.{name}"), gbit))?;
        }
        positive("links.local_gbit", links.local_gbit)?;
        not_negative("links.rtt_us", links.rtt_us)
    }
}

/// Times at which something of a number below `count` is otherwise than it should be.
fn check_times(
    table: &str,
    what: &str,
    count: u32,
    times: Vec<(u32, f64, Option<f64>)>,
) -> Result<(), FleetError> {
    for (at, (number, from, until)) in times.iter().enumerate() {
        let name = |name: &str| format!("{table}[{at}].{name}");
        if *number >= count {
            let mend = format!("{what}s are numbered from 0 to {}", count - 1);
            return Err(field(name(what), format!("there is no {what} {number}"), mend));
        }
        not_negative(&name("from_seconds"), *from)?;
        if let Some(until) = until
            && !(until.is_finite() && until > from)
        {
            return Err(field(
                name("until_seconds"),
                format!("is {until}"),
                "give a time after from_seconds",
            ));
        }
        let before = |(other, began, ended): &(u32, f64, Option<f64>)| {
            other == number
                && ended.is_none_or(|ended| *from < ended)
                && until.is_none_or(|until| *began < until)
        };
        if let Some(other) = times[..at].iter().position(before) {
            let mend = format!("one table for each time of a {what}");
            return Err(field(name("from_seconds"), format!("{table}[{other}] is not over then"), mend));
        }
    }
    Ok(())
}

fn check_speed(name: &str, speed: &Speed) -> Result<(), FleetError> {
    let Speed { a, b, c, d, e, f, kv_kib } = *speed;
    for (constant, value) in [("a", a), ("b", b), ("c", c), ("d", d), ("e", e), ("f", f)] {
        not_negative(&format!("{name}.{constant}"), value)?;
    }
    if d + e + f <= 0.0 {
        return Err(field(name, "decoding takes no time", "give d, e or f, in milliseconds"));
    }
    positive(&format!("{name}.kv_kib"), kv_kib)
}

fn positive(name: &str, value: f64) -> Result<(), FleetError> {
    match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(field(name, format!("is {value}"), "give a number above 0")),
    }
}

fn not_negative(name: &str, value: f64) -> Result<(), FleetError> {
    match value.is_finite() && value >= 0.0 {
        true => Ok(()),
        false => Err(field(name, format!("is {value}"), "give 0 or more")),
    }
}
