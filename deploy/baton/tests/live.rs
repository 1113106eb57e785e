//! `baton bench live` against small servers of the test's own.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// What happens to a request.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// It is answered after so many milliseconds.
    After(u64),
    /// It gets this status.
    Status(u16),
    /// Its stream reports an error.
    Error,
    /// Its stream breaks off after a token.
    Torn,
}

/// A request's body and headers.
type Seen = (Value, HashMap<String, String>);

/// A server that computes for one request at a time and speaks just enough HTTP.
struct Server {
    url: String,
    /// The requests for answers, in the order in which they came.
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    fn start(fate: impl Fn(usize) -> Fate + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (engine, fate, all) = (Arc::new(Mutex::new(())), Arc::new(fate), Arc::clone(&seen));
        // Ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (engine, fate, seen) = (Arc::clone(&engine), Arc::clone(&fate), Arc::clone(&all));
                thread::spawn(move || {
                    // A client that goes away is none of the server's business.
                    let _ = answer(stream.unwrap(), &engine, &*fate, &seen);
                });
            }
        });
        Self { url, seen }
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

/// The ids that all answers consist of.
const ANSWER: [u32; 2] = [901, 902];

fn answer(
    stream: TcpStream,
    engine: &Mutex<()>,
    fate: &dyn Fn(usize) -> Fate,
    seen: &Mutex<Vec<Seen>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = HashMap::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    const HEAD: &str = "HTTP/1.1 200 OK\r\nconnection: close\r\n";
    let whole = |stream: &mut TcpStream, value: Value| {
        write!(stream, "{HEAD}content-type: application/json\r\n\r\n{value}")
    };
    match path.as_str() {
        "/v1/models" => return whole(&mut stream, json!({"data": [{"id": "small", "max_model_len": 4000}]})),
        "/tokenize" => return whole(&mut stream, json!({"tokens": (100..300).collect::<Vec<u32>>()})),
        _ => {}
    }
    let number = {
        let mut seen = seen.lock().unwrap();
        seen.push((serde_json::from_slice(&body).unwrap(), headers));
        seen.len() - 1
    };
    let engine = engine.lock().unwrap();
    let fate = fate(number);
    match fate {
        Fate::After(ms) => thread::sleep(Duration::from_millis(ms)),
        Fate::Status(status) => {
            return write!(stream, "HTTP/1.1 {status} No\r\nconnection: close\r\n\r\nbusy");
        }
        Fate::Error | Fate::Torn => {}
    }
    drop(engine);
    write!(stream, "{HEAD}content-type: text/event-stream\r\n\r\n")?;
    let mut event = |value: &dyn std::fmt::Display| {
        write!(stream, "data: {value}\n\n")?;
        stream.flush()
    };
    let token = |text: &str, id: u32, reason: Option<&str>| json!({"choices": [{"text": text, "token_ids": [id], "finish_reason": reason}]});
    event(&token("a", ANSWER[0], None))?;
    match fate {
        Fate::Torn => return Ok(()),
        Fate::Error => return event(&json!({"error": {"message": "the engine died"}})),
        Fate::After(_) | Fate::Status(_) => {}
    }
    event(&token("b", ANSWER[1], Some("length")))?;
    let usage =
        json!({"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}});
    event(&json!({"choices": [], "usage": usage}))?;
    event(&"[DONE]")
}

/// A trace of these rows in a folder of its own.
struct Trace {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Trace {
    fn new(rows: impl IntoIterator<Item = Value>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.jsonl");
        let text: String = rows.into_iter().map(|row| format!("{row}\n")).collect();
        fs::write(&path, text).unwrap();
        Self { _folder: folder, path }
    }

    /// So many requests of one turn, one each `gap_ms`.
    fn steady(requests: u64, gap_ms: u64) -> Self {
        let row = |at: u64| json!({"timestamp": at * gap_ms, "turns": [{"text": format!("question {at}"), "output_length": 2}]});
        Self::new((0..requests).map(row))
    }
}

fn command(url: &str, trace: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_baton"));
    command.args(["bench", "live", "--url", url, "--format", "multiturn", "--json", "--trace"]);
    command.arg(trace).args(more);
    command
}

fn results(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn live(url: &str, trace: &Trace, more: &[&str]) -> Value {
    results(&command(url, &trace.path, more).output().unwrap())
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// No coordinated omission: one request is stalled for a second while one more is due every 20 ms. Only one may be under way, so those behind it
/// are not even sent, and still their wait is measured.
#[test]
fn a_stall_is_charged_to_the_requests_that_were_due_behind_it() {
    let stalls = |at: usize| Fate::After(if at == 25 { 1000 } else { 0 });
    let trace = Trace::steady(100, 20);
    let open = live(&Server::start(stalls).url, &trace, &["--in-flight", "1"]);
    let open = &open["results"][0];
    assert_eq!((open["requests"].as_u64(), open["finished"].as_u64()), (Some(100), Some(100)));
    // 50 requests are due in that second; they wait for what is left of it, 510 ms on average. Times of a loaded machine are longer only.
    let (ttft, lag) = (&open["ttft_ms"], &open["lag_ms"]);
    assert!(number(&ttft["mean"]) >= 250.0 && number(&lag["mean"]) >= 240.0, "{open}");
    assert!(number(&ttft["p90"]) >= 780.0 && number(&ttft["max"]) >= 1000.0, "{open}");
    assert!(number(&open["e2e_ms"]["p90"]) >= 780.0, "{open}");
    assert!(open["held_back"].as_u64().unwrap() >= 45 && open["most_in_flight"] == 1, "{open}");

    // In the closed loop the next request is due when the one before has ended: one of them is slow.
    let closed = live(&Server::start(stalls).url, &trace, &["--concurrency", "1"]);
    let closed = &closed["results"][0];
    assert_eq!((closed["finished"].as_u64(), closed["held_back"].as_u64()), (Some(100), Some(0)));
    assert!(number(&closed["ttft_ms"]["max"]) >= 1000.0, "{closed}");
    assert!(number(&closed["ttft_ms"]["p90"]) < 500.0, "{closed}");
}

#[test]
fn without_a_bound_that_bites_requests_are_sent_when_they_are_due() {
    let server = Server::start(|at| Fate::After(if at == 5 { 500 } else { 0 }));
    let json = live(&server.url, &Trace::steady(30, 20), &["--ttft-ms", "300"]);
    let result = &json["results"][0];
    assert_eq!((result["held_back"].as_u64(), result["finished"].as_u64()), (Some(0), Some(30)));
    assert!(result["most_in_flight"].as_u64().unwrap() >= 10, "{result}");
    assert!(number(&result["ttft_ms"]["max"]) >= 500.0, "{result}");
    // Those due in the first 200 ms of the stall are late, the one that stalls first of all.
    let late = result["late_first_token"].as_u64().unwrap();
    assert!(late >= 9, "{result}");
    assert_eq!(number(&result["attainment"]), (30 - late) as f64 / 30.0);
    assert_eq!((result["hit_tokens"].as_u64(), number(&result["hit_rate"])), (Some(120), 0.4));
}

#[test]
fn two_servers_get_the_same_requests_and_are_compared() {
    let (fast, slow) = (Server::start(|_| Fate::After(0)), Server::start(|_| Fate::After(60)));
    let turns = |session: u64| {
        let turn = |length: u64| json!({"input_length": length, "output_length": 2, "delay": 5});
        json!({"timestamp": 30 * session, "turns": [turn(100), turn(50)]})
    };
    let trace = Trace::new((0..8).map(turns));
    for paced in [&["--rate", "2"][..], &["--concurrency", "2"], &["--poisson", "50"]] {
        let json = live(&fast.url, &trace, &[&["--against", &slow.url, "--seed", "3"], paced].concat());
        assert!(json["command"].as_str().unwrap().starts_with("baton bench live --url"), "{json}");
        assert_eq!(
            (json["seed"].as_u64(), json["version"].as_str()),
            (Some(3), Some(env!("CARGO_PKG_VERSION")))
        );
        for result in json["results"].as_array().unwrap() {
            assert_eq!((result["requests"].as_u64(), result["finished"].as_u64()), (Some(16), Some(16)));
            assert_eq!(result["output_tokens"], 32);
        }
        assert!(number(&json["ratios"]["ttft_p50"]) < 1.0, "{json}");
        let bodies = |server: &Server| {
            let mut bodies: Vec<String> = server.seen().iter().map(|(body, _)| body.to_string()).collect();
            bodies.sort();
            bodies
        };
        assert_eq!(bodies(&fast), bodies(&slow));
    }
}

#[test]
fn later_turns_go_on_from_the_answer_that_was_given() {
    let server = Server::start(|_| Fate::After(0));
    let lengths = json!({"turns": [
        {"input_length": 100, "output_length": 7}, {"input_length": 50, "output_length": 2}, {"input_length": 9, "output_length": 2}
    ]});
    let chat = json!({"messages": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}, {"role": "assistant", "content": "recorded"},
        {"role": "user", "content": "two"}, {"role": "assistant", "content": "recorded"}
    ]});
    live(
        &server.url,
        &Trace::new([lengths, chat]),
        &["--concurrency", "1", "--header", "x-baton-policy: colocated"],
    );
    let seen = server.seen();
    assert_eq!(seen.len(), 5);
    assert!(seen.iter().all(|(_, headers)| headers["x-baton-policy"] == "colocated"));
    let ids = |at: usize| -> Vec<u64> {
        seen[at].0["prompt"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
    };
    // Lengths are the trace's, also where an answer was shorter than it says.
    assert_eq!([ids(0).len(), ids(1).len(), ids(2).len()], [100, 157, 168]);
    assert_eq!(ids(1)[..100], ids(0));
    assert_eq!(ids(1)[100..102], ANSWER.map(u64::from));
    assert_eq!(ids(2)[..157], ids(1));
    assert_eq!((seen[0].0["max_tokens"].as_u64(), seen[0].0["ignore_eos"].as_bool()), (Some(7), Some(true)));
    assert_eq!(seen[0].1["x-session-id"], seen[2].1["x-session-id"]);
    let messages = seen[4].0["messages"].as_array().unwrap();
    let said: Vec<&str> = messages.iter().map(|message| message["content"].as_str().unwrap()).collect();
    assert_eq!(said, ["be brief", "one", "ab", "two"]);
}

#[test]
fn failures_are_counted_by_kind_and_end_their_session() {
    let fate = |at: usize| match at {
        1 => Fate::Status(503),
        3 => Fate::Error,
        5 => Fate::Torn,
        _ => Fate::After(0),
    };
    let server = Server::start(fate);
    let turns = |count: usize| json!({"turns": vec![json!({"text": "hello", "output_length": 2}); count]});
    let long = json!({"turns": [{"input_length": 3999, "output_length": 2}]});
    let trace = Trace::new([turns(3), turns(2), turns(2), long]);
    // Requests 0 and 1 are of the first session, 2 and 3 of the second, 4 and 5 of the third.
    let output = command(&server.url, &trace.path, &["--concurrency", "1"]).output().unwrap();
    let result = &results(&output)["results"][0];
    let failed =
        json!({"after_a_failure": 1, "ended_early": 1, "error_in_stream": 1, "http_503": 1, "too_long": 1});
    assert_eq!(result["failed"], failed);
    assert_eq!((result["requests"].as_u64(), result["finished"].as_u64()), (Some(8), Some(3)));
    assert!(String::from_utf8_lossy(&output.stderr).contains("http_503"), "{output:?}");
    assert_eq!(server.seen().len(), 6);
}

#[test]
fn ctrl_c_keeps_what_is_done() {
    let server = Server::start(|at| Fate::After(if at < 20 { 0 } else { 60_000 }));
    let trace = Trace::steady(100_000, 5);
    let mut child = command(&server.url, &trace.path, &[]).stdout(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while server.seen().len() < 30 {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let json: Value = serde_json::from_str(&text).unwrap();
    let result = &json["results"][0];
    assert_eq!((json["interrupted"].as_bool(), result["finished"].as_u64()), (Some(true), Some(20)));
    assert!(result["unfinished"].as_u64().unwrap() >= 10, "{result}");
}

#[test]
fn what_cannot_be_run_is_said() {
    let message = |more: &[&str]| {
        let output = command("http://127.0.0.1:9", Path::new("/nowhere.jsonl"), more).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(message(&[]).contains("/nowhere.jsonl"), "{}", message(&[]));
    assert!(message(&["--concurrency", "0"]).contains("--concurrency"));
    assert!(message(&["--concurrency", "2", "--poisson", "1"]).contains("--poisson"));
    assert!(message(&["--header", "nothing"]).contains("name:value"));
}
