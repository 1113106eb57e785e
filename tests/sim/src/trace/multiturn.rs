//! Conversations with delays: JSON lines of one conversation each, in either of two forms.
//!
//! - `{"session_id": …, "timestamp": ms, "turns": [{"text": … or "input_length": n, "output_length": n, "delay": ms}, …]}`: each turn says
//!   what it adds; what it generates becomes a part of the next prompt.
//! - `{"id": …, "timestamp": ms, "messages": [{"role": …, "content": …, "delay": ms}, …]}`: each message of the role `assistant` is what one
//!   request generated, and all before it is its prompt.
//!
//! `timestamp` may be left out: sessions then come at random with [`MultiTurnOptions::sessions_per_second`]. A `delay` is the time
//! between the end of the turn before and this one, 0 where it is left out.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use serde_json::Value;

use super::json::{self, MOST_TOKENS, Object};
use super::rows::{Fault, Lines, Rows};
use super::{Arrival, Content, Context, Message, Source, Tokenise, When};
use crate::rng::Rng;
use crate::{MILLISECOND, Nanos, mix, nanos};

/// How conversations are read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MultiTurnOptions {
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Output of a turn that does not say.
    pub output_tokens: u32,
    /// How many sessions begin, on average, where they do not say when.
    pub sessions_per_second: f64,
    /// Of the random times.
    pub seed: u64,
    /// Whether requests come with their text, in sessions of which all turns have one.
    pub keep_text: bool,
}

impl Default for MultiTurnOptions {
    fn default() -> Self {
        Self { block_tokens: 16, output_tokens: 128, sessions_per_second: 1.0, seed: 0, keep_text: false }
    }
}

/// What a turn adds to its session.
#[derive(Debug)]
enum Piece {
    Tokens(Vec<u32>),
    /// Text of which only the length is known.
    Unknown(u32),
}

impl Piece {
    fn len(&self) -> u32 {
        match self {
            Piece::Tokens(tokens) => tokens.len() as u32,
            Piece::Unknown(tokens) => *tokens,
        }
    }

    fn append(&self, context: &mut Context, name: u64) {
        match self {
            Piece::Tokens(tokens) => context.append_tokens(tokens),
            Piece::Unknown(tokens) => context.append(name, *tokens),
        }
    }
}

#[derive(Debug)]
struct Turn {
    delay: Nanos,
    input: Piece,
    output: Piece,
    /// What the input says, where it is known and kept.
    text: Option<Vec<Message>>,
}

#[derive(Debug)]
struct Live {
    context: Context,
    turn: u32,
    left: VecDeque<Turn>,
}

/// The trace as a source. Sessions are numbered by their rows.
#[derive(Debug)]
pub struct MultiTurn<R, T> {
    lines: Lines<R>,
    rows: Rows,
    options: MultiTurnOptions,
    tokenise: T,
    rng: Rng,
    live: HashMap<u64, Live>,
    start: Option<Nanos>,
    latest: Nanos,
    /// What the last request says.
    text: Option<Vec<Message>>,
}

impl<T: Tokenise> MultiTurn<BufReader<File>, T> {
    /// Opens a file.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: &Path, options: MultiTurnOptions, tokenise: T) -> io::Result<Self> {
        Ok(Self::new(BufReader::new(File::open(path)?), options, tokenise))
    }
}

impl<R: BufRead, T: Tokenise> MultiTurn<R, T> {
    /// Reads from here on.
    pub fn new(input: R, options: MultiTurnOptions, tokenise: T) -> Self {
        Self {
            lines: Lines::new(input),
            rows: Rows::default(),
            options,
            tokenise,
            rng: Rng::new(options.seed),
            live: HashMap::new(),
            start: None,
            latest: 0,
            text: None,
        }
    }

    fn advance(&mut self, session: u64, mut live: Live, when: Option<When>) -> Option<Arrival> {
        let mut turn = live.left.pop_front()?;
        self.text = turn.text.take();
        let name = mix(mix(session + 1) ^ u64::from(live.turn));
        turn.input.append(&mut live.context, name);
        let prompt_tokens = live.context.tokens() as u32;
        turn.output.append(&mut live.context, !name);
        let arrival = Arrival {
            when: when.unwrap_or(When::After(turn.delay)),
            session: Some(session),
            turn: live.turn,
            prompt_tokens,
            new_tokens: turn.input.len(),
            output_tokens: turn.output.len().max(1),
            blocks: live.context.ids().into(),
        };
        live.turn += 1;
        if !live.left.is_empty() {
            self.live.insert(session, live);
        }
        Some(arrival)
    }
}

fn turns(
    object: &Object,
    options: &MultiTurnOptions,
    tokenise: &mut impl Tokenise,
) -> Result<VecDeque<Turn>, Fault> {
    let messages = object.get("turns").is_none() && object.get("messages").is_some();
    let mut turns: VecDeque<Turn> = match messages {
        true => from_messages(object.list("messages")?, options, tokenise)?,
        false => {
            let turns = object.list("turns")?;
            turns
                .iter()
                .enumerate()
                .map(|(at, turn)| from_turn(at, turn, options, tokenise))
                .collect::<Result<_, _>>()?
        }
    };
    let total: u64 =
        turns.iter().map(|turn| u64::from(turn.input.len()) + u64::from(turn.output.len())).sum();
    let field = if messages { "messages" } else { "turns" };
    if turns.is_empty() {
        return Err(Fault::new(field, "has no turn that generates anything"));
    }
    if total > MOST_TOKENS {
        return Err(Fault::new(field, format!("{total} tokens in all, more than {MOST_TOKENS}")));
    }
    if turns[0].input.len() == 0 {
        return Err(Fault::new(field, "the first turn has an empty prompt"));
    }
    // A chat goes on as a chat.
    if turns.iter().any(|turn| turn.text.is_none()) {
        turns.iter_mut().for_each(|turn| turn.text = None);
    }
    Ok(turns)
}

