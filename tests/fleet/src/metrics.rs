//! Reading of Prometheus and OpenMetrics text.

use std::collections::BTreeMap;

/// One scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    samples: Vec<Sample>,
}

/// One line of a scrape.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Full name, with suffixes such as `_total` and `_bucket`.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Value.
    pub value: f64,
}

impl Metrics {
    /// Reads a scrape. Comments, and lines that do not parse, are left out.
    pub fn parse(text: &str) -> Self {
        Self { samples: text.lines().filter_map(sample).collect() }
    }

    /// All samples, in order.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// The samples of that full name that carry at least these labels.
    pub fn matching<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| {
            sample.name == name
                && labels
                    .iter()
                    .all(|(label, value)| sample.labels.get(*label).is_some_and(|have| have == value))
        })
    }

    /// The sum of the samples of that full name that carry at least these labels; 0 where there is none, as
    /// counters with labels come into being with their first event. Where a misspelt name must not pass for 0,
    /// use [`Metrics::get`].
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|sample| sample.value).sum()
    }

    /// The same sum, or `None` where there is no such sample.
    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.matching(name, labels).map(|sample| sample.value).reduce(|a, b| a + b)
    }

    /// The value of one label on the first sample of that name, such as `num_gpu_blocks` of
    /// `vllm:cache_config_info`.
    pub fn label(&self, name: &str, label: &str) -> Option<&str> {
        let mut named = self.samples.iter().filter(|sample| sample.name == name);
        named.find_map(|sample| sample.labels.get(label)).map(String::as_str)
    }
}

fn sample(line: &str) -> Option<Sample> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    let name_len = line.find(|c: char| c == '{' || c.is_whitespace())?;
    let (name, rest) = line.split_at(name_len);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(inside) => read_labels(inside)?,
        None => (BTreeMap::new(), rest),
    };
    // A time stamp or an exemplar may follow the value.
    let value = rest.split_whitespace().next()?;
    Some(Sample { name: name.to_owned(), labels, value: value.parse().ok()? })
}

/// Reads labels up to and with the closing brace, and returns what follows.
fn read_labels(mut rest: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (name, quoted) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = quoted.char_indices();
        loop {
            match chars.next()? {
                (_, '\\') => value.push(match chars.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (end, '"') => {
                    rest = &quoted[end + 1..];
                    break;
                }
                (_, other) => value.push(other),
            }
        }
        labels.insert(name.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"# HELP vllm:prompt_tokens_total Number of prefill tokens.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="a\"b,c}"} 12.0
baton_agent_pulls_total{result="completed",error=""} 3
baton_agent_pulls_total{result="failed",error="corrupt"} 2 # {trace="x"} 1
vllm:cache_config_info{num_gpu_blocks="777",block_size="32"} 1.0 1395066363000
up 1e3
# EOF
"#;

    #[test]
    fn labels_are_matched_and_series_summed() {
        let metrics = Metrics::parse(TEXT);
        assert_eq!(metrics.get("baton_agent_pulls_total", &[]), Some(5.0));
        assert_eq!(metrics.get("baton_agent_pulls_total", &[("result", "failed")]), Some(2.0));
        assert_eq!(metrics.get("baton_agent_pulls_total", &[("result", "lost")]), None);
        assert_eq!(metrics.sum("baton_agent_pulls_total", &[("result", "lost")]), 0.0);
        assert_eq!(metrics.get("up", &[]), Some(1000.0));
    }

    #[test]
    fn quoted_braces_and_escapes_stay_in_the_label() {
        let metrics = Metrics::parse(TEXT);
        assert_eq!(metrics.label("vllm:prompt_tokens_total", "model_name"), Some("a\"b,c}"));
        assert_eq!(metrics.label("vllm:cache_config_info", "num_gpu_blocks"), Some("777"));
        assert_eq!(metrics.samples().len(), 5);
    }

    #[test]
    fn torn_lines_are_left_out() {
        assert!(Metrics::parse("a{b=\"c\nx{\ny\nz nine").samples().is_empty());
    }
}
