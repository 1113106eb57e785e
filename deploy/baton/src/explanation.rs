//! A placement and its reasons, as the coordinator tells them, and how they are shown.

use std::fmt::Write as _;

use serde::Deserialize;

use crate::table::Table;

/// What the header `x-baton-explain` and `/v1/route` hold.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Explanation {
    pub(crate) policy: String,
    pub(crate) prompt_tokens: u64,
    /// Why a handoff or a pull was out of the question.
    pub(crate) not_splittable: Option<String>,
    /// What else is to be known of the choice.
    #[serde(default)]
    pub(crate) notes: Vec<String>,
    /// Best first; the first was taken.
    pub(crate) options: Vec<Choice>,
    #[serde(default)]
    pub(crate) options_left_out: usize,
}

/// One way to serve the request.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Choice {
    pub(crate) mode: String,
    /// Of a pull: who holds the prefix.
    pub(crate) source: Option<String>,
    pub(crate) prefill: String,
    pub(crate) decode: String,
    pub(crate) hit_tokens: u64,
    pub(crate) transfer_bytes: u64,
    /// Predicted milliseconds by name, in the order in which they pass.
    pub(crate) terms_ms: serde_json::Map<String, serde_json::Value>,
    pub(crate) total_ms: f64,
    /// Absent on the first.
    pub(crate) why_not: Option<String>,
}

impl Explanation {
    /// All options with all their terms.
    pub(crate) fn table(&self) -> Table {
        let mut terms: Vec<&str> = Vec::new();
        for name in self.options.iter().flat_map(|option| option.terms_ms.keys()) {
            if !terms.contains(&name.as_str()) {
                terms.push(name);
            }
        }
        let mut head = vec!["mode", "prefill", "decode", "hit tokens"];
        head.extend(&terms);
        head.extend(["total ms", "why not"]);
        let mut table = Table::new(&head, &["prefill", "decode", "why not"]);
        for option in &self.options {
            let mut row = vec![
                option.mode(),
                option.prefill.clone(),
                option.decode.clone(),
                option.hit_tokens.to_string(),
            ];
            row.extend(terms.iter().map(|name| option.term(name).map_or_else(|| "-".into(), milliseconds)));
            row.push(milliseconds(option.total_ms));
            row.push(option.why_not.clone().unwrap_or_else(|| "chosen".into()));
            table.row(row);
        }
        table
    }
}

impl Choice {
    fn term(&self, name: &str) -> Option<f64> {
        self.terms_ms.get(name)?.as_f64()
    }

    /// The kind of plan, and of a pull where from.
    fn mode(&self) -> String {
        match &self.source {
            Some(source) => format!("{} from {source}", self.mode),
            None => self.mode.clone(),
        }
    }

    /// Engines and terms in one line.
    pub(crate) fn line(&self) -> String {
        let mut line = match self.prefill == self.decode {
            true => format!("{} on {}", self.mode(), self.decode),
            false => format!("{}: prefill on {}, decode on {}", self.mode(), self.prefill, self.decode),
        };
        let _ = write!(line, ", {} tokens hit", self.hit_tokens);
        if self.transfer_bytes > 0 {
            let _ = write!(line, ", {} to move", bytes(self.transfer_bytes));
        }
        let _ = write!(line, "; {} ms", milliseconds(self.total_ms));
        for (at, (name, value)) in self.terms_ms.iter().enumerate() {
            let separator = if at == 0 { " = " } else { " + " };
            let _ = write!(line, "{separator}{name} {}", milliseconds(value.as_f64().unwrap_or(f64::NAN)));
        }
        line
    }
}

/// Milliseconds with as many digits as matter.
pub(crate) fn milliseconds(value: f64) -> String {
    if value.abs() >= 100.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

/// Bytes in decimal units.
pub(crate) fn bytes(value: u64) -> String {
    match value {
        0..1_000 => format!("{value} B"),
        1_000..1_000_000 => format!("{:.1} kB", value as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", value as f64 / 1e6),
        _ => format!("{:.2} GB", value as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"policy": "adaptive", "prompt_tokens": 900, "options": [
        {"mode": "colocated", "prefill": "e1", "decode": "e1", "hit_tokens": 512, "transfer_bytes": 0,
         "terms_ms": {"request": 11.4, "prefill": 24.25}, "total_ms": 35.65},
        {"mode": "disaggregated", "prefill": "e1", "decode": "e2", "hit_tokens": 512, "transfer_bytes": 1843200,
         "terms_ms": {"prefill": 24.25, "transfer": 103.0}, "total_ms": 127.25,
         "why_not": "91.6 ms more, mostly transfer"},
        {"mode": "pull", "source": "e1", "prefill": "e2", "decode": "e2", "hit_tokens": 512, "transfer_bytes": 1843200,
         "terms_ms": {"prefill": 24.25, "transfer": 103.0}, "total_ms": 127.25,
         "why_not": "91.6 ms more, mostly transfer"}], "options_left_out": 0}"#;

    #[test]
    fn options_become_rows_and_lines() {
        let explanation: Explanation = serde_json::from_str(TEXT).unwrap();
        let table = explanation.table().to_string();
        let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            lines[0].join(" "),
            "mode prefill decode hit tokens request prefill transfer total ms why not"
        );
        assert_eq!(lines[1].join(" "), "colocated e1 e1 512 11.4 24.2 - 35.6 chosen");
        assert_eq!(
            lines[2].join(" "),
            "disaggregated e1 e2 512 - 24.2 103 127 91.6 ms more, mostly transfer"
        );
        assert_eq!(
            explanation.options[1].line(),
            "disaggregated: prefill on e1, decode on e2, 512 tokens hit, 1.8 MB to move; 127 ms = prefill 24.2 + transfer 103"
        );
        assert_eq!(
            explanation.options[2].line(),
            "pull from e1 on e2, 512 tokens hit, 1.8 MB to move; 127 ms = prefill 24.2 + transfer 103"
        );
        assert_eq!(
            explanation.options[0].line(),
            "colocated on e1, 512 tokens hit; 35.6 ms = request 11.4 + prefill 24.2"
        );
    }
}
