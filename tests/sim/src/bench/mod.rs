//! What a bench is made of.
//!
//! | module | concept |
//! |---|---|
//! | [`workload`] | what arrives: a trace by path, or generated sessions, at any rate |
//! | [`recording`] | a trace in memory, to be run many times |
//! | [`mode`] | a policy on a fleet in a certain shape |
//! | [`run`] | one mode, one workload, one rate; and many of them at once |
//! | [`capacity`] | the highest rate at which the SLOs are kept |
//! | [`compare`] | modes side by side |
//! | [`oracle`] | what no policy can do better than |
//! | [`sweep`] | which mode wins where |
//! | [`grid`] | adaptive beside the best static mode, on traces, fleets and links |
//! | [`scenarios`] | set-ups whose results others published |
//! | [`chart`], [`page`] | the report |
//!
//! Runs may be spread over threads; what comes out does not depend on their number, and holds no time of a clock.

pub mod capacity;
pub mod chart;
pub mod compare;
pub mod grid;
pub mod mode;
pub mod oracle;
pub mod page;
pub mod recording;
pub mod run;
pub mod scenarios;
pub mod sweep;
pub mod workload;

pub use self::mode::{Mode, ModeError};
pub use self::run::{Bench, BenchError, Run};
pub use self::workload::{Format, Workload};
