//! The command as a user runs it. `up` needs the binaries of the whole workspace beside this one.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// For things that have to happen soon; on a loaded machine too.
const PATIENCE: Duration = Duration::from_secs(60);

fn baton(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_baton")).args(args).output().unwrap()
}

#[test]
fn certificates_are_made_once_and_replaced_only_by_force() {
    let dir = tempfile::tempdir().unwrap();
    let pki = dir.path().join("pki").display().to_string();

    let early = baton(&["certs", "issue", &pki, "e0"]);
    assert!(!early.status.success());
    assert!(String::from_utf8_lossy(&early.stderr).contains("baton certs init"), "{early:?}");

    assert!(baton(&["certs", "init", &pki]).status.success());
    assert!(baton(&["certs", "issue", &pki, "coordinator", "e0", "--days", "7"]).status.success());
    let key = Path::new(&pki).join("e0.key");
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);

    let before = fs::read(&key).unwrap();
    let again = baton(&["certs", "issue", &pki, "e0"]);
    assert!(!again.status.success());
    assert!(String::from_utf8_lossy(&again.stderr).contains("--force"), "{again:?}");
    assert_eq!(fs::read(&key).unwrap(), before);
    assert!(baton(&["certs", "issue", &pki, "e0", "--force"]).status.success());
    assert_ne!(fs::read(&key).unwrap(), before);
}

/// `baton up` that has said where its coordinator is.
struct Up {
    child: Child,
    curl: Vec<String>,
    /// Kept open, for what it says at its end.
    _lines: Box<dyn Iterator<Item = String>>,
}

impl Up {
    fn start(dir: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_baton"))
            .args(["up", "--engines", "2", "--dir"])
            .arg(dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut curl = None;
        for line in &mut lines {
            if line.trim_start().starts_with("curl ") {
                // No argument of it holds a single quote.
                let words = line.trim().split('\'').enumerate().flat_map(|(at, part)| match at % 2 {
                    0 => part.split_whitespace().map(str::to_owned).collect(),
                    _ => vec![part.to_owned()],
                });
                curl = Some(words.collect());
            }
            if line.starts_with("Ctrl-C") {
                break;
            }
        }
        Self { child, curl: curl.expect("a curl line"), _lines: Box::new(lines) }
    }

    fn signal(&mut self, signal: Signal) -> std::process::ExitStatus {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap()
    }
}

/// Processes that have the directory in their command line.
fn users_of(dir: &Path) -> Vec<String> {
    let dir = dir.display().to_string();
    let processes =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    processes
        .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).ok())
        .filter(|line| line.contains(&dir))
        .map(|line| line.replace('\0', " "))
        .collect()
}

fn wait_until_unused(dir: &Path) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let users = users_of(dir);
        if users.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "still running: {users:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn up_prints_a_curl_line_that_works_and_stops_cleanly_on_ctrl_c() {
    let dir = tempfile::tempdir().unwrap();
    let mut up = Up::start(dir.path());
    // Coordinator, and two engines with their agents; the command itself names the directory too.
    assert_eq!(users_of(dir.path()).len(), 6);

    let url = up.curl.iter().find(|word| word.starts_with("http://")).unwrap();
    let (base, path) = url.split_at(url.find("/v1").unwrap());
    let body = up.curl.iter().find(|word| word.starts_with('{')).unwrap();
    let body = serde_json::from_str(body).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = baton_fleet::Client::new(base).unwrap();
    let answer = runtime.block_on(client.stream(path, &body, &[])).unwrap();
    assert!(answer.done && !answer.text().is_empty());

    let status = up.signal(Signal::INT);
    assert!(status.success(), "{status}");
    assert_eq!(users_of(dir.path()), Vec::<String>::new());
}

#[test]
fn nothing_outlives_a_killed_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut up = Up::start(dir.path());
    assert!(!up.signal(Signal::KILL).success());
    wait_until_unused(dir.path());
}

#[test]
fn a_bench_says_what_was_run_and_repeats_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let html = dir.path().join("report.html").display().to_string();
    let args =
        ["bench", "compare", "--trace", "agent", "--requests", "120", "--policy", "colocated,4P4D,adaptive"];
    let args = [&args[..], &["--rate", "0.5,1", "--seed", "7", "--json", "--html", &html]].concat();
    let (first, report) = (baton(&args), fs::read(&html).unwrap());
    assert!(first.status.success(), "{first:?}");
    let json: serde_json::Value = serde_json::from_slice(&first.stdout).unwrap();
    assert_eq!((json["seed"].as_u64(), json["version"].as_str()), (Some(7), Some(env!("CARGO_PKG_VERSION"))));
    assert!(json["command"].as_str().unwrap().starts_with("baton bench compare --trace agent"));
    assert_eq!(json["results"].as_array().unwrap().len(), 6);
    // Sessions are whole.
    assert!(json["results"][0]["report"]["finished"].as_u64().unwrap() >= 120);
    let again = baton(&[&args[..], &["--threads", "1"]].concat());
    let mut other: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    other["command"] = json["command"].clone();
    assert_eq!(other, json);
    let same = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(" --threads 1", "");
    assert_eq!(same(&fs::read(&html).unwrap()), same(&report));
    assert!(!same(&report).contains("<script") && same(&report).contains("<svg"));
}

#[test]
fn a_bench_reports_malformed_rows_and_what_it_cannot_do() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace.csv");
    fs::write(&trace, "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,500,10\nnever,1,1\n")
        .unwrap();
    let trace = trace.display().to_string();
    let replay = |more: &[&str]| baton(&[&["bench", "replay", "--trace", &trace, "--json"], more].concat());
    let good = replay(&["--format", "azure"]);
    let json: serde_json::Value = serde_json::from_slice(&good.stdout).unwrap();
    assert_eq!(
        (json["report"]["finished"].as_u64(), json["report"]["rows"]["bad"].as_u64()),
        (Some(1), Some(1))
    );
    assert!(String::from_utf8_lossy(&good.stderr).contains("line 3: TIMESTAMP"), "{good:?}");
    let message = |output: Output| String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message(replay(&[])).contains("--format"));
    assert!(message(replay(&["--format", "azure", "--policy", "best"])).contains("adaptive"));
    assert!(message(replay(&["--format", "azure", "--policy", "1P1D"])).contains("the fleet has 8"));
    assert!(message(replay(&["--format", "azure", "--gbit", "-1"])).contains("--gbit"));
}
