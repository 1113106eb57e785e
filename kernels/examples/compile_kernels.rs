//! Compiles every kernel for each architecture with NVRTC, and compares or writes the PTX that the library embeds.
//!
//! ```text
//! cargo run -p baton-kernels --example compile_kernels -- [--write]
//! ```
//! libnvrtc has to be where the loader finds it; `scripts/kernels-check.sh` sees to that, and to its version: another
//! one makes other PTX.

#![allow(clippy::print_stdout, reason = "a program that prints its results")]

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use cudarc::nvrtc::{result, sys};

/// Every file of kernels.
const SOURCES: [&str; 3] = ["paged", "checksum", "fp8"];
/// A100, H100 and H200, B200.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90", "sm_100"];
/// What the embedded PTX is made for: it runs on this and whatever is newer.
const EMBEDDED: &str = "compute_80";

fn main() -> ExitCode {
    let write = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [flag] if flag == "--write" => true,
        other => {
            eprintln!("compile_kernels: {other:?}: use no argument, or --write");
            return ExitCode::from(2);
        }
    };
    match run(Path::new(env!("CARGO_MANIFEST_DIR")), write) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compile_kernels: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(dir: &Path, write: bool) -> Result<(), String> {
    // SAFETY: it loads NVRTC by name, which runs no code of ours or of the environment's but the library's own.
    if !unsafe { sys::is_culib_present() } {
        return Err("libnvrtc is not found: run `make kernels-check`, which installs it".into());
    }
    for name in SOURCES {
        let path = dir.join(format!("{name}.cu"));
        let source =
            std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        for architecture in ARCHITECTURES {
            let program = Program::compile(name, &source, architecture)?;
            println!("{name}.cu {architecture}: {} bytes", program.cubin_bytes()?);
        }
        let ptx = Program::compile(name, &source, EMBEDDED)?.ptx()?;
        embed(&dir.join("ptx").join(format!("{name}.ptx")), &ptx, write)?;
    }
    Ok(())
}

fn embed(path: &PathBuf, ptx: &str, write: bool) -> Result<(), String> {
    if write {
        return std::fs::write(path, ptx).map_err(|error| format!("{}: {error}", path.display()));
    }
    match std::fs::read_to_string(path) {
        Ok(embedded) if embedded == ptx => Ok(()),
        _ => Err(format!(
            "{} is not what its source makes: run `scripts/kernels-check.sh --write` and commit it",
            path.display()
        )),
    }
}

/// A program of NVRTC's, compiled.
struct Program(sys::nvrtcProgram);

impl Program {
    fn compile(name: &str, source: &str, architecture: &str) -> Result<Self, String> {
        let c_string = |text: &str| CString::new(text).map_err(|error| format!("{name}.cu: {error}"));
        let (source, file) = (c_string(source)?, c_string(&format!("{name}.cu"))?);
        let program = result::create_program(&source, Some(&file)).map(Self);
        let program = program.map_err(|error| format!("{name}.cu: {error}"))?;
        let options = [format!("-arch={architecture}"), "--std=c++17".into()];
        // SAFETY: the program was made above, and lives until its drop.
        let compiled = unsafe { result::compile_program(program.0, &options) };
        // SAFETY: as above.
        let log = unsafe { result::get_program_log(program.0) }.map(|log| text(&log)).unwrap_or_default();
        match compiled {
            Ok(()) if log.trim().is_empty() => Ok(program),
            _ => Err(format!("{name}.cu for {architecture}:\n{log}")),
        }
    }

    fn cubin_bytes(&self) -> Result<usize, String> {
        let mut bytes = 0;
        // SAFETY: the program is compiled, and `bytes` is where the size goes.
        let got = unsafe { sys::nvrtcGetCUBINSize(self.0, &mut bytes) };
        got.result().map_err(|error| error.to_string())?;
        if bytes == 0 { Err("NVRTC made no machine code".into()) } else { Ok(bytes) }
    }

    fn ptx(&self) -> Result<String, String> {
        // SAFETY: the program is compiled.
        let ptx = unsafe { result::get_ptx(self.0) }.map_err(|error| error.to_string())?;
        Ok(text(&ptx))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made in `compile`, and not used any more.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// What stands before the zero.
fn text(chars: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = chars.iter().map(|c| *c as u8).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
