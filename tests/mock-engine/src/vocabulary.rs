//! From a digest of the KV to the next token.

use crate::request::Request;

/// The tokens that the model can say.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    /// Tokens whose text is printable on its own.
    pub printable: Vec<u32>,
    /// The end-of-sequence token.
    pub eos: Option<u32>,
    /// One token in so many is the end of the sequence; 0: none is.
    pub eos_one_in: u64,
}

impl Vocabulary {
    /// The next token of a request whose KV has this digest. Before `min_tokens`, none that would end the output.
    pub fn next(&self, digest: u64, request: &Request) -> u32 {
        let stops = request.stops();
        let early = request.outputs() < stops.min_tokens;
        let ends = |token: u32| stops.eos == Some(token) || stops.stop_token_ids.contains(&token);
        if let Some(eos) = self.eos
            && self.eos_one_in > 0
            && (digest >> 32).is_multiple_of(self.eos_one_in)
            && !(early && ends(eos))
        {
            return eos;
        }
        let first = (digest % self.printable.len() as u64) as usize;
        let from_first = self.printable[first..].iter().chain(&self.printable[..first]);
        let mut allowed = from_first.copied().filter(|token| !(early && ends(*token)));
        allowed.next().unwrap_or(self.printable[first])
    }
}
