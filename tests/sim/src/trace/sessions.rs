//! Agent sessions with their text: JSON lines of `timestamp` (µs), `session_id`, `input` (the whole prompt) and `output`. Rows may
//! stand in any order and sessions in several files.
//!
//! A session's calls follow each other in a closed loop. The trace has no durations, so the pause between two calls (the tool's work) is taken
//! as the time between their records less what generating the first one's output took at [`SessionsOptions::recorded_token_seconds`].

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::json::Object;
use super::rows::{Fault, Lines, Rows};
use super::{Arrival, Content, Context, Source, Tokenise, When};
use crate::{Nanos, SECOND, nanos};

/// How text is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SessionsOptions {
    /// Tokens of a block.
    pub block_tokens: u32,
    /// What one token of output took when the trace was recorded. 20 ms by default, a hosted model's usual pace.
    pub recorded_token_seconds: f64,
    /// Pauses are cut here, so that a session that somebody left over night does not stretch a run. 60 s by default.
    pub longest_pause: Nanos,
    /// Whether requests come with their text.
    pub keep_text: bool,
}

impl Default for SessionsOptions {
    fn default() -> Self {
        Self { block_tokens: 16, recorded_token_seconds: 0.02, longest_pause: 60 * SECOND, keep_text: false }
    }
}

/// Where a row lies. 40 bytes.
#[derive(Clone, Copy, Debug)]
struct Place {
    session: u32,
    file: u32,
    line: u64,
    at_micros: u64,
    offset: u64,
    length: u64,
}

#[derive(Debug)]
struct Live {
    /// The next row.
    next: usize,
    turn: u32,
    at_micros: u64,
    output_tokens: u32,
    prompt_tokens: u32,
}

/// The trace as a source.
#[derive(Debug)]
pub struct Sessions<T> {
    files: Vec<BufReader<File>>,
    /// By session, then time.
    places: Vec<Place>,
    /// Where each session's rows begin, in order of their first.
    order: std::vec::IntoIter<usize>,
    start_micros: u64,
    live: HashMap<u64, Live>,
    rows: Rows,
    options: SessionsOptions,
    tokenise: T,
    tokens: Vec<u32>,
    /// The last prompt, where text is kept.
    text: Option<String>,
}

impl<T: Tokenise> Sessions<T> {
    /// Reads a file, or all `.jsonl` files of a folder, once, to learn where the rows lie.
    ///
    /// # Errors
    /// The path cannot be read, or is a folder without such files.
    pub fn open(path: &Path, options: SessionsOptions, tokenise: T) -> io::Result<Self> {
        let mut paths: Vec<PathBuf> = vec![path.to_owned()];
        if path.is_dir() {
            let entries = path.read_dir()?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
            paths = entries
                .into_iter()
                .filter(|path| path.extension().is_some_and(|end| end == "jsonl"))
                .collect();
            paths.sort();
        }
        if paths.is_empty() {
            let problem = format!("{} has no .jsonl files", path.display());
            return Err(io::Error::new(io::ErrorKind::NotFound, problem));
        }
        let mut rows = Rows::default();
        let mut places = Vec::new();
        let mut names: HashMap<String, u32> = HashMap::new();
        let mut files = Vec::new();
        for (file, path) in paths.iter().enumerate() {
            let mut lines = Lines::new(BufReader::new(File::open(path)?));
            while let Some(line) = lines.next() {
                match line.and_then(index) {
                    Ok((name, at_micros)) => {
                        let fresh = names.len() as u32;
                        let session = *names.entry(name).or_insert(fresh);
                        let (offset, end) = lines.span;
                        let (file, line) = (file as u32, lines.line);
                        places.push(Place { session, file, line, at_micros, offset, length: end - offset });
                        rows.good += 1;
                    }
                    Err(fault) => rows.reject(lines.line, fault),
                }
            }
            files.push(BufReader::new(File::open(path)?));
        }
        places.sort_by_key(|place| (place.session, place.at_micros, place.file, place.offset));
        let is_first = |at: &usize| *at == 0 || places[*at].session != places[*at - 1].session;
        let mut order: Vec<usize> = (0..places.len()).filter(is_first).collect();
        order.sort_by_key(|at| (places[*at].at_micros, places[*at].session));
        let start_micros = order.first().map_or(0, |at| places[*at].at_micros);
        let order = order.into_iter();
        let (live, tokens) = (HashMap::new(), Vec::new());
        Ok(Self { files, places, order, start_micros, live, rows, options, tokenise, tokens, text: None })
    }

