//! Text as tokens.

use crate::mix;

/// What cuts text into tokens. The simulation needs their number, and that equal beginnings give equal tokens.
pub trait Tokenise {
    /// Appends the text's tokens.
    fn tokenise(&mut self, text: &str, tokens: &mut Vec<u32>);
}

impl<F: FnMut(&str, &mut Vec<u32>)> Tokenise for F {
    fn tokenise(&mut self, text: &str, tokens: &mut Vec<u32>) {
        self(text, tokens);
    }
}

/// Cuts text about as byte-pair encodings do, without a vocabulary: a word with the space before it, in pieces of up to six bytes;
/// up to three digits; up to four equal signs; a run of white space. English prose and code come to about four bytes a token.
#[derive(Clone, Copy, Debug, Default)]
pub struct Approximate;

const LONGEST_PIECE: usize = 6;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Word,
    Digit,
    Space,
    Sign(u8),
}

fn class(byte: u8) -> Class {
    match byte {
        b'0'..=b'9' => Class::Digit,
        b'a'..=b'z' | b'A'..=b'Z' | 0x80.. => Class::Word,
        b' ' | b'\t' | b'\n' | b'\r' => Class::Space,
        sign => Class::Sign(sign),
    }
}

impl Tokenise for Approximate {
    fn tokenise(&mut self, text: &str, tokens: &mut Vec<u32>) {
        let bytes = text.as_bytes();
        let mut start = 0;
        while start < bytes.len() {
            let word = |at: usize| bytes.get(at).is_some_and(|byte| class(*byte) == Class::Word);
            // One space goes with the word behind it.
            let body = start + usize::from(bytes[start] == b' ' && word(start + 1));
            let kind = class(bytes[body]);
            let longest = match kind {
                Class::Word => LONGEST_PIECE,
                Class::Digit => 3,
                Class::Space => usize::MAX,
                Class::Sign(_) => 4,
            };
            let mut length =
                bytes[body..].iter().take(longest).take_while(|byte| class(**byte) == kind).count();
            let end = body + length;
            if kind == Class::Space && length > 1 && bytes[end - 1] == b' ' && word(end) {
                length -= 1;
            }
            let piece = &bytes[start..body + length];
            let hash = piece.iter().fold(0u64, |hash, byte| mix(hash ^ u64::from(*byte).wrapping_add(0x100)));
            tokens.push(hash as u32);
            start = body + length;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(text: &str) -> usize {
        let mut tokens = Vec::new();
        Approximate.tokenise(text, &mut tokens);
        tokens.len()
    }

    #[test]
    fn pieces_are_about_as_long_as_tokens() {
        assert_eq!(count(""), 0);
        assert_eq!(count("the cat sat"), 3);
        assert_eq!(count("extraordinarily"), 3);
        assert_eq!(count("    x"), 2);
        assert_eq!(count("3.14159"), 4);
        assert_eq!(count("größer"), 2);
        let prose =
            "Blocks that follow each other lie in chains; a table leads from a hash to a place in a chain.";
        let ratio = prose.len() as f64 / count(prose) as f64;
        assert!((3.0..5.0).contains(&ratio), "{ratio}");
    }

    #[test]
    fn equal_beginnings_have_equal_tokens() {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        Approximate.tokenise("one two three\n", &mut a);
        Approximate.tokenise("one two three\nfour", &mut b);
        assert_eq!(a[..3], b[..3]);
    }
}