fn tokens_of(text: &str, tokenise: &mut impl Tokenise) -> Piece {
    let mut tokens = Vec::new();
    tokenise.tokenise(text, &mut tokens);
    Piece::Tokens(tokens)
}

/// The object of a list's entry, and a way to name its fields.
fn entry<'a>(list: &str, at: usize, value: &'a Value) -> Result<(&'a Value, String), Fault> {
    let name = format!("{list}[{at}]");
    match value.is_object() {
        true => Ok((value, name)),
        false => Err(Fault::new(name, format!("{}, but an object is expected", json::kind(value)))),
    }
}

fn delay(value: &Value, name: &str) -> Result<Nanos, Fault> {
    match value.get("delay").filter(|delay| !delay.is_null()) {
        Some(delay) => Ok(nanos(json::number(&format!("{name}.delay"), delay)? / 1e3)),
        None => Ok(0),
    }
}

fn from_turn(
    at: usize,
    value: &Value,
    options: &MultiTurnOptions,
    tokenise: &mut impl Tokenise,
) -> Result<Turn, Fault> {
    let (value, name) = entry("turns", at, value)?;
    let length = |field: &str, least| {
        let value = value.get(field).filter(|value| !value.is_null());
        value.map(|value| json::tokens(&format!("{name}.{field}"), value, least)).transpose()
    };
    let text = value.get("text").and_then(Value::as_str);
    let input = match (text, length("input_length", 0)?) {
        (Some(text), _) => tokens_of(text, tokenise),
        (None, Some(tokens)) => Piece::Unknown(tokens),
        (None, None) => return Err(Fault::new(name, "has neither `text` nor `input_length`")),
    };
    let output = Piece::Unknown(length("output_length", 1)?.unwrap_or(options.output_tokens.max(1)));
    let says = |text: &str| vec![Message { role: "user".to_owned(), text: text.to_owned() }];
    let text = text.filter(|_| options.keep_text).map(says);
    Ok(Turn { delay: delay(value, &name)?, input, output, text })
}

fn from_messages(
    list: &[Value],
    options: &MultiTurnOptions,
    tokenise: &mut impl Tokenise,
) -> Result<VecDeque<Turn>, Fault> {
    let mut turns = VecDeque::new();
    let (mut input, mut said) = (Vec::new(), Vec::new());
    let mut pause = 0;
    for (at, value) in list.iter().enumerate() {
        let (value, name) = entry("messages", at, value)?;
        let field = |field: &str| {
            let problem = || Fault::new(format!("{name}.{field}"), "is missing, or no string");
            value.get(field).and_then(Value::as_str).ok_or_else(problem)
        };
        pause += delay(value, &name)?;
        let (role, content) = (field("role")?, field("content")?);
        if role == "assistant" {
            let output = tokens_of(content, tokenise);
            let input = Piece::Tokens(std::mem::take(&mut input));
            let text = options.keep_text.then(|| std::mem::take(&mut said));
            turns.push_back(Turn { delay: pause, input, output, text });
            pause = 0;
        } else {
            tokenise.tokenise(content, &mut input);
            if options.keep_text {
                said.push(Message { role: role.to_owned(), text: content.to_owned() });
            }
        }
    }
    Ok(turns)
}

impl<R: BufRead, T: Tokenise> Source for MultiTurn<R, T> {
    fn open(&mut self) -> Option<Arrival> {
        loop {
            let (options, tokenise) = (&self.options, &mut self.tokenise);
            let row = self.lines.next()?.and_then(Object::parse).and_then(|object| {
                let at = object.get("timestamp").map(|at| json::number("timestamp", at)).transpose()?;
                Ok((at, turns(&object, options, tokenise)?))
            });
            let (at, left) = match row {
                Ok(row) => row,
                Err(fault) => {
                    self.rows.reject(self.lines.line, fault);
                    continue;
                }
            };
            let session = self.rows.good;
            self.rows.good += 1;
            let at = match at {
                Some(ms) => {
                    let at = (ms * MILLISECOND as f64).round() as Nanos;
                    let start = *self.start.get_or_insert(at);
                    at.saturating_sub(start)
                }
                None => self.latest + nanos(self.rng.exponential(1.0 / self.options.sessions_per_second)),
            };
            let at = self.rows.in_order(&mut self.latest, at);
            let live = Live { context: Context::new(self.options.block_tokens), turn: 0, left };
            return self.advance(session, live, Some(When::At(at)));
        }
    }

    fn follow(&mut self, session: u64) -> Option<Arrival> {
        let live = self.live.remove(&session)?;
        self.advance(session, live, None)
    }

    fn rows(&self) -> &Rows {
        &self.rows
    }

    fn content(&mut self) -> Option<Content> {
        self.text.take().map(Content::Messages)
    }
}
