//! Why a fleet does not run.

use std::io;
use std::path::PathBuf;

use crate::certs::CertError;
use crate::http::HttpError;

/// A fleet that could not be started, or a part of it that does not do what it should. Causes are in the chain of
/// sources, not in the text.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// The spec cannot be started as it is.
    #[error("fleet spec: {0}")]
    Spec(String),
    /// A program that the fleet runs is not there.
    #[error("{name} is not in {}: {mend}", looked.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", "))]
    NoBinary {
        /// The program.
        name: String,
        /// Where it was looked for.
        looked: Vec<PathBuf>,
        /// How to get it.
        mend: String,
    },
    /// A file or process operation failed.
    #[error("{what}")]
    Io {
        /// What was being done, with the path or program.
        what: String,
        /// The system's error.
        source: io::Error,
    },
    /// Certificates could not be made.
    #[error(transparent)]
    Certs(#[from] CertError),
    /// A part ended on its own, or did not come up in time.
    #[error(transparent)]
    Part(Box<PartError>),
    /// Parts ignored SIGTERM and were killed, or ended with an error.
    #[error("not stopped cleanly: {0}")]
    Unclean(String),
    /// A request to a part failed.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The control plane did not answer.
    #[error(transparent)]
    Control(#[from] crate::control::ControlError),
}

/// A part that does not do what it should, and the end of its log.
#[derive(Debug, thiserror::Error)]
#[error("{part} {problem}; the end of {}:\n{tail}", log.display())]
pub struct PartError {
    /// The part, as its log file is named.
    pub part: String,
    /// What is wrong.
    pub problem: String,
    /// Its log.
    pub log: PathBuf,
    /// The log's last lines.
    pub tail: String,
}

impl FleetError {
    /// For `map_err` on a file or process operation.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| FleetError::Io { what, source }
    }

    /// Whether a part found its port taken, so that other ports may do.
    pub(crate) fn is_port_clash(&self) -> bool {
        match self {
            FleetError::Part(error) => {
                let tail = error.tail.to_ascii_lowercase();
                tail.contains("address already in use") || tail.contains("address in use")
            }
            _ => false,
        }
    }
}
