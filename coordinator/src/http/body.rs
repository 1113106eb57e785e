//! A request's JSON object, read once: where each member lies, so that members can be read, left out or added
//! without touching the others' bytes.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::error::ApiError;

/// A JSON object and its members. Clones share both.
#[derive(Clone, Debug)]
pub struct RequestBody {
    bytes: Bytes,
    members: Arc<[(String, Range<usize>)]>,
}

impl RequestBody {
    /// Reads an object. Everything in it is checked to be JSON.
    pub fn parse(bytes: Bytes) -> Result<Self, ApiError> {
        let mut deserializer = serde_json::Deserializer::from_slice(&bytes);
        let members = deserializer
            .deserialize_map(Members)
            .and_then(|members| deserializer.end().map(|()| members))
            .map_err(|error| ApiError::bad_request(format!("The body is no JSON object: {error}"), None))?;
        let start = bytes.as_ptr() as usize;
        let members = members
            .into_iter()
            .map(|(name, value)| {
                let at = value.get().as_ptr() as usize - start;
                (name.into_owned(), at..at + value.get().len())
            })
            .collect();
        Ok(Self { members, bytes })
    }

    /// The whole body, as it came.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The JSON text of a member; `None` where it is missing or null. Of a name given twice the last counts, as
    /// in Python.
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, range) = self.members.iter().rev().find(|member| member.0 == name)?;
        let text = std::str::from_utf8(&self.bytes[range.clone()]).ok()?;
        (text != "null").then_some(text)
    }

    /// A member's value; `None` where it is missing or null.
    pub fn read<T: DeserializeOwned>(&self, name: &'static str) -> Result<Option<T>, ApiError> {
        let Some(text) = self.get(name) else { return Ok(None) };
        serde_json::from_str(text)
            .map(Some)
            .map_err(|error| ApiError::bad_request(format!("{name}: {error}"), Some(name)))
    }

    /// A member's value, or `None` where it is missing or not of this form: for members whose judge is the
    /// engine.
    pub fn peek<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        serde_json::from_str(self.get(name)?).ok()
    }

    /// A member's string; `None` where it is no string, or one with half of a surrogate pair.
    pub fn text(&self, name: &str) -> Option<String> {
        let quoted = self.get(name)?;
        let inner = quoted.strip_prefix('"')?.strip_suffix('"')?;
        // It was parsed, so an escape is whole, and only escapes hold a backslash.
        let mut text = String::with_capacity(inner.len());
        let mut rest = inner;
        while let Some(at) = rest.find('\\') {
            let escaped = match rest.as_bytes()[at + 1] {
                b'n' => '\n',
                b't' => '\t',
                b'r' => '\r',
                b'b' => '\u{8}',
                b'f' => '\u{c}',
                // Code points, alone or in pairs.
                b'u' => return serde_json::from_str(quoted).ok(),
                itself => char::from(itself),
            };
            text.push_str(&rest[..at]);
            text.push(escaped);
            rest = &rest[at + 2..];
        }
        text.push_str(rest);
        Some(text)
    }

    /// The object without the members named in `drop` and `set`, and with those in `set`, each given as JSON
    /// text. All else stays as it came, byte for byte and in its order.
    pub fn rewrite(&self, drop: &[&str], set: &[(&str, &str)]) -> Bytes {
        let added: usize = set.iter().map(|(name, value)| name.len() + value.len() + 8).sum();
        let mut out = BytesMut::with_capacity(self.bytes.len() + added);
        let mut separator = b'{';
        for (name, range) in &*self.members {
            if drop.contains(&name.as_str()) || set.iter().any(|member| member.0 == name) {
                continue;
            }
            out.put_u8(separator);
            put_name(&mut out, name);
            out.put_slice(&self.bytes[range.clone()]);
            separator = b',';
        }
        for (name, value) in set {
            out.put_u8(separator);
            put_name(&mut out, name);
            out.put_slice(value.as_bytes());
            separator = b',';
        }
        if separator == b'{' {
            out.put_u8(b'{');
        }
        out.put_u8(b'}');
        out.freeze()
    }
}

fn put_name(out: &mut BytesMut, name: &str) {
    let quoted = serde_json::to_string(name).expect("a string is JSON");
    out.put_slice(quoted.as_bytes());
    out.put_u8(b':');
}

/// Members in their order; names and values borrow from the body.
struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Vec<(Cow<'de, str>, &'de RawValue)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::with_capacity(16);
        while let Some((name, value)) = map.next_entry::<Name<'de>, &'de RawValue>()? {
            members.push((name.0, value));
        }
        Ok(members)
    }
}

#[derive(serde::Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::*;

    fn body(text: &'static str) -> RequestBody {
        RequestBody::parse(Bytes::from_static(text.as_bytes())).unwrap()
    }

    #[test]
    fn members_are_found_and_the_last_of_a_name_counts() {
        let body = body(r#" {"model" : "a", "n":1, "mo\u0064el": "b", "x": null} "#);
        assert_eq!(body.read::<String>("model").unwrap().as_deref(), Some("b"));
        assert_eq!(body.get("x"), None);
        assert_eq!(body.read::<String>("n").unwrap_err().param, Some("n"));
        assert_eq!(body.peek::<String>("n"), None);
    }

    #[test]
    fn a_rewrite_leaves_the_rest_byte_for_byte() {
        let body = body(
            r#"{"a": 1.50, "b": [ 1,2 ], "stream": true, "c": "\u00e9 é", "weird \"k\"": {"z": 1e999}}"#,
        );
        let out = body.rewrite(&["b"], &[("stream", "false"), ("new", r#"{"x":1}"#)]);
        let expected = r#"{"a":1.50,"c":"\u00e9 é","weird \"k\"":{"z": 1e999},"stream":false,"new":{"x":1}}"#;
        assert_eq!(std::str::from_utf8(&out).unwrap(), expected);
        assert_eq!(&self::body(r#"{"a":1}"#).rewrite(&["a"], &[])[..], b"{}");
    }

    #[test]
    fn texts_are_read_as_json_has_them() {
        for quoted in [
            r#""""#,
            r#""plain é 🙂""#,
            r#""a\nb\t\r\b\f\"q\"\\\/ \\n""#,
            r#""\u00e9 \ud83d\ude42 \n""#,
            r#""ends in \\""#,
        ] {
            let body = RequestBody::parse(Bytes::from(format!(r#"{{"p": {quoted}}}"#))).unwrap();
            assert_eq!(body.text("p"), body.peek::<String>("p"), "{quoted}");
            assert!(body.text("p").is_some());
        }
        for other in ["1", "null", r#"["a"]"#, r#""\ud83d""#] {
            let body = RequestBody::parse(Bytes::from(format!(r#"{{"p": {other}}}"#))).unwrap();
            assert_eq!(body.text("p"), None, "{other}");
        }
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for bad in ["", "[]", "1", "{", r#"{"a":}"#, r#"{"a":1} x"#, "{\"a\": \"\u{1}\"}"] {
            let error = RequestBody::parse(Bytes::from_static(bad.as_bytes())).unwrap_err();
            assert_eq!(error.status, http::StatusCode::BAD_REQUEST, "{bad}");
        }
        assert!(RequestBody::parse(Bytes::from_static(b"{\"a\": \"\xff\"}")).is_err());
    }
}
