//! The planner in a running coordinator: engines are given parts while SLOs are missed, and requests are placed by them.

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use baton_proto::control::v1::{self, Role, agent_message::Message as Said};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use self::support::{Agent, Behaviour, Engine, Fleet, client, eventually, paced, register};

const GAUGE: &str = "baton_engines_decode_only";
/// For what must come true under load, on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A request comes after each of these. Its prompt takes 36 ms, a step 12 ms: two engines that do both compute prompts for a good third of
/// their time, so that tokens come every 18 ms; with one for prompts and one for answers they come every 12 ms.
const PAUSE: Duration = Duration::from_millis(50);
const PROMPT: u32 = 500;
const ANSWER: u32 = 24;
const SLOS: [(&str, &str); 2] = [("x-baton-ttft-ms", "1000"), ("x-baton-itl-ms", "14.5")];

/// Two engines and their agents.
struct Pair {
    fleet: Fleet,
    urls: BTreeMap<&'static str, String>,
    /// Each with its reports.
    agents: BTreeMap<&'static str, (Arc<Agent>, JoinHandle<()>)>,
    requests: AtomicU32,
}

impl Pair {
    async fn start() -> Self {
        Self::of([paced::start().await, paced::start().await]).await
    }

    async fn of(engines: [String; 2]) -> Self {
        let fleet = Fleet::start("").await;
        let mut pair =
            Self { fleet, urls: BTreeMap::new(), agents: BTreeMap::new(), requests: AtomicU32::new(0) };
        for (id, url) in ["e0", "e1"].into_iter().zip(engines) {
            pair.urls.insert(id, url);
            pair.register(id, Role::Both).await;
        }
        pair
    }

    /// An agent comes, or comes back, with this role for its engine, and reports from then on.
    async fn register(&mut self, id: &'static str, role: Role) {
        let register = v1::Register { role: role.into(), num_blocks: 20_000, ..register(id, &self.urls[id]) };
        if let Some((_, reports)) = self.agents.remove(id) {
            reports.abort();
        }
        let agent = Arc::new(Agent::connect(&self.fleet, register).await);
        let reporting = agent.clone();
        let reports = tokio::spawn(async move {
            loop {
                reporting.say(Said::Load(v1::EngineLoad::default())).await;
                sleep(Duration::from_millis(250)).await;
            }
        });
        self.agents.insert(id, (agent, reports));
    }

    /// A request whose prompt begins like no other one.
    async fn ask(&self, headers: &[(&str, &str)]) -> reqwest::Response {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let prompt: Vec<u32> = std::iter::once(number).chain(1..PROMPT).collect();
        let body = json!({ "model": "m", "prompt": prompt, "max_tokens": ANSWER, "stream": true });
        let mut request = self.fleet.http.post(self.fleet.url("/v1/completions")).json(&body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.unwrap()
    }

    /// Requests come, each whether those before it are over or not, until that is true.
    async fn busy_until(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let requests = async {
            let mut ticks = interval(PAUSE);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut asked = FuturesUnordered::new();
            loop {
                tokio::select! {
                    _ = ticks.tick() => {
                        asked.push(async { self.ask(&SLOS).await.bytes().await });
                    }
                    Some(_) = asked.next() => {}
                }
            }
        };
        let beside = async {
            while !holds().await {
                sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! {
            () = requests => {}
            ended = timeout(PATIENCE, beside) => ended.unwrap_or_else(|_| panic!("never came true: {what}")),
        }
    }

    async fn decode_only(&self) -> f64 {
        self.fleet.metric(GAUGE).await
    }

    /// What each engine was given to do, as operators see it.
    async fn parts(&self) -> [Role; 2] {
        let mut client = client(&self.fleet, "operator").await.unwrap();
        let engines = client.fleet(v1::FleetRequest {}).await.unwrap().into_inner().engines;
        [engines[0].part(), engines[1].part()]
    }
}

fn header(response: &reqwest::Response, name: &str) -> String {
    response.headers().get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
}

#[tokio::test]
async fn engines_get_parts_that_requests_are_placed_by_unless_an_operator_has_split_them() {
    let mut pair = Pair::start().await;
    pair.register("e1", Role::Decode).await;
    pair.busy_until("requests", async || pair.requests.load(Ordering::Relaxed) >= 150).await;
    assert_eq!((pair.decode_only().await, pair.parts().await), (0.0, [Role::Unspecified; 2]));
    // But for that role there was cause enough.
    pair.register("e1", Role::Both).await;
    pair.busy_until("an engine only decodes", async || pair.decode_only().await == 1.0).await;

    let (prefill, decode) = match pair.parts().await {
        [Role::Decode, Role::Prefill] => ("e1", "e0"),
        [Role::Prefill, Role::Decode] => ("e0", "e1"),
        parts => panic!("{parts:?}"),
    };
    for _ in 0..5 {
        let response = pair.ask(&[("x-baton-explain", "1")]).await;
        let names = ["x-baton-mode", "x-baton-prefill", "x-baton-decode"];
        assert_eq!(names.map(|name| header(&response, name)), ["disaggregated", prefill, decode]);
        let explained: Value = serde_json::from_str(&header(&response, "x-baton-explain")).unwrap();
        let whole =
            explained["options"].as_array().unwrap().iter().find(|option| option["mode"] == "colocated");
        assert_eq!(whole.unwrap()["why_not"], "its engine only decodes for the time being");
    }
    // Who asks for a policy of its own gets what that says.
    let response = pair.ask(&[("x-baton-policy", "colocated")]).await;
    assert_eq!(header(&response, "x-baton-mode"), "colocated");

    pair.register("e1", Role::Decode).await;
    eventually("nothing is given any more", async || pair.decode_only().await == 0.0).await;
    assert_eq!(pair.parts().await, [Role::Unspecified; 2]);
}

#[tokio::test]
async fn requests_that_find_no_room_in_time_count_as_missed() {
    let engines = [Engine::start().await, Engine::start().await];
    engines.iter().for_each(|engine| engine.behave(Behaviour::Hang));
    let pair = Pair::of(engines.map(|engine| engine.url())).await;
    // The first ones never end, and those behind them are turned away: nothing else says that anything is missed.
    pair.busy_until("an engine only decodes", async || pair.decode_only().await == 1.0).await;
    let turned_away = pair.fleet.metric("baton_requests_total{mode=\"none\",outcome=\"no_room\"}").await;
    assert!(turned_away >= 40.0, "{turned_away}");
}
