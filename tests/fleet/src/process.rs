//! One child process, its group and its log.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus};
use tokio::time::Instant;

use crate::error::FleetError;
use crate::watchdog::Watchdog;

/// How often a process is looked at while something is waited for.
pub(crate) const POLL: Duration = Duration::from_millis(20);

/// Waits for a line on its input before it becomes the program: by then the watchdog knows its group. If this
/// process dies before, the line never comes.
const GATE: &str = r#"read -r go && exec "$@" </dev/null"#;

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// Name of the part, and of its log.
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    /// Where it runs.
    pub(crate) dir: PathBuf,
    /// What it says on its standard output and error is added here.
    pub(crate) log: PathBuf,
}

/// A running child that leads a process group. Dropping it kills the group.
pub(crate) struct Process {
    child: Child,
    group: Pid,
    watchdog: Arc<Watchdog>,
    reaped: bool,
}

impl Process {
    pub(crate) fn spawn(job: &Job, watchdog: &Arc<Watchdog>) -> Result<Self, FleetError> {
        let io = |source| FleetError::Io { what: format!("start {}", job.program.display()), source };
        let log = OpenOptions::new().create(true).append(true).open(&job.log).map_err(io)?;
        let child = Command::new("/bin/sh")
            .args(["-c", GATE, "baton-fleet-gate"])
            .arg(&job.program)
            .args(&job.args)
            .envs(job.env.iter().map(|(name, value)| (name, value)))
            .current_dir(&job.dir)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().map_err(io)?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(io)?;
        let group = Pid::from_child(&child);
        let mut process = Self { child, group, watchdog: Arc::clone(watchdog), reaped: false };
        watchdog.watch(group).map_err(io)?;
        let mut gate = process.child.stdin.take().expect("the gate's input is a pipe");
        gate.write_all(b"go\n").map_err(io)?;
        Ok(process)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it did. It stays a zombie, so that its group's number is not given anew.
    pub(crate) fn ended(&self) -> Option<String> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        match rustix::process::waitid(WaitId::Pid(self.group), options) {
            Ok(status) => status.map(|status| describe(&status)),
            Err(error) => Some(format!("wait: {error}")),
        }
    }

    /// Sends a signal to its whole group.
    pub(crate) fn signal(&self, signal: Signal) {
        // The group is there until it was reaped; that all in it are zombies is no error.
        let _ = rustix::process::kill_process_group(self.group, signal);
    }

    /// Asks it to stop, and kills it after `grace`. Returns how it ended, or `None` where it had to be killed.
    pub(crate) async fn stop(mut self, grace: Duration) -> Option<String> {
        if let Some(status) = self.ended() {
            self.kill();
            return Some(status);
        }
        // Only the leader is asked: it knows in which order its own children end.
        let _ = rustix::process::kill_process(self.group, Signal::TERM);
        let deadline = Instant::now() + grace;
        let status = loop {
            match self.ended() {
                Some(status) => break Some(status),
                None if Instant::now() >= deadline => break None,
                None => tokio::time::sleep(POLL).await,
            }
        };
        self.kill();
        status
    }

    /// Kills the whole group and waits for its leader.
    pub(crate) fn kill(&mut self) {
        if !self.reaped {
            self.signal(Signal::KILL);
            let _ = self.child.wait();
            self.reaped = true;
            self.watchdog.forget(self.group);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn describe(status: &WaitIdStatus) -> String {
    if let Some(code) = status.exit_status() {
        format!("exit code {code}")
    } else if let Some(signal) = status.terminating_signal() {
        format!("signal {signal}")
    } else {
        "an unknown status".into()
    }
}

/// What a clean exit is described as.
pub(crate) const CLEAN: &str = "exit code 0";

/// The last lines of a log, at most 4 KiB.
pub(crate) fn tail(log: &Path) -> String {
    const MOST: u64 = 4096;
    let read = || -> io::Result<String> {
        let mut file = File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(MOST)))?;
        let mut bytes = Vec::new();
        file.take(MOST).read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        // The first line is torn unless the log begins with it.
        Ok(match text.split_once('\n') {
            Some((_, rest)) if len > MOST => rest.to_owned(),
            _ => text,
        })
    };
    match read() {
        Ok(text) if text.trim().is_empty() => "(the log is empty)".into(),
        Ok(text) => text.trim_end().to_owned(),
        Err(error) => format!("(no log: {error})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(dir: &Path, script: &str) -> Job {
        Job {
            name: "part".into(),
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            env: vec![("WORD".into(), "hello".into())],
            dir: dir.to_owned(),
            log: dir.join("part.log"),
        }
    }

    fn alive(pid: &str) -> bool {
        // A zombie whose parent has not looked yet is dead all the same.
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim().starts_with('Z')))
    }