    /// The row at this place, and its session's state after it.
    fn read(&mut self, at: usize, before: Option<&Live>) -> Option<(Arrival, Live)> {
        let place = self.places[at];
        let (prompt, context) = match self.parse(&place) {
            Ok(read) => read,
            Err(fault) => {
                // It was well-formed when it was indexed: the file was changed meanwhile.
                self.rows.good -= 1;
                self.rows.reject(place.line, fault);
                return None;
            }
        };
        let output_tokens = ((context.tokens() - u64::from(prompt)) as u32).max(1);
        let when = match before {
            None => When::At((place.at_micros - self.start_micros) * 1000),
            Some(before) => {
                let gap = place.at_micros.saturating_sub(before.at_micros) * 1000;
                let spoken = nanos(self.options.recorded_token_seconds * f64::from(before.output_tokens));
                When::After(gap.saturating_sub(spoken).min(self.options.longest_pause))
            }
        };
        let turn = before.map_or(0, |before| before.turn + 1);
        let known = before.map_or(0, |before| before.prompt_tokens.min(prompt));
        let arrival = Arrival {
            when,
            session: Some(u64::from(place.session)),
            turn,
            prompt_tokens: prompt,
            new_tokens: prompt - known,
            output_tokens,
            blocks: context.ids().into(),
        };
        let live =
            Live { next: at + 1, turn, at_micros: place.at_micros, output_tokens, prompt_tokens: prompt };
        Some((arrival, live))
    }

    fn parse(&mut self, place: &Place) -> Result<(u32, Context), Fault> {
        let fault = |error: io::Error| Fault::new("", format!("cannot be read again: {error}"));
        let file = &mut self.files[place.file as usize];
        file.seek(SeekFrom::Start(place.offset)).map_err(fault)?;
        let mut line = vec![0; place.length as usize];
        file.read_exact(&mut line).map_err(fault)?;
        let line = std::str::from_utf8(&line).map_err(|error| Fault::new("", error.to_string()))?;
        let object = Object::parse(line)?;
        let mut context = Context::new(self.options.block_tokens);
        self.tokens.clear();
        self.tokenise.tokenise(object.text("input")?, &mut self.tokens);
        let prompt = self.tokens.len() as u32;
        self.tokenise.tokenise(object.text("output")?, &mut self.tokens);
        context.append_tokens(&self.tokens);
        if prompt == 0 {
            return Err(Fault::new("input", "has no tokens"));
        }
        if self.options.keep_text {
            self.text = Some(object.text("input")?.to_owned());
        }
        Ok((prompt, context))
    }
}

fn index(line: &str) -> Result<(String, u64), Fault> {
    let object = Object::parse(line)?;
    let at = object.number("timestamp")? as u64;
    if object.text("input")?.is_empty() {
        return Err(Fault::new("input", "is empty"));
    }
    object.text("output")?;
    Ok((object.text("session_id")?.to_owned(), at))
}

impl<T: Tokenise> Source for Sessions<T> {
    fn open(&mut self) -> Option<Arrival> {
        loop {
            let at = self.order.next()?;
            if let Some((arrival, live)) = self.read(at, None) {
                self.live.insert(u64::from(self.places[at].session), live);
                return Some(arrival);
            }
        }
    }

    fn follow(&mut self, session: u64) -> Option<Arrival> {
        let live = self.live.remove(&session)?;
        let mut at = live.next;
        while self.places.get(at).is_some_and(|place| u64::from(place.session) == session) {
            if let Some((arrival, after)) = self.read(at, Some(&live)) {
                self.live.insert(session, after);
                return Some(arrival);
            }
            at += 1;
        }
        None
    }

    fn rows(&self) -> &Rows {
        &self.rows
    }

    fn content(&mut self) -> Option<Content> {
        self.text.take().map(Content::Prompt)
    }
}
