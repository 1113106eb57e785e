//! Output tokens to text, a piece at a time, with stop strings.

use crate::tokenizer::Tokenizer;

/// How an output's text is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextOptions {
    /// Strings that end the output.
    pub stop: Vec<String>,
    /// Whether the stop string, or the stop token, stays in the text.
    pub include_stop: bool,
    /// Tokens before which no stop string counts.
    pub min_tokens: usize,
    /// Whether special tokens leave no text.
    pub skip_special_tokens: bool,
}

/// Makes the text of one output.
#[derive(Debug)]
pub struct Detokenizer {
    options: TextOptions,
    /// Bytes at the end that are no whole character yet.
    pending: Vec<u8>,
    text: String,
    /// Text that was handed out.
    sent: usize,
    tokens: usize,
}

impl Detokenizer {
    /// For an output that has not begun.
    pub fn new(options: TextOptions) -> Self {
        Self { options, pending: Vec::new(), text: String::new(), sent: 0, tokens: 0 }
    }

    /// Takes the next token; `ends` where the engine ended the output with it as a stop token. The stop string that ends the
    /// output with this token, where one does.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32, ends: bool) -> Option<String> {
        self.tokens += 1;
        let silent = self.options.skip_special_tokens && tokenizer.is_special(token);
        let before = self.text.len();
        if !silent && (!ends || self.options.include_stop) {
            self.pending.extend_from_slice(tokenizer.bytes(token));
            self.take_characters();
        }
        (self.tokens > self.options.min_tokens).then(|| self.find_stop(before)).flatten()
    }

    /// Moves whole characters from the pending bytes to the text; bytes that cannot become one are replaced.
    fn take_characters(&mut self) {
        for chunk in self.pending.utf8_chunks() {
            self.text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            // An incomplete character at the very end may still be completed.
            let at_end = invalid.as_ptr_range().end == self.pending.as_ptr_range().end;
            if at_end && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none()) {
                self.pending = invalid.to_vec();
                return;
            }
            self.text.push('\u{fffd}');
        }
        self.pending.clear();
    }

    fn find_stop(&mut self, before: usize) -> Option<String> {
        let mut found: Option<(usize, &String)> = None;
        for stop in &self.options.stop {
            // A match ends in the new text, so it begins no earlier than this.
            let mut from = before.saturating_sub(stop.len() - 1);
            while !self.text.is_char_boundary(from) {
                from -= 1;
            }
            let mut ends =
                self.text[from..].match_indices(stop.as_str()).map(|(at, _)| from + at + stop.len());
            if let Some(end) = ends.find(|end| *end > before)
                && found.is_none_or(|(earliest, _)| end < earliest)
            {
                found = Some((end, stop));
            }
        }
        let (end, stop) = found?;
        let stop = stop.clone();
        self.text.truncate(if self.options.include_stop { end } else { end - stop.len() });
        self.sent = self.sent.min(self.text.len());
        Some(stop)
    }

    /// The text since the last call. Unless `finished`, what may become a stop string is kept back.
    pub fn delta(&mut self, finished: bool) -> &str {
        let keep = match self.options.stop.iter().map(String::len).max() {
            Some(longest) if !finished && !self.options.include_stop => longest - 1,
            _ => 0,
        };
        let mut end = self.text.len().saturating_sub(keep).max(self.sent);
        while !self.text.is_char_boundary(end) {
            end += 1;
        }
        let from = std::mem::replace(&mut self.sent, end);
        &self.text[from..end]
    }

    /// Tokens so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::make_model::make_model;

    fn tokenizer() -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        make_model(folder.path()).unwrap();
        Tokenizer::load(folder.path()).unwrap()
    }

    /// The token of each byte.
    fn bytes(tokenizer: &Tokenizer, bytes: &[u8]) -> Vec<u32> {
        let token = |byte: &u8| (0..tokenizer.len() as u32).find(|id| tokenizer.bytes(*id) == [*byte]);
        bytes.iter().map(|byte| token(byte).unwrap()).collect()
    }

    fn deltas(tokenizer: &Tokenizer, options: TextOptions, tokens: &[u32]) -> (Vec<String>, Option<String>) {
        let mut detokenizer = Detokenizer::new(options);
        let mut deltas = Vec::new();
        for token in tokens {
            let stop = detokenizer.push(tokenizer, *token, false);
            deltas.push(detokenizer.delta(stop.is_some()).to_owned());
            if stop.is_some() {
                return (deltas, stop);
            }
        }
        deltas.push(detokenizer.delta(true).to_owned());
        (deltas, None)
    }

    #[test]
    fn characters_come_out_whole() {
        let tokenizer = tokenizer();
        let tokens = bytes(&tokenizer, "aé世!".as_bytes());
        let (pieces, _) = deltas(&tokenizer, TextOptions::default(), &tokens);
        assert_eq!(pieces, ["a", "", "é", "", "", "世", "!", ""]);
        // What is no character is replaced as soon as that is certain.
        let tokens = bytes(&tokenizer, b"\xe4\xb8a\xffb\xc3");
        let (pieces, _) = deltas(&tokenizer, TextOptions::default(), &tokens);
        assert_eq!(pieces, ["", "", "\u{fffd}a", "\u{fffd}", "b", "", ""]);
    }

    #[test]
    fn what_may_become_a_stop_string_is_kept_back() {
        let tokenizer = tokenizer();
        let tokens = bytes(&tokenizer, "say énd now".as_bytes());
        let options = |min_tokens| TextOptions {
            stop: vec!["énd".into(), "zzzz".into()],
            min_tokens,
            ..TextOptions::default()
        };
        let (pieces, stop) = deltas(&tokenizer, options(0), &tokens);
        assert_eq!((pieces.concat().as_str(), stop.as_deref()), ("say ", Some("énd")));
        // Too early to count, and never looked for again.
        let (pieces, stop) = deltas(&tokenizer, options(8), &tokens);
        assert_eq!((pieces.concat().as_str(), stop), ("say énd now", None));
        let kept = TextOptions { include_stop: true, ..options(0) };
        assert_eq!(deltas(&tokenizer, kept, &tokens).0.concat(), "say énd");
    }

    #[test]
    fn special_tokens_leave_text_only_where_asked_for() {
        let tokenizer = tokenizer();
        let end = tokenizer.id("<|im_end|>").unwrap();
        for (skip_special_tokens, text) in [(true, ""), (false, "<|im_end|>")] {
            let options = TextOptions { skip_special_tokens, ..TextOptions::default() };
            assert_eq!(deltas(&tokenizer, options, &[end]).0.concat(), text);
        }
    }
}
