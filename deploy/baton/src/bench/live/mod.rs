//! `baton bench live`: a workload sent to running servers, measured as a client sees them.
//!
//! # Times
//! In the *open loop* a session begins when its trace says, or at random, whatever became of those before it; a later turn is due its pause after the
//! turn before it ended, because whoever asks it has to read the answer first. In the *closed loop* so many sessions run at once, and one that ends
//! makes room for the next. In both, TTFT and end-to-end latency count from the time at which a request was *due*, not from when it was sent:
//! where this program is late, or may have no more requests under way, the wait is the server's latency, as it is for its users (no
//! coordinated omission). How late requests were sent is reported beside it.
//!
//! # Prompts
//! Sessions with text are chats: what is said next, behind the answers that this server gave. Requests of which a trace tells block ids or lengths
//! only are completions of token ids that have prefixes in common as the trace's blocks have; behind an answer they go on from the ids
//! that the server generated, where it tells them. All prompts are functions of trace and seed, so a second run with the same seed finds what
//! the first one left in caches.
//!
//! # Two servers
//! Each request goes to both. In the open loop they get it at the same time, and which is first is drawn for each session. In the closed
//! loop each turn goes to one and then to the other, in drawn order, so that they never compute for the same session at once.

mod ask;
mod drive;
mod endpoint;
mod session;
mod tally;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use baton_sim::trace::{Conversations, LEAST_ALPHABET, Prompts, Source};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use self::drive::Pace;
use self::endpoint::{Endpoint, Header};
use self::session::{Common, Side};
use self::tally::{Report, Slo};
use super::load::{self, Shown, Trace};
use super::{Output, progress, table};

/// How often it is looked whether the run is to end early.
const STOP_INTERVAL: Duration = Duration::from_millis(50);

#[derive(Debug, clap::Args)]
pub(crate) struct Live {
    /// An OpenAI server: a coordinator, an engine, any router
    #[arg(long, value_name = "http://HOST:PORT")]
    url: String,
    /// A second server, side by side: each request goes to both
    #[arg(long, value_name = "http://HOST:PORT")]
    against: Option<String>,
    /// Model to ask for [default: the first that each server names]
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    trace: Trace,
    /// Factor on a trace's rate; of generated sessions, how many begin per second
    #[arg(long, default_value = "1", value_parser = load::rate)]
    rate: f64,
    /// Begin sessions at random instead, so many per second on average (requests, of a trace without sessions)
    #[arg(long, value_name = "RATE", value_parser = load::rate, conflicts_with = "rate")]
    poisson: Option<f64>,
    /// Closed loop: so many sessions at once, instead of the trace's times
    #[arg(long, value_name = "SESSIONS", value_parser = clap::value_parser!(u32).range(1..=4096), conflicts_with_all = ["rate", "poisson"])]
    concurrency: Option<u32>,
    /// Most requests under way at each server; what is due beyond waits, and its wait counts
    #[arg(long, value_name = "REQUESTS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536), conflicts_with = "concurrency")]
    in_flight: u32,
    /// Seconds after which a request has failed
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = load::rate)]
    timeout: f64,
    /// Prompts without text are made of token ids below this [default: ids of common words, which the server's /tokenize tells]
    #[arg(long, value_name = "SIZE")]
    vocabulary: Option<u32>,
    /// A header for the first server's requests, such as x-baton-policy:colocated; as often as wanted
    #[arg(long, value_name = "NAME:VALUE")]
    header: Vec<Header>,
    /// The same for the second server
    #[arg(long, value_name = "NAME:VALUE", requires = "against")]
    against_header: Vec<Header>,
    /// For goodput: the first token is to come within this
    #[arg(long, value_name = "MS", value_parser = load::rate)]
    ttft_ms: Option<f64>,
    /// For goodput: mean time between an answer's tokens
    #[arg(long, value_name = "MS", value_parser = load::rate)]
    tpot_ms: Option<f64>,
    /// Send OpenAI's own parameters only; answers may then be shorter than the trace's
    #[arg(long)]
    plain: bool,
    /// Print results as JSON instead of tables
    #[arg(long)]
    json: bool,
}

