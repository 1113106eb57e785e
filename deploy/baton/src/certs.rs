//! `baton certs`.

use std::path::PathBuf;

use baton_fleet::certs::{Authority, DEFAULT_DAYS};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make an authority: DIR/ca.pem and DIR/ca.key
    Init {
        /// Where to; made if need be
        dir: PathBuf,
        /// Replace an authority that is there: all its certificates are then void
        #[arg(long)]
        force: bool,
    },
    /// Make keys and certificates: DIR/NAME.key and DIR/NAME.pem
    Issue {
        /// Where the authority is
        dir: PathBuf,
        /// `coordinator`, `operator`, or an engine id
        #[arg(required = true)]
        names: Vec<String>,
        /// Validity
        #[arg(long, default_value_t = DEFAULT_DAYS)]
        days: u32,
        /// Replace what is there
        #[arg(long)]
        force: bool,
    },
}

pub(crate) fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Init { dir, force } => {
            Authority::init(&dir, force)?;
            println!("{}", dir.join("ca.pem").display());
            println!("{}  (keep it off the hosts of the fleet)", dir.join("ca.key").display());
        }
        Command::Issue { dir, names, days, force } => {
            let authority = Authority::load(&dir)?;
            for name in names {
                let issued = authority.issue(&name, days, force)?;
                println!("{}\n{}", issued.cert.display(), issued.key.display());
            }
        }
    }
    Ok(())
}
