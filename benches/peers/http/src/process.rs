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
        let ticks: u64 = std::fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                entry.file_name().to_str()?.parse::<u32>().ok()?;
                let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
                // The name in parentheses may hold anything; the fields after it are numbers.
                let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
                let group: i32 = fields.get(2)?.parse().ok()?;
                if group != self.group.as_raw_nonzero().get() {
                    return None;
                }
                Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
            })
            .sum();
        ticks as f64 / rustix::param::clock_ticks_per_second() as f64
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = kill_process_group(self.group, Signal::KILL);
        let _ = self.child.wait();
    }
}
