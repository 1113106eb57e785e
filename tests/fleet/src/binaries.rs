//! Where the programs of a fleet lie.

use std::env;
use std::path::{Path, PathBuf};

use crate::error::FleetError;

/// Finds Baton's own programs: in `dir`, or else beside the current executable or one level up (tests run from
/// `target/*/deps`).
pub(crate) fn ours(name: &str, dir: Option<&Path>) -> Result<PathBuf, FleetError> {
    let looked: Vec<PathBuf> = match dir {
        Some(dir) => vec![dir.to_owned()],
        None => {
            let exe = env::current_exe().map_err(FleetError::io("current executable"))?;
            exe.ancestors().skip(1).take(2).map(Path::to_owned).collect()
        }
    };
    find(name, &looked).ok_or_else(|| FleetError::NoBinary {
        name: name.to_owned(),
        looked,
        mend: "build it with `cargo build --workspace --bins`, in the same profile".into(),
    })
}

/// Finds etcd's server on the search path, under either of its names in Debian, and where Debian has kept it.
pub(crate) fn etcd() -> Result<PathBuf, FleetError> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut looked: Vec<PathBuf> = env::split_paths(&path).collect();
    looked.extend(["/usr/bin", "/usr/local/bin"].map(PathBuf::from));
    ["etcd", "etcd-server"].iter().find_map(|name| find(name, &looked)).ok_or_else(|| FleetError::NoBinary {
        name: "etcd".into(),
        looked,
        mend: "install it with `apt-get install etcd-server`".into(),
    })
}

fn find(name: &str, dirs: &[PathBuf]) -> Option<PathBuf> {
    dirs.iter().map(|dir| dir.join(name)).find(|path| path.is_file())
}
