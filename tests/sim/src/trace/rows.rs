//! How reading went.

use std::fmt;
use std::io::{self, BufRead};

use serde::Serialize;

/// Malformed rows that are kept for the report; all are counted.
const KEPT: usize = 20;
/// Longest line that is read: 64 MiB.
const LONGEST_LINE: u64 = 64 << 20;

/// A row that was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BadRow {
    /// Its line, from 1; in a source of several files, the line within its file.
    pub line: u64,
    /// The field at fault; empty where the whole row is.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

impl fmt::Display for BadRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: ", self.line)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.problem)
    }
}

/// A fault of a row whose line is known to the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) field: String,
    pub(super) problem: String,
}

impl Fault {
    pub(super) fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

/// Rows of a source so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rows {
    /// Well-formed rows.
    pub good: u64,
    /// Rows that were left out.
    pub bad: u64,
    /// Rows earlier than one above them; they arrive together with it.
    pub late: u64,
    /// The first of those left out.
    pub first_bad: Vec<BadRow>,
}

impl Rows {
    pub(super) fn reject(&mut self, line: u64, fault: Fault) {
        self.bad += 1;
        if self.first_bad.len() < KEPT {
            self.first_bad.push(BadRow { line, field: fault.field, problem: fault.problem });
        }
    }

    /// `at`, or the time of the latest row where that is later.
    pub(super) fn in_order(&mut self, latest: &mut u64, at: u64) -> u64 {
        self.late += u64::from(at < *latest);
        *latest = (*latest).max(at);
        *latest
    }
}

/// Lines of a file, one at a time.
#[derive(Debug)]
pub(super) struct Lines<R> {
    input: R,
    text: Vec<u8>,
    /// The line read last, from 1.
    pub(super) line: u64,
    /// Bytes before that line, and with it.
    pub(super) span: (u64, u64),
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, text: Vec::new(), line: 0, span: (0, 0) }
    }

    /// The next line that is not blank, without its end. A line that cannot be read is the last one.
    pub(super) fn next(&mut self) -> Option<Result<&str, Fault>> {
        loop {
            self.text.clear();
            self.line += 1;
            match io::Read::take(&mut self.input, LONGEST_LINE).read_until(b'\n', &mut self.text) {
                Ok(0) => return None,
                Ok(read) => {
                    self.span = (self.span.1, self.span.1 + read as u64);
                    if read as u64 == LONGEST_LINE && self.text.last() != Some(&b'\n') {
                        let skipped = self.skip();
                        return Some(Err(Fault::new(
                            "",
                            format!("longer than {LONGEST_LINE} bytes{skipped}"),
                        )));
                    }
                }
                Err(error) => return Some(Err(Fault::new("", format!("cannot be read: {error}")))),
            }
            if !self.text.iter().all(u8::is_ascii_whitespace) {
                break;
            }
        }
        let text =
            std::str::from_utf8(&self.text).map_err(|error| Fault::new("", format!("not UTF-8: {error}")));
        Some(text.map(|text| text.trim_end_matches(['\n', '\r'])))
    }

    /// Drops the rest of an overlong line.
    fn skip(&mut self) -> String {
        loop {
            let (used, ended) = match self.input.fill_buf() {
                Ok([]) => return String::new(),
                Ok(bytes) => match bytes.iter().position(|byte| *byte == b'\n') {
                    Some(at) => (at + 1, true),
                    None => (bytes.len(), false),
                },
                Err(error) => return format!(", and its rest cannot be read: {error}"),
            };
            self.input.consume(used);
            self.span.1 += used as u64;
            if ended {
                return String::new();
            }
        }
    }
}
