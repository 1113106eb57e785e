//! Mooncake's traces: JSON lines of `timestamp` (ms), `input_length`, `output_length` and `hash_ids`, one for each 512 tokens of
//! input, the last block being as long as what is left.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use super::json::{self, Object};
use super::rows::{self, Fault, Lines};
use super::{Arrival, Chain, Source, When};
use crate::{MILLISECOND, Nanos, mix};

/// Tokens of a block of the trace.
pub(super) const BLOCK_TOKENS: u32 = 512;

/// A row as it stands in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Time since the trace's start.
    pub at: Nanos,
    /// Tokens of the prompt.
    pub input_length: u32,
    /// Tokens that were generated, at least 1: a row of 0 counts as 1.
    pub output_length: u32,
    /// What the prompt's blocks hold, the last one in part.
    pub hash_ids: Vec<u64>,
}

impl Row {
    fn parse(line: &str) -> Result<Self, Fault> {
        let object = Object::parse(line)?;
        let at = (object.number("timestamp")? * MILLISECOND as f64).round() as Nanos;
        let input_length = object.tokens("input_length", 1)?;
        let output_length = object.tokens("output_length", 0)?.max(1);
        let ids = object.list("hash_ids")?;
        let expected = input_length.div_ceil(BLOCK_TOKENS) as usize;
        if ids.len() != expected {
            let problem = format!(
                "{} ids, but {input_length} tokens make {expected} blocks of {BLOCK_TOKENS}",
                ids.len()
            );
            return Err(Fault::new("hash_ids", problem));
        }
        let id = |value: &serde_json::Value| {
            let fault =
                || Fault::new("hash_ids", format!("{}, but a whole number is expected", json::kind(value)));
            value.as_u64().ok_or_else(fault)
        };
        let hash_ids = ids.iter().map(id).collect::<Result<_, _>>()?;
        Ok(Self { at, input_length, output_length, hash_ids })
    }
}

/// The rows of a file, in its order.
#[derive(Debug)]
pub struct Rows<R> {
    lines: Lines<R>,
    /// What was read so far.
    pub report: rows::Rows,
}

impl<R: BufRead> Rows<R> {
    /// Reads from here on.
    pub fn new(input: R) -> Self {
        Self { lines: Lines::new(input), report: rows::Rows::default() }
    }
}

impl<R: BufRead> Iterator for Rows<R> {
    type Item = Row;

    fn next(&mut self) -> Option<Row> {
        loop {
            let row = self.lines.next()?.and_then(Row::parse);
            match row {
                Ok(row) => {
                    self.report.good += 1;
                    return Some(row);
                }
                Err(fault) => self.report.reject(self.lines.line, fault),
            }
        }
    }
}

/// The trace as a source. Its rows name no sessions, so every request comes at its recorded time. What a request generates is
/// taken for text that no other request has, because the trace does not say.
#[derive(Debug)]
pub struct Mooncake<R> {
    rows: Rows<R>,
    block_tokens: u32,
    latest: Nanos,
}

impl Mooncake<BufReader<File>> {
    /// Opens a file; see [`Mooncake::new`].
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: &Path, block_tokens: u32) -> io::Result<Self> {
        Ok(Self::new(BufReader::new(File::open(path)?), block_tokens))
    }
}

impl<R: BufRead> Mooncake<R> {
    /// Reads a trace for engines with blocks of so many tokens; 0 counts as 1. Blocks of a size that divides 512 find all reuse
    /// that the trace tells of; others lose what lies in blocks across its borders.
    pub fn new(input: R, block_tokens: u32) -> Self {
        Self { rows: Rows::new(input), block_tokens: block_tokens.max(1), latest: 0 }
    }

    fn arrival(&mut self, row: &Row) -> Arrival {
        let block = u64::from(self.block_tokens);
        let prompt = u64::from(row.input_length);
        let tokens = prompt + u64::from(row.output_length);
        let own = mix(self.rows.report.good);
        let mut chain = Chain::default();
        let blocks = (0..tokens / block).map(|at| {
            let (start, end) = (at * block, (at + 1) * block);
            if end > prompt {
                return chain.push(own ^ mix(at));
            }
            // What the block covers of the trace's blocks.
            let parts = start / u64::from(BLOCK_TOKENS)..=(end - 1) / u64::from(BLOCK_TOKENS);
            let content = parts.fold(start % u64::from(BLOCK_TOKENS), |content, part| {
                mix(content ^ mix(row.hash_ids[part as usize].wrapping_add(1)))
            });
            chain.push(content)
        });
        let blocks = blocks.collect();
        Arrival {
            when: When::At(self.rows.report.in_order(&mut self.latest, row.at)),
            session: None,
            turn: 0,
            prompt_tokens: row.input_length,
            new_tokens: row.input_length,
            output_tokens: row.output_length,
            blocks,
        }
    }
}

impl<R: BufRead> Source for Mooncake<R> {
    fn open(&mut self) -> Option<Arrival> {
        let row = self.rows.next()?;
        Some(self.arrival(&row))
    }

    fn follow(&mut self, _session: u64) -> Option<Arrival> {
        None
    }

    fn rows(&self) -> &rows::Rows {
        &self.rows.report
    }
}