    async fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < deadline, "not in time: {what}");
            tokio::time::sleep(POLL).await;
        }
    }

    fn grandchild(dir: &Path) -> Option<String> {
        let text = std::fs::read_to_string(dir.join("part.log")).ok()?;
        text.strip_suffix('\n').map(str::to_owned)
    }

    #[tokio::test]
    async fn output_and_exit_code_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let watchdog = Watchdog::start(None).unwrap();
        let process =
            Process::spawn(&job(dir.path(), "echo $WORD; echo there >&2; exit 3"), &watchdog).unwrap();
        wait_for("exit", || process.ended().is_some()).await;
        assert_eq!(process.ended().unwrap(), "exit code 3");
        assert_eq!(tail(&dir.path().join("part.log")), "hello\nthere");
    }

    #[tokio::test]
    async fn stop_is_gentle_first_and_takes_the_group_along() {
        let dir = tempfile::tempdir().unwrap();
        let watchdog = Watchdog::start(None).unwrap();
        let script = "trap 'exit 0' TERM; sleep 600 & echo $!; while :; do sleep 0.05; done";
        let process = Process::spawn(&job(dir.path(), script), &watchdog).unwrap();
        wait_for("output", || grandchild(dir.path()).is_some()).await;
        let grandchild = grandchild(dir.path()).unwrap();
        assert!(alive(&grandchild));
        assert_eq!(process.stop(Duration::from_secs(20)).await.as_deref(), Some(CLEAN));
        wait_for("the grandchild's end", || !alive(&grandchild)).await;
    }

    #[tokio::test]
    async fn a_deaf_child_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let watchdog = Watchdog::start(None).unwrap();
        let script = "trap '' TERM; echo $$; while :; do sleep 0.05; done";
        let process = Process::spawn(&job(dir.path(), script), &watchdog).unwrap();
        wait_for("output", || grandchild(dir.path()).is_some()).await;
        assert_eq!(process.stop(Duration::from_millis(100)).await, None);
        assert!(!alive(&grandchild(dir.path()).unwrap()));
    }

    #[tokio::test]
    async fn the_watchdog_kills_what_is_watched_and_spares_what_was_forgotten() {
        let kept = tempfile::tempdir().unwrap();
        let gone = tempfile::tempdir().unwrap();
        let doomed = gone.path().join("files");
        std::fs::create_dir_all(doomed.join("deep")).unwrap();
        let sleeper = || Command::new("sleep").arg("600").process_group(0).spawn().unwrap();
        let (mut watched, mut forgotten) = (sleeper(), sleeper());
        let watchdog = Watchdog::start(Some(&doomed)).unwrap();
        for child in [&forgotten, &watched] {
            watchdog.watch(Pid::from_child(child)).unwrap();
        }
        watchdog.forget(Pid::from_child(&forgotten));
        drop(watchdog);
        assert!(!watched.wait().unwrap().success());
        assert!(forgotten.try_wait().unwrap().is_none());
        forgotten.kill().unwrap();
        forgotten.wait().unwrap();
        assert!(!doomed.exists());
        assert!(kept.path().exists());
    }

    /// Names a directory where [`holder`] is to hold a child; the test below runs it as another process.
    const HOLD_IN: &str = "BATON_FLEET_TEST_HOLD_IN";

    #[test]
    fn holder() {
        let Some(dir) = std::env::var_os(HOLD_IN).map(PathBuf::from) else { return };
        let watchdog = Watchdog::start(Some(&dir.join("files"))).unwrap();
        let script = "sleep 600 & echo $!; wait";
        let _process = Process::spawn(&job(&dir, script), &watchdog).unwrap();
        std::thread::sleep(Duration::from_secs(60));
    }

    #[tokio::test]
    async fn nothing_outlives_a_holder_that_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let files = dir.path().join("files");
        std::fs::create_dir(&files).unwrap();
        let mut holder = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process::tests::holder"])
            .env(HOLD_IN, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the grandchild's start", || grandchild(dir.path()).is_some()).await;
        let grandchild = grandchild(dir.path()).unwrap();
        assert!(alive(&grandchild));
        holder.kill().unwrap();
        holder.wait().unwrap();
        wait_for("the grandchild's end", || !alive(&grandchild)).await;
        wait_for("the files' end", || !files.exists()).await;
    }
}
