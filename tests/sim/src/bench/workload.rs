//! What arrives: a trace by path, or generated sessions.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use super::oracle::{self, Bound};
use super::recording::Recording;
use crate::Nanos;
use crate::fleet::{Fleet, Slo};
use crate::sim::Window;
use crate::trace::{
    Approximate, Azure, Conversations, First, Generator, Mooncake, MultiTurn, MultiTurnOptions, Scaled,
    Sessions, SessionsOptions, Shape, Source,
};

/// What a trace's file is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// [`Mooncake`].
    Mooncake,
    /// [`Azure`].
    Azure,
    /// [`Sessions`].
    Sessions,
    /// [`MultiTurn`].
    MultiTurn,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 4] = [Format::Mooncake, Format::Azure, Format::Sessions, Format::MultiTurn];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::Mooncake => "mooncake",
            Format::Azure => "azure",
            Format::Sessions => "sessions",
            Format::MultiTurn => "multiturn",
        }
    }
}

/// No format has this name.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("no format is called `{0}`; there are mooncake, azure, sessions and multiturn")]
pub struct UnknownFormat(String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        let format = Format::ALL.into_iter().find(|format| format.name() == text);
        format.ok_or_else(|| UnknownFormat(text.to_owned()))
    }
}

/// Where requests come from.
#[derive(Clone, Debug)]
enum Origin {
    Generated(Vec<Shape>),
    File(PathBuf, Format),
    Recorded(Arc<Recording>),
}

/// Requests that can be run again and again, at any rate.
#[derive(Clone, Debug)]
pub struct Workload {
    name: String,
    origin: Origin,
    /// At most so many requests; generated ones have no other end.
    requests: Option<u64>,
    copies: u32,
    block_tokens: u32,
    seed: u64,
    /// Of what is recorded.
    rate_unit: &'static str,
}

/// Requests of a generated workload where nobody says how many.
pub const GENERATED_REQUESTS: u64 = 5000;
/// A closed-loop trace in memory comes in as many copies as fit into so many requests, where nobody wants fewer.
const CLOSED_LOOP_REQUESTS: u64 = 2000;

impl Workload {
    /// Names of generated workloads.
    pub const GENERATED: [&'static str; 4] = ["mix", "chat", "agent", "documents"];

    /// The generated workload of one of [`Workload::GENERATED`]; its rate is sessions per second.
    pub fn named(name: &str, block_tokens: u32, seed: u64) -> Option<Self> {
        let shapes = match name {
            "mix" => Shape::mix(),
            "chat" => vec![Shape::chat()],
            "agent" => vec![Shape::agent()],
            "documents" => vec![Shape::documents()],
            _ => return None,
        };
        Some(Self::generated(name, shapes, block_tokens, seed))
    }

    /// A workload of these shapes; its rate is sessions per second.
    pub fn generated(name: &str, shapes: Vec<Shape>, block_tokens: u32, seed: u64) -> Self {
        let requests = Some(GENERATED_REQUESTS);
        Self {
            name: name.to_owned(),
            origin: Origin::Generated(shapes),
            requests,
            copies: 1,
            block_tokens,
            seed,
            rate_unit: "",
        }
    }

    /// A trace; its rate is a factor on the recorded one.
    pub fn file(path: &Path, format: Format, block_tokens: u32, seed: u64) -> Self {
        let name = path.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let origin = Origin::File(path.to_owned(), format);
        Self { name, origin, requests: None, copies: 1, block_tokens, seed, rate_unit: "" }
    }

    /// With at most so many requests.
    pub fn with_requests(mut self, requests: u64) -> Self {
        self.requests = Some(requests);
        self
    }

    /// In so many copies, as [`Recording::replay`] spreads them. Generated workloads do not end, so they have none.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn with_copies(mut self, copies: u32) -> io::Result<Self> {
        if matches!(self.origin, Origin::Generated(_)) || copies <= 1 {
            return Ok(self);
        }
        self.copies = copies;
        self.recorded()
    }

