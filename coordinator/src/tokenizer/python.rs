//! Python's ways of writing values, where templates show them: `json.dumps` as transformers' `tojson` filter
//! calls it.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// A JSON value as templates see it: objects keep the order of their members.
pub(super) fn from_json(json: &serde_json::Value) -> Value {
    use serde_json::Value as Json;

    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            // What fits neither is a float.
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(from_json).collect::<Vec<_>>().into(),
        Json::Object(members) => {
            Value::from_pairs(members.iter().map(|(name, member)| (name.as_str(), from_json(member))))
        }
    }
}

/// How `json.dumps` was asked to write.
struct Style {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
}

/// `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`
pub(super) fn tojson(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let argument = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        let named: Option<Value> = kwargs.get(name)?;
        Ok(args.get(at).cloned().or(named).filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ensure_ascii = argument(0, "ensure_ascii")?;
    let indent = argument(1, "indent")?;
    let separators = argument(2, "separators")?;
    let sort_keys = argument(3, "sort_keys")?;
    kwargs.assert_all_used()?;
    let indent = match indent {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(number) => Some(" ".repeat(usize::try_from(i64::try_from(number)?.max(0)).unwrap_or(0).min(64))),
    };
    let (item_separator, key_separator) = match separators {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some(pair) => (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string()),
    };
    let style = Style {
        ensure_ascii: ensure_ascii.is_some_and(|value| value.is_true()),
        sort_keys: sort_keys.is_some_and(|value| value.is_true()),
        indent,
        item_separator,
        key_separator,
    };
    let mut out = String::new();
    style.write(&mut out, value, 0)?;
    Ok(out)
}

impl Style {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
            ValueKind::Number => out.push_str(&float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|item| (None, item)).collect();
                self.container(out, ('[', ']'), items, depth)?;
            }
            ValueKind::Map => {
                let mut members = Vec::new();
                for key in value.try_iter()? {
                    let member = value.get_item(&key)?;
                    let key = match key.kind() {
                        ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
                        ValueKind::None => "null".to_owned(),
                        ValueKind::Bool => key.is_true().to_string(),
                        _ => key.to_string(),
                    };
                    members.push((Some(key), member));
                }
                if self.sort_keys {
                    members.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.container(out, ('{', '}'), members, depth)?;
            }
            kind => {
                let message = format!("Object of type {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::BadSerialization, message));
            }
        }
        Ok(())
    }

    fn container(
        &self,
        out: &mut String,
        (open, close): (char, char),
        members: Vec<(Option<String>, Value)>,
        depth: usize,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(indent.as_str(), depth));
            }
        };
        out.push(open);
        let empty = members.is_empty();
        for (i, (key, member)) in members.into_iter().enumerate() {
            if i > 0 {
                out.push_str(&self.item_separator);
            }
            line(out, depth + 1);
            if let Some(key) = key {
                self.string(out, &key);
                out.push_str(&self.key_separator);
            }
            self.write(out, &member, depth + 1)?;
        }
        if !empty {
            line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn string(&self, out: &mut String, text: &str) {
        // serde_json escapes what Python does: quotes, backslashes and control characters.
        let quoted = serde_json::to_string(text).expect("a string is JSON");
        if !self.ensure_ascii {
            out.push_str(&quoted);
            return;
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
}

/// `str(value)`: what a template's `{{ value }}` prints.
pub(super) fn print(out: &mut minijinja::Output<'_>, value: &Value) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Undefined => return Ok(()),
        ValueKind::Number if !value.is_integer() => {
            let number = f64::try_from(value.clone())?;
            out.write_str(&repr_float(number)).map_err(Error::from)?;
            return Ok(());
        }
        ValueKind::Seq | ValueKind::Map if has_float(value)? => {
            let mut text = String::new();
            repr(&mut text, value)?;
            text
        }
        // Everything else minijinja prints as Python does.
        _ => match value.as_str() {
            Some(text) => return out.write_str(text).map_err(Error::from),
            None => value.to_string(),
        },
    };
    out.write_str(&text).map_err(Error::from)
}

fn has_float(value: &Value) -> Result<bool, Error> {
    Ok(match value.kind() {
        ValueKind::Number => !value.is_integer(),
        ValueKind::Seq => {
            let mut found = false;
            for item in value.try_iter()? {
                found |= has_float(&item)?;
            }
            found
        }
        ValueKind::Map => {
            let mut found = false;
            for key in value.try_iter()? {
                found |= has_float(&value.get_item(&key)?)?;
            }
            found
        }
        _ => false,
    })
}

fn repr(out: &mut String, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => out.push_str(&repr_float(f64::try_from(value.clone())?)),
        ValueKind::Seq => {
            out.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(out, &item)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(out, &key)?;
                out.push_str(": ");
                repr(out, &value.get_item(&key)?)?;
            }
            out.push('}');
        }
        _ => out.push_str(&format!("{value:?}")),
    }
    Ok(())
}

fn repr_float(value: f64) -> String {
    match value {
        value if value.is_nan() => "nan".to_owned(),
        value if value.is_infinite() => if value > 0.0 { "inf" } else { "-inf" }.to_owned(),
        value => float(value),
    }
}

/// `repr` of a float: the shortest digits that read back the same, in scientific form below 1e-4 and from
/// 1e16 on.
fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').expect("the form has an exponent");
    let exponent: i32 = exponent.parse().expect("the exponent is a number");
    if (-4..16).contains(&exponent) {
        let fixed = value.to_string();
        return if fixed.contains('.') { fixed } else { fixed + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// `str.strip`'s idea of white space: Unicode's, and the four ASCII separators.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_does() {
        for (value, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
        ] {
            assert_eq!(float(value), text);
        }
    }

    #[test]
    fn json_is_written_as_transformers_does() {
        let json =
            serde_json::json!({"b": [1, 2.0, null, true], "a": {"é\n\u{7f}": "<&>"}, "e": {}, "f": []});
        let value = from_json(&json);
        let write = |options: &str| {
            let mut env = minijinja::Environment::new();
            env.add_filter("tojson", tojson);
            env.render_str(
                &format!("{{{{ v|tojson({options}) }}}}"),
                minijinja::context! { v => value.clone() },
            )
            .unwrap()
        };
        let plain = "{\"b\": [1, 2.0, null, true], \"a\": {\"é\\n\u{7f}\": \"<&>\"}, \"e\": {}, \"f\": []}";
        assert_eq!(write(""), plain);
        assert_eq!(
            write("indent=2"),
            "{\n  \"b\": [\n    1,\n    2.0,\n    null,\n    true\n  ],\n  \"a\": {\n    \"é\\n\u{7f}\": \"<&>\"\n  },\n  \"e\": {},\n  \"f\": []\n}"
        );
        assert!(write("separators=(',', ':'), sort_keys=true").starts_with("{\"a\":{"));
        assert!(write("ensure_ascii=true").contains("\\u00e9"));
    }
}
