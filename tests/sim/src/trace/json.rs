//! Fields of a row in JSON, with faults that name them.

use serde_json::{Map, Value};

use super::rows::Fault;

/// Most tokens of one request that are believed.
pub(super) const MOST_TOKENS: u64 = 1 << 24;

/// A row.
#[derive(Debug)]
pub(super) struct Object(pub(super) Map<String, Value>);

impl Object {
    pub(super) fn parse(line: &str) -> Result<Self, Fault> {
        match serde_json::from_str(line) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(other) => Err(Fault::new("", format!("{}, but a row is an object", kind(&other)))),
            Err(error) => Err(Fault::new("", format!("not JSON: {error}"))),
        }
    }

    /// The field, `None` where it is absent or null.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn need(&self, field: &str) -> Result<&Value, Fault> {
        self.get(field).ok_or_else(|| Fault::new(field, "is missing"))
    }

    pub(super) fn text(&self, field: &str) -> Result<&str, Fault> {
        let value = self.need(field)?;
        value.as_str().ok_or_else(|| Fault::new(field, format!("{}, but a string is expected", kind(value))))
    }

    /// A number that is at least 0.
    pub(super) fn number(&self, field: &str) -> Result<f64, Fault> {
        number(field, self.need(field)?)
    }

    /// A length: at least `least`.
    pub(super) fn tokens(&self, field: &str, least: u64) -> Result<u32, Fault> {
        tokens(field, self.need(field)?, least)
    }

    pub(super) fn list(&self, field: &str) -> Result<&[Value], Fault> {
        let value = self.need(field)?;
        let list = value.as_array().map(Vec::as_slice);
        list.ok_or_else(|| Fault::new(field, format!("{}, but a list is expected", kind(value))))
    }
}

pub(super) fn number(field: &str, value: &Value) -> Result<f64, Fault> {
    match value.as_f64() {
        Some(number) if number >= 0.0 => Ok(number),
        Some(number) => Err(Fault::new(field, format!("{number} is negative"))),
        None => Err(Fault::new(field, format!("{}, but a number is expected", kind(value)))),
    }
}

pub(super) fn tokens(field: &str, value: &Value, least: u64) -> Result<u32, Fault> {
    match value.as_u64() {
        Some(tokens) if (least..=MOST_TOKENS).contains(&tokens) => Ok(tokens as u32),
        Some(tokens) => {
            Err(Fault::new(field, format!("{tokens} is not between {least} and {MOST_TOKENS} tokens")))
        }
        None => Err(Fault::new(field, format!("{}, but a whole number is expected", kind(value)))),
    }
}

pub(super) fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) => "a truth value".into(),
        Value::Number(number) => format!("the number {number}"),
        Value::String(_) => "a string".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
    }
}
