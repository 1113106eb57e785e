//! The KV memory of an engine, seen through the agent that maps it: what a prompt wrote, and damage to exactly that.
//!
//! Linux only: `/proc/PID/maps` names the shared mappings, `/proc/PID/mem` reads and writes them. A parent may do that to its
//! descendants.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;

use anyhow::{Context, ensure};

/// One shared mapping of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    len: usize,
}

/// A storage's bytes at one moment.
pub struct Snapshot {
    mem: File,
    at: u64,
    bytes: Vec<u8>,
}

impl Snapshot {
    /// Reads the first storage that the agent `pid` maps. Where a model has one storage for each layer, that is one
    /// layer of every block: enough, since each held block lies in every layer.
    pub fn of_agent(pid: u32) -> anyhow::Result<Self> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).context("agent's memory map")?;
        let storages = shared(&maps);
        let Mapping { start, len } = *storages.first().with_context(|| {
            format!("agent {pid} maps no shared memory of its engine (memfd: or /dev/shm)")
        })?;
        let path = format!("/proc/{pid}/mem");
        let mem = OpenOptions::new().read(true).write(true).open(&path).with_context(|| path.clone())?;
        let mut bytes = vec![0; len];
        mem.read_exact_at(&mut bytes, start).with_context(|| format!("read {len} bytes of {path}"))?;
        Ok(Self { mem, at: start, bytes })
    }

    /// Offsets of the bytes that differ now.
    fn changed(&self) -> anyhow::Result<(Vec<u8>, Vec<usize>)> {
        let mut now = vec![0; self.bytes.len()];
        self.mem.read_exact_at(&mut now, self.at).context("read the agent's memory again")?;
        let changed = (0..now.len()).filter(|&i| now[i] != self.bytes[i]).collect::<Vec<_>>();
        ensure!(!changed.is_empty(), "nothing was written to the engine's memory since the snapshot");
        Ok((now, changed))
    }

    /// Flips bits in one byte that was written since the snapshot.
    pub fn corrupt_one_byte(&self) -> anyhow::Result<()> {
        let (now, changed) = self.changed()?;
        let at = changed[changed.len() / 2];
        self.mem.write_all_at(&[now[at] ^ 0x55], self.at + at as u64).context("write one byte")
    }

    /// Flips bits in every byte that was written since the snapshot, and returns how many those are.
    pub fn corrupt_all(&self) -> anyhow::Result<usize> {
        let (now, changed) = self.changed()?;
        for run in changed.chunk_by(|a, b| a + 1 == *b) {
            let bad: Vec<u8> = run.iter().map(|&i| now[i] ^ 0x55).collect();
            self.mem.write_all_at(&bad, self.at + run[0] as u64).context("write a run of bytes")?;
        }
        Ok(changed.len())
    }
}

/// Mappings of shared memory files, in order; parts of one file that lie end to end are one.
fn shared(maps: &str) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [range, mode, _offset, _device, _inode, path, ..] = fields[..] else { continue };
        if !mode.starts_with("rw") || !mode.ends_with('s') {
            continue;
        }
        if !path.starts_with("/memfd:") && !path.starts_with("/dev/shm/") {
            continue;
        }
        let Some((start, end)) = range.split_once('-') else { continue };
        if let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)) {
            found.push(Mapping { start, len: (end - start) as usize });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writable_shared_memory_counts() {
        let maps = "\
            55d0-55e0 r--p 00000000 08:01 1 /usr/bin/x\n\
            7f00-7f80 rw-s 00000000 00:01 5 /memfd:kv (deleted)\n\
            7f80-7f90 r--s 00000000 00:01 6 /memfd:kv (deleted)\n\
            7fa0-7fb0 rw-s 00000000 00:19 7 /dev/shm/torch_1_2 (deleted)\n\
            7fc0-7fd0 rw-p 00000000 00:00 0 \n";
        assert_eq!(
            shared(maps),
            [Mapping { start: 0x7f00, len: 0x80 }, Mapping { start: 0x7fa0, len: 0x10 }]
        );
    }
}
