//! The process that outlives this one by a moment, to clean up after it.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::Pid;

/// Reads `+ GROUP` and `- GROUP` lines; at the end of the input, kills the groups that are left and removes
/// the directory, if one was named.
const SCRIPT: &str = r#"
trap '' HUP INT QUIT TERM
groups=' '
while read -r sign group; do
    case $sign in
        +) groups="$groups$group " ;;
        -) groups="${groups%% $group *} ${groups#* $group }" ;;
    esac
done
for group in $groups; do kill -s KILL -- "-$group" 2>/dev/null; done
if [ -n "$1" ]; then rm -rf -- "$1"; fi
"#;

/// Kills process groups when this process is gone, however it went.
///
/// It is a shell in a process group of its own that reads from a pipe whose other end only this process
/// holds. Unlike a parent-death signal this reaches whole groups, and does not depend on which thread started
/// a child.
pub(crate) struct Watchdog {
    child: Child,
    /// `None` once closed.
    pipe: Mutex<Option<ChildStdin>>,
}

impl Watchdog {
    /// Starts it. At the end it removes `dir`, if given.
    pub(crate) fn start(dir: Option<&Path>) -> io::Result<Arc<Self>> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "baton-fleet-watchdog"])
            .args(dir)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let pipe = Mutex::new(child.stdin.take());
        Ok(Arc::new(Self { child, pipe }))
    }

    /// From now on this group is killed when this process ends.
    pub(crate) fn watch(&self, group: Pid) -> io::Result<()> {
        self.tell('+', group)
    }

    /// The group is gone; its number may come to name another.
    pub(crate) fn forget(&self, group: Pid) {
        // A dead watchdog forgets too.
        let _ = self.tell('-', group);
    }

    fn tell(&self, sign: char, group: Pid) -> io::Result<()> {
        let mut line = String::new();
        let _ = writeln!(line, "{sign} {}", group.as_raw_nonzero());
        let mut pipe = self.pipe.lock().unwrap_or_else(PoisonError::into_inner);
        pipe.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write_all(line.as_bytes())
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        *self.pipe.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let _ = self.child.wait();
    }
}
