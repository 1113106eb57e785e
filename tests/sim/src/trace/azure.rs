//! Azure's LLM inference traces: CSV of `TIMESTAMP` (date and time of day), `ContextTokens` and `GeneratedTokens`.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use super::json::MOST_TOKENS;
use super::rows::{Fault, Lines, Rows};
use super::{Arrival, Context, Source, When};
use crate::{Nanos, SECOND, mix};

const COLUMNS: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];

/// The trace as a source. It says nothing of contents, so no two requests have a block in common.
#[derive(Debug)]
pub struct Azure<R> {
    lines: Lines<R>,
    rows: Rows,
    /// Where each of [`COLUMNS`] stands; `None` before the header was read.
    columns: Option<[usize; 3]>,
    block_tokens: u32,
    start: Option<Nanos>,
    latest: Nanos,
}

impl Azure<BufReader<File>> {
    /// Opens a file; see [`Azure::new`].
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: &Path, block_tokens: u32) -> io::Result<Self> {
        Ok(Self::new(BufReader::new(File::open(path)?), block_tokens))
    }
}

impl<R: BufRead> Azure<R> {
    /// Reads a trace for engines with blocks of so many tokens. Columns may stand in any order, others are ignored.
    pub fn new(input: R, block_tokens: u32) -> Self {
        Self {
            lines: Lines::new(input),
            rows: Rows::default(),
            columns: None,
            block_tokens,
            start: None,
            latest: 0,
        }
    }
}

fn header(line: &str) -> Result<[usize; 3], Fault> {
    let names: Vec<&str> = line.trim_start_matches('\u{feff}').split(',').map(str::trim).collect();
    let mut columns = [0; 3];
    for (column, name) in columns.iter_mut().zip(COLUMNS) {
        let at = names.iter().position(|other| other.eq_ignore_ascii_case(name));
        *column = at.ok_or_else(|| Fault::new(name, "the header has no such column; nothing can be read"))?;
    }
    Ok(columns)
}

fn parse(line: &str, columns: [usize; 3]) -> Result<(Nanos, u32, u32), Fault> {
    let cells: Vec<&str> = line.split(',').map(str::trim).collect();
    let cell = |at: usize| cells.get(columns[at]).ok_or_else(|| Fault::new(COLUMNS[at], "is missing"));
    let tokens = |at: usize| -> Result<u32, Fault> {
        let text = cell(at)?;
        match text.parse::<u64>() {
            Ok(tokens) if tokens <= MOST_TOKENS => Ok(tokens.max(1) as u32),
            _ => Err(Fault::new(COLUMNS[at], format!("`{text}` is no number of tokens up to {MOST_TOKENS}"))),
        }
    };
    let time = cell(0)?;
    let problem = || Fault::new(COLUMNS[0], format!("`{time}` is no time like 2023-11-16 18:17:03.9799600"));
    Ok((timestamp(time).ok_or_else(problem)?, tokens(1)?, tokens(2)?))
}

/// Nanoseconds since 1970 of `YYYY-MM-DD hh:mm:ss[.fraction]`. A zone behind it is ignored: only differences count.
fn timestamp(text: &str) -> Option<Nanos> {
    let (date, time) = text.split_once([' ', 'T'])?;
    let time = time.split(['+', 'Z', '-']).next()?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut time = time.splitn(3, ':');
    let (hour, minute) = (time.next()?.parse::<u64>().ok()?, time.next()?.parse::<u64>().ok()?);
    let seconds = time.next()?;
    let (whole, fraction) = seconds.split_once('.').unwrap_or((seconds, ""));
    let second = whole.parse::<u64>().ok()?;
    let digits = fraction.get(..fraction.len().min(9))?;
    let fraction = match digits.len() as u32 {
        0 => 0,
        places => digits.parse::<u64>().ok()? * 10u64.pow(9 - places),
    };
    let valid = (1970..=2200).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
    if !valid || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days since 1970 in the Gregorian calendar, with years that begin in March.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 719_469;
    let seconds = u64::try_from(days).ok()? * 86_400 + hour * 3600 + minute * 60 + second;
    Some(seconds * SECOND + fraction)
}

impl<R: BufRead> Source for Azure<R> {
    fn open(&mut self) -> Option<Arrival> {
        loop {
            let line = self.lines.next()?;
            let columns = self.columns;
            let row = match (line, columns) {
                (Ok(line), Some(columns)) => parse(line, columns),
                (Ok(line), None) => match header(line) {
                    Ok(columns) => {
                        self.columns = Some(columns);
                        continue;
                    }
                    Err(fault) => {
                        self.rows.reject(self.lines.line, fault);
                        return None;
                    }
                },
                (Err(fault), _) => Err(fault),
            };
            let (time, prompt_tokens, output_tokens) = match row {
                Ok(row) => row,
                Err(fault) => {
                    self.rows.reject(self.lines.line, fault);
                    continue;
                }
            };
            self.rows.good += 1;
            let start = *self.start.get_or_insert(time);
            let at = self.rows.in_order(&mut self.latest, time.saturating_sub(start));
            let mut context = Context::new(self.block_tokens);
            context.append(mix(self.rows.good), prompt_tokens + output_tokens);
            return Some(Arrival {
                when: When::At(at),
                session: None,
                turn: 0,
                prompt_tokens,
                new_tokens: prompt_tokens,
                output_tokens,
                blocks: context.ids().into(),
            });
        }
    }

    fn follow(&mut self, _session: u64) -> Option<Arrival> {
        None
    }

    fn rows(&self) -> &Rows {
        &self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(timestamp("1970-01-01 00:00:00"), Some(0));
        assert_eq!(timestamp("2023-11-16 18:17:03.9799600"), Some(1_700_158_623_979_960_000));
        assert_eq!(timestamp("2024-02-29T23:59:59.5Z"), Some(1_709_251_199_500_000_000));
        assert_eq!(timestamp("2024-05-10 00:00:00.009930+00:00"), Some(1_715_299_200_009_930_000));
        for bad in ["", "2023-11-16", "2023-13-16 18:17:03", "2023-11-16 18:17", "2023-11-16 x:17:03"] {
            assert_eq!(timestamp(bad), None, "{bad}");
        }
    }
}
