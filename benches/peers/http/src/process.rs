//! Child processes in groups of their own, ended when dropped.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group};

/// A program, with whatever it starts.
pub struct Program {
    child: Child,
    group: Pid,
}

impl Program {
    /// Starts it; its output goes to a file.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        use std::os::unix::process::CommandExt;

        let log = std::fs::File::create(log)?;
        let child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{} does not start", command.get_program().display()))?;
        let group = Pid::from_raw(child.id().cast_signed()).context("a process id")?;
        Ok(Self { child, group })
    }

    /// Whether it ended by itself.
    pub fn ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Seconds of processor time that the group has used, in user and in kernel mode.
    pub fn cpu_seconds(&self) -> f64 {
        let group = i64::from(self.group.as_raw_nonzero().get());
        std::fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                entry.file_name().to_str()?.parse::<u32>().ok()?;
                let stat = Stat::of(&entry.path())?;
                (stat.0[2] == group).then(|| stat.seconds(11))
            })
            .sum()
    }
}

/// Seconds of processor time that this process has used, and those that its children had when they were waited for.
pub fn own_cpu_seconds() -> (f64, f64) {
    Stat::of(Path::new("/proc/self")).map_or((0.0, 0.0), |stat| (stat.seconds(11), stat.seconds(13)))
}

/// What `/proc/PID/stat` says behind the name, which may hold anything.
struct Stat(Vec<i64>);

impl Stat {
    fn of(process: &Path) -> Option<Self> {
        let stat = std::fs::read_to_string(process.join("stat")).ok()?;
        let fields: Vec<i64> =
            stat.rsplit_once(") ")?.1.split(' ').map(|field| field.trim().parse().unwrap_or(0)).collect();
        (fields.len() > 14).then_some(Self(fields))
    }

    /// The time in user mode at a place and that in kernel mode behind it, together.
    fn seconds(&self, at: usize) -> f64 {
        (self.0[at] + self.0[at + 1]) as f64 / rustix::param::clock_ticks_per_second() as f64
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = kill_process_group(self.group, Signal::KILL);
        let _ = self.child.wait();
    }
}
