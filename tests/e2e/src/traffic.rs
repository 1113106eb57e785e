//! Prompts as agents and chats send them: trees of conversations that are continued, forked and repeated.
//!
//! Prompts are token ids, small ones, so that a recording of them is small too.

use crate::prompts::Prompts;

/// Conversations that are remembered; the oldest of more are forgotten.
const REMEMBERED: usize = 40;
/// Beginnings that conversations share.
const BEGINNINGS: usize = 3;
/// Smallest and largest token id, the latter excluded.
const IDS: (u64, u64) = (5, 125);

/// One request of the traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Its prompt.
    pub tokens: Vec<u32>,
    /// Its cache salt.
    pub salt: Option<&'static str>,
    /// Tokens to generate.
    pub answer_tokens: u32,
}

/// A source of turns, the same in every run.
pub struct Traffic {
    numbers: Prompts,
    block_size: usize,
    longest: usize,
    beginnings: Vec<Vec<u32>>,
    /// The one used last at the end.
    conversations: Vec<(Vec<u32>, Option<&'static str>)>,
}

impl Traffic {
    /// Traffic for an engine with blocks of `block_size` tokens, of prompts of at most `longest` tokens.
    pub fn new(seed: u64, block_size: usize, longest: usize) -> Self {
        let mut traffic = Self {
            numbers: Prompts::new(seed),
            block_size,
            longest,
            beginnings: Vec::new(),
            conversations: Vec::new(),
        };
        traffic.beginnings = (0..BEGINNINGS).map(|i| traffic.fresh(longest / 6 + 11 * i)).collect();
        traffic
    }

    /// The next turn.
    pub fn next_turn(&mut self) -> Turn {
        let (mut tokens, salt) = match self.below(10) {
            0 | 1 => self.begin(),
            // On: the answer is part of the conversation already.
            2..=5 => match self.pick() {
                Some((mut tokens, salt)) => {
                    let more = 1 + self.below(self.longest / 5);
                    tokens.extend(self.fresh(more));
                    (tokens, salt)
                }
                None => self.begin(),
            },
            // Forked somewhere in the middle.
            6 | 7 => match self.pick() {
                Some((mut tokens, salt)) => {
                    let kept = 1 + self.below(tokens.len());
                    tokens.truncate(kept);
                    let more = 1 + self.below(self.longest / 5);
                    tokens.extend(self.fresh(more));
                    (tokens, salt)
                }
                None => self.begin(),
            },
            // Once more.
            _ => self.pick().unwrap_or_else(|| self.begin()),
        };
        tokens.truncate(self.longest);
        // Whole blocks are a case of their own: of such a prompt the last block is always computed.
        if self.below(4) == 0 && tokens.len() > self.block_size {
            tokens.truncate(tokens.len() / self.block_size * self.block_size);
        }
        let answer_tokens = if self.below(8) == 0 { self.block_size + 8 } else { 1 + self.below(8) };
        Turn { tokens, salt, answer_tokens: answer_tokens as u32 }
    }

    /// Requests that come at once: two alike, and forks of one conversation.
    pub fn burst(&mut self, size: usize) -> Vec<Turn> {
        let first = self.next_turn();
        let mut turns = vec![first.clone(), first.clone()];
        while turns.len() < size {
            let mut turn = first.clone();
            let kept = 1 + self.below(turn.tokens.len());
            turn.tokens.truncate(kept);
            let more = 1 + self.below(self.longest / 5);
            turn.tokens.extend(self.fresh(more));
            turn.tokens.truncate(self.longest);
            turns.push(turn);
        }
        turns
    }

    /// A turn was answered with these tokens.
    pub fn answered(&mut self, turn: &Turn, answer: &[u32]) {
        let tokens = [&turn.tokens[..], answer].concat();
        self.conversations.retain(|(known, salt)| !(*salt == turn.salt && tokens.starts_with(known)));
        self.conversations.push((tokens, turn.salt));
        if self.conversations.len() > REMEMBERED {
            self.conversations.remove(0);
        }
    }

    fn begin(&mut self) -> (Vec<u32>, Option<&'static str>) {
        let salt = [None, None, None, Some("a"), Some("b")][self.below(5)];
        let mut tokens = match self.below(2) {
            0 => Vec::new(),
            _ => self.beginnings[self.numbers.number() as usize % BEGINNINGS].clone(),
        };
        let more = 1 + self.below(self.longest / 3);
        tokens.extend(self.fresh(more));
        (tokens, salt)
    }

    /// A conversation, most likely one of the last.
    fn pick(&mut self) -> Option<(Vec<u32>, Option<&'static str>)> {
        if self.conversations.is_empty() {
            return None;
        }
        let known = self.conversations.len();
        let back = self.below(known).min(self.below(known));
        Some(self.conversations[known - 1 - back].clone())
    }

    fn fresh(&mut self, tokens: usize) -> Vec<u32> {
        let (first, end) = IDS;
        (0..tokens).map(|_| (first + self.numbers.number() % (end - first)) as u32).collect()
    }

    fn below(&mut self, end: usize) -> usize {
        (self.numbers.number() % end as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_repeat_with_the_seed_and_share_prefixes() {
        let (mut a, mut b) = (Traffic::new(1, 32, 400), Traffic::new(1, 32, 400));
        let mut turns: Vec<Turn> = Vec::new();
        let (mut shared, mut whole) = (0, 0);
        for _ in 0..200 {
            let turn = a.next_turn();
            assert_eq!(turn, b.next_turn());
            assert!((1..=400).contains(&turn.tokens.len()));
            let answer = vec![7; turn.answer_tokens as usize];
            a.answered(&turn, &answer);
            b.answered(&turn, &answer);
            let alike = |other: &Turn| {
                other.salt == turn.salt && other.tokens.iter().zip(&turn.tokens).take(32).all(|(a, b)| a == b)
            };
            shared += usize::from(turns.iter().any(alike));
            whole += usize::from(turn.tokens.len().is_multiple_of(32));
            turns.push(turn);
        }
        assert!(shared > 120 && whole > 30, "{shared} share a block with another, {whole} are whole blocks");
        let burst = a.burst(4);
        assert_eq!((burst.len(), &burst[0]), (4, &burst[1]));
    }
}