    /// The same in memory, so that it need not be read again for each run. What is limited to a number of requests then ends with the session
    /// that reaches it: all sessions are whole, and whatever the rate, the requests are the same. A closed-loop trace of few requests is repeated.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn recorded(mut self) -> io::Result<Self> {
        let most = self.requests.unwrap_or(u64::MAX);
        let recording = match &self.origin {
            Origin::Recorded(_) => return Ok(self),
            Origin::File(path, format) => Recording::read(&mut *self.read(path, *format, false)?, most),
            Origin::Generated(shapes) => {
                let mut sessions = Generator::new(shapes.clone(), 1.0, self.block_tokens, self.seed);
                Recording::read(&mut sessions, most)
            }
        };
        self.rate_unit = self.rate_unit();
        if recording.is_closed_loop() && matches!(self.origin, Origin::File(..)) {
            let wanted = most.min(CLOSED_LOOP_REQUESTS);
            self.copies = self.copies.max((wanted / recording.requests().max(1)) as u32);
        }
        self.origin = Origin::Recorded(Arc::new(recording));
        self.requests = None;
        Ok(self)
    }

    /// Whether it is [recorded](Workload::recorded) and its requests wait for others.
    pub fn is_closed_loop(&self) -> bool {
        matches!(&self.origin, Origin::Recorded(recording) if recording.is_closed_loop())
    }

    /// Requests per second that it offers at a rate of 1: of the time in which its sessions begin. Of one that is not
    /// [recorded](Workload::recorded) it is not known.
    pub fn offered_per_second(&self) -> Option<f64> {
        match &self.origin {
            Origin::Recorded(recording) => Some(recording.per_second() * f64::from(self.copies)),
            Origin::Generated(_) | Origin::File(..) => None,
        }
    }

    /// Its name in reports: of a generated one as given, of a trace its file's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// How many requests a run of it has, at most; `None` where that shows only at the end.
    pub fn requests(&self) -> Option<u64> {
        let there = match &self.origin {
            Origin::Recorded(recording) => Some(recording.requests() * u64::from(self.copies)),
            Origin::Generated(_) | Origin::File(..) => None,
        };
        match (there, self.requests) {
            (Some(there), Some(most)) => Some(there.min(most)),
            (there, most) => there.or(most.filter(|_| matches!(self.origin, Origin::Generated(_)))),
        }
    }

    /// What a rate of 1 means.
    pub fn rate_unit(&self) -> &'static str {
        match self.origin {
            Origin::Generated(_) => "sessions/s",
            Origin::File(..) => "x recorded",
            Origin::Recorded(_) => self.rate_unit,
        }
    }

    fn read(&self, path: &Path, format: Format, keep_text: bool) -> io::Result<Box<dyn Source>> {
        let (block_tokens, seed) = (self.block_tokens, self.seed);
        Ok(match format {
            Format::Mooncake => Box::new(Mooncake::open(path, block_tokens)?),
            Format::Azure => Box::new(Azure::open(path, block_tokens)?),
            Format::Sessions => {
                let options = SessionsOptions { block_tokens, keep_text, ..SessionsOptions::default() };
                Box::new(Sessions::open(path, options, Approximate)?)
            }
            Format::MultiTurn => {
                let options =
                    MultiTurnOptions { block_tokens, seed, keep_text, ..MultiTurnOptions::default() };
                Box::new(MultiTurn::open(path, options, Approximate)?)
            }
        })
    }

    /// The requests, at this rate; what is not positive counts as 1.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn open(&self, rate: f64) -> io::Result<Box<dyn Source>> {
        let source = self.whole(rate, false)?;
        Ok(match self.requests {
            Some(requests) => Box::new(First::new(source, requests)),
            None => source,
        })
    }

    /// The same in a steady state, where the workload is [recorded](Workload::recorded), in a closed loop, and not all of it begins at once: sessions begin
    /// at this rate without end, and what is measured begins when as many of them overlap as will ever do.
    ///
    /// In a closed loop only sessions begin at a rate; their later turns take their time. A recording that is run once from its beginning to its end is over
    /// before its sessions overlap, however high the rate: no rate would break an SLO. So it is repeated. The time before the window is what a
    /// session takes on average where each of its turns takes all the time that the SLOs allow, which few sessions exceed as long as the SLOs are kept. The
    /// window is as many [laps](Workload::laps) as take at least as long again: within less than a session's time engines that were given too much have
    /// not yet come to a standstill. As many requests arrive in a lap as the recording has, those of earlier laps' sessions standing for those of its own that come later.
    pub fn steady(&self, rate: f64, slo: &Slo) -> Option<(Box<dyn Source>, Window)> {
        let Origin::Recorded(recording) = &self.origin else { return None };
        let laps = self.laps(rate, slo)?;
        // In the recording's time and in the run's.
        let recorded = |time: Nanos| (time as f64 * rate).round() as Nanos;
        let run = |time: Nanos| (time as f64 / rate).round() as Nanos;
        let before = recording.session_within(slo);
        let source = Scaled::new(recording.laps(self.copies, recorded(before)), rate);
        Some((Box::new(source), Window { from: before, until: before + run(laps * recording.span()) }))
    }

    /// How many laps a [steady state](Workload::steady) is measured for: times in which all sessions of the recording begin once.
    pub fn laps(&self, rate: f64, slo: &Slo) -> Option<u64> {
        let Origin::Recorded(recording) = &self.origin else { return None };
        if !self.is_closed_loop() || recording.span() == 0 {
            return None;
        }
        let sessions = recording.session_within(slo) as f64 * rate / recording.span() as f64;
        Some((sessions.ceil() as u64).max(1))
    }

    /// Bounds for it on a fleet, whatever the mode. In a [steady state](Workload::steady) the blocks that several sessions have are there already; the
    /// bounds are those of a lap.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn bound(&self, fleet: &Fleet, rate: f64) -> io::Result<Bound> {
        let there = match &self.origin {
            Origin::Recorded(recording) if self.is_closed_loop() => recording.common().collect(),
            _ => HashSet::new(),
        };
        Ok(oracle::bound_after(fleet, self.block_tokens, there, &mut *self.open(rate)?))
    }

    /// The same as sessions, each of them whole, and with their text where the trace has it and is not [recorded](Workload::recorded).
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn conversations(&self, rate: f64) -> io::Result<Conversations<Box<dyn Source>>> {
        Ok(Conversations::new(self.whole(rate, true)?, self.requests.unwrap_or(u64::MAX)))
    }

    /// All requests that there are.
    fn whole(&self, rate: f64, keep_text: bool) -> io::Result<Box<dyn Source>> {
        Ok(match &self.origin {
            Origin::Generated(shapes) => {
                let sessions = if rate.is_finite() && rate > 0.0 { rate } else { 1.0 };
                Box::new(Generator::new(shapes.clone(), sessions, self.block_tokens, self.seed))
            }
            Origin::File(path, format) => Box::new(Scaled::new(self.read(path, *format, keep_text)?, rate)),
            Origin::Recorded(recording) => Box::new(Scaled::new(recording.replay(self.copies), rate)),
        })
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if self.copies > 1 {
            write!(f, " x{}", self.copies)?;
        }
        Ok(())
    }
}
