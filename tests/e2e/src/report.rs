//! What a run showed: one line per acceptance criterion, with its figures and whether it holds.

use serde::Serialize;
use serde_json::{Map, Value};

/// One acceptance line.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Names the line in the report, as `scenario.what`.
    #[serde(skip)]
    pub name: String,
    /// What was measured.
    #[serde(flatten)]
    pub figures: Map<String, Value>,
    /// Whether it is what it has to be.
    pub ok: bool,
    /// Why not; empty where `ok`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub why: String,
}

impl Line {
    /// A line that holds so far and has no figures yet.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), figures: Map::new(), ok: true, why: String::new() }
    }

    /// Adds a figure.
    pub fn figure(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        self.figures.insert(key.to_owned(), value.into());
        self
    }

    /// Fails the line, with a reason, unless `holds`. Only the first eight reasons are kept.
    pub fn check(&mut self, holds: bool, why: impl FnOnce() -> String) -> &mut Self {
        const REASONS: usize = 8;
        if !holds {
            self.ok = false;
            if self.why.matches("; ").count() + 1 < REASONS {
                if !self.why.is_empty() {
                    self.why.push_str("; ");
                }
                self.why.push_str(&why());
            }
        }
        self
    }

    /// The line of something that could not even be tried.
    pub fn failed(name: impl Into<String>, error: &anyhow::Error) -> Self {
        let mut line = Self::new(name);
        line.check(false, || format!("{error:#}"));
        line
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:<28}", if self.ok { "ok  " } else { "FAIL" }, self.name)?;
        for (key, value) in &self.figures {
            match value {
                Value::String(text) => write!(f, " {key}={text}")?,
                Value::Number(number) if number.is_f64() => {
                    write!(f, " {key}={:.2}", number.as_f64().unwrap_or_default())?
                }
                other => write!(f, " {key}={other}")?,
            }
        }
        if !self.ok {
            write!(f, "\n     {}", self.why)?;
        }
        Ok(())
    }
}

/// The lines of a run, in the order in which they came.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The lines.
    pub lines: Vec<Line>,
}

impl Report {
    /// Whether every line holds; false for a report that shows nothing.
    pub fn ok(&self) -> bool {
        !self.lines.is_empty() && self.lines.iter().all(|line| line.ok)
    }

    /// `{line: {figure…, ok}}`, for the one JSON line at a run's end.
    pub fn to_json(&self) -> Value {
        let lines = self.lines.iter().map(|line| {
            let value = serde_json::to_value(line).unwrap_or_else(|error| Value::String(error.to_string()));
            (line.name.clone(), value)
        });
        Value::Object(lines.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_false_line_fails_the_report_and_says_why() {
        let mut report = Report::default();
        assert!(!report.ok(), "nothing shown is nothing proved");
        report.lines.push(Line::new("a"));
        assert!(report.ok());
        let mut line = Line::new("b");
        line.figure("blocks", 3).check(true, || unreachable!()).check(false, || "3 is not 4".into());
        report.lines.push(line);
        assert!(!report.ok());
        assert_eq!(
            report.to_json(),
            serde_json::json!({"a": {"ok": true}, "b": {"blocks": 3, "ok": false, "why": "3 is not 4"}})
        );
    }
}