/// Runs the bench until the workload ends or `stop` is set; what was done by then is shown either way.
pub(super) async fn run(arguments: &Live, stop: &AtomicBool) -> anyhow::Result<()> {
    let workload = arguments.trace.workload()?;
    let rate =
        if arguments.poisson.is_some() || arguments.concurrency.is_some() { 1.0 } else { arguments.rate };
    let conversations = workload.conversations(rate).with_context(|| arguments.trace.trace.clone())?;
    let mut conversations = match arguments.poisson {
        Some(per_second) => conversations.at_random(per_second, arguments.trace.seed),
        None => conversations,
    };
    let endpoints = arguments.endpoints().await?;
    let prompts = arguments.prompts(&endpoints[0], workload.block_tokens()).await;

    let shown = Shown { json: arguments.json, html: None, threads: None };
    let mut output = Output::new(&shown, arguments.trace.seed, stop);
    let bar = progress(workload.requests().unwrap_or(0) * endpoints.len() as u64, "requests");
    let (stopper, stopped) = watch::channel(false);
    let started = Instant::now();
    let common = Common {
        prompts: prompts.map_err(|error| format!("{error:#}")),
        slo: Slo { ttft_ms: arguments.ttft_ms, tpot_ms: arguments.tpot_ms },
        seed: arguments.trace.seed,
        in_flight: arguments.concurrency.unwrap_or(arguments.in_flight),
        started,
        stop: stopped.clone(),
        progress: bar.clone(),
    };
    let side = |endpoint| Arc::new(Side::new(endpoint, common.clone()));
    let sides: Vec<Arc<Side>> = endpoints.into_iter().map(side).collect();
    let pace = match arguments.concurrency {
        Some(sessions) => Pace::Closed { sessions: sessions as usize },
        None => Pace::Open,
    };
    let watching = async {
        while !stop.load(Ordering::Relaxed) {
            tokio::time::sleep(STOP_INTERVAL).await;
        }
        // The receivers live as long as the sides.
        stopper.send_replace(true);
        std::future::pending::<()>().await;
    };
    let driving =
        drive::run(pace, &sides, &mut conversations, arguments.trace.seed, started, stopped.clone());
    tokio::select! {
        driven = driving => driven?,
        () = watching => unreachable!("it waits for ever"),
    }
    bar.finish_and_clear();

    let reports: Vec<Report> = sides.iter().map(|side| side.report()).collect();
    arguments.show(&mut output, &workload.to_string(), workload.rate_unit(), &conversations, &reports)?;
    output.end();
    ensure!(
        stop.load(Ordering::Relaxed) || reports.iter().all(|report| report.finished > 0),
        "no request was answered"
    );
    Ok(())
}

impl Live {
    async fn endpoints(&self) -> anyhow::Result<Vec<Endpoint>> {
        let timeout = Duration::from_secs_f64(self.timeout.min(1e6));
        let reach = async |url: &str, headers: &[Header]| {
            let found = Endpoint::reach(url, self.model.as_deref(), headers.to_vec(), timeout, self.plain);
            found.await.with_context(|| url.to_owned())
        };
        let mut endpoints = vec![reach(&self.url, &self.header).await?];
        if let Some(against) = &self.against {
            endpoints.push(reach(against, &self.against_header).await?);
        }
        Ok(endpoints)
    }

    /// What prompts without text are made of; both servers get the same.
    async fn prompts(&self, endpoint: &Endpoint, block_tokens: u32) -> anyhow::Result<Prompts> {
        let alphabet = match self.vocabulary {
            // Special tokens stand at the beginning of many vocabularies.
            Some(size) => (size / 8..size).collect(),
            None => endpoint.common_tokens().await.context(
                "cannot learn token ids from the server's /tokenize; say the size of the vocabulary with --vocabulary",
            )?,
        };
        let found = alphabet.len();
        match Prompts::new(alphabet, block_tokens, self.trace.seed) {
            Some(prompts) => Ok(prompts),
            None => {
                bail!("{found} token ids to make prompts of, {LEAST_ALPHABET} are needed: give --vocabulary")
            }
        }
    }

    fn show(
        &self,
        output: &mut Output<'_>,
        trace: &str,
        rate_unit: &str,
        conversations: &Conversations<Box<dyn Source>>,
        reports: &[Report],
    ) -> anyhow::Result<()> {
        let rows = conversations.source().rows();
        super::commands::say_bad_rows(rows);
        for report in reports {
            for failure in &report.first_failures {
                eprintln!("{}: {failure}", report.url);
            }
            if report.held_back > 0 {
                eprintln!(
                    "{}: {} requests were due while {} were under way, the most that --in-flight allows: they waited, and their wait is in their latency",
                    report.url, report.held_back, report.most_in_flight
                );
            }
        }
        output.say(table(&tally::HEAD, reports.iter().map(Report::row).collect()));
        output.put("trace", trace)?;
        match (self.concurrency, self.poisson) {
            (Some(sessions), _) => output.put("closed_loop", json!({"sessions": sessions}))?,
            (None, Some(rate)) => output.put("open_loop", json!({"poisson_per_second": rate}))?,
            (None, None) => output.put("open_loop", json!({"rate": self.rate, "unit": rate_unit}))?,
        }
        output.put("slo", json!({"ttft_ms": self.ttft_ms, "tpot_ms": self.tpot_ms}))?;
        output.put("rows", rows)?;
        output.put("results", reports)?;
        if let [first, second] = reports {
            let ratios: Value = tally::ratios(first, second);
            output.say(format!("first over second: {}", tally::line(&ratios)));
            output.put("ratios", ratios)?;
        }
        Ok(())
    }
}
