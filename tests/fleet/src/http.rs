//! A small HTTP client for a fleet's parts: JSON, and server-sent events with the times at which they came.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HeaderMap};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::time::Instant;

use crate::metrics::Metrics;

/// Largest answer that is read whole, and largest single event.
const MAX_BODY: usize = 64 << 20;

/// A request that got no usable answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Not a URL of the form `http://host:port`.
    #[error("{0:?}: use http://host:port")]
    Url(String),
    /// The request did not get through, or its answer broke off.
    #[error("{method} {url}: {detail}")]
    Transport {
        /// Method.
        method: Method,
        /// Address.
        url: String,
        /// What happened, causes included.
        detail: String,
    },
    /// No end of the answer within the client's deadline.
    #[error("{method} {url}: no complete answer within {after:?}")]
    Deadline {
        /// Method.
        method: Method,
        /// Address.
        url: String,
        /// The deadline.
        after: Duration,
    },
    /// An answer with another status than 200.
    #[error("{method} {url}: HTTP {status}: {body}")]
    Status {
        /// Method.
        method: Method,
        /// Address.
        url: String,
        /// Status.
        status: StatusCode,
        /// The answer's first 2,000 characters.
        body: String,
    },
    /// An answer or event that is no JSON.
    #[error("{method} {url}: not JSON: {text}")]
    Json {
        /// Method.
        method: Method,
        /// Address.
        url: String,
        /// Why not.
        source: serde_json::Error,
        /// Its first 2,000 characters.
        text: String,
    },
}

/// A client of one server. Cheap to clone; clones share connections.
#[derive(Clone, Debug)]
pub struct Client {
    base: String,
    deadline: Duration,
    inner: hyper_util::client::legacy::Client<HttpConnector, Full<Bytes>>,
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Method of the request.
    pub method: Method,
    /// Its address.
    pub url: String,
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
    /// From sending the request to the answer's end.
    pub elapsed: Duration,
}

impl Client {
    /// A client of the server at `base`, `http://host:port`, with 120 s for each answer.
    pub fn new(base: &str) -> Result<Self, HttpError> {
        let base = base.trim_end_matches('/').to_owned();
        let uri: Uri = base.parse().map_err(|_| HttpError::Url(base.clone()))?;
        if uri.scheme_str() != Some("http") || uri.host().is_none() || uri.path() != "/" {
            return Err(HttpError::Url(base));
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let inner = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self { base, deadline: Duration::from_secs(120), inner })
    }

    /// The same client with another deadline, from sending a request to the end of its answer.
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// The server's address.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// GETs a path. Any status is an answer.
    pub async fn get(&self, path: &str) -> Result<Reply, HttpError> {
        self.whole(Method::GET, path, Bytes::new(), &[]).await
    }

    /// POSTs JSON. Any status is an answer.
    pub async fn post(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> Result<Reply, HttpError> {
        self.whole(Method::POST, path, body.to_string().into(), headers).await
    }

    /// Reads `/metrics`.
    pub async fn metrics(&self) -> Result<Metrics, HttpError> {
        let reply = self.get("/metrics").await?.ok()?;
        Ok(Metrics::parse(&String::from_utf8_lossy(&reply.body)))
    }

    /// POSTs JSON and reads the whole event stream that answers it.
    ///
    /// # Errors
    /// Besides a failed request: any status but 200, and a stream that breaks off. An error that the server
    /// reports within the stream is no error here: see [`Streamed::error`].
    pub async fn stream(
        &self,
        path: &str,
        body: &Value,
        headers: &[(&str, &str)],
    ) -> Result<Streamed, HttpError> {
        let mut stream = self.open_stream(path, body, headers).await?;
        let mut events = Vec::new();
        while let Some(event) = stream.next().await? {
            events.push(event);
        }
        Ok(Streamed { headers: stream.headers, events, done: stream.done })
    }

    /// POSTs JSON and returns the event stream that answers it, to be read event by event. Dropping it closes
    /// the connection, as a client does that goes away.
    pub async fn open_stream(
        &self,
        path: &str,
        body: &Value,
        headers: &[(&str, &str)],
    ) -> Result<EventStream, HttpError> {
        self.open_stream_of(path, body.to_string(), headers).await
    }

    /// The same with JSON that is written already, so that writing it is no part of the times.
    pub async fn open_stream_of(
        &self,
        path: &str,
        body: impl Into<Bytes>,
        headers: &[(&str, &str)],
    ) -> Result<EventStream, HttpError> {
        let started = Instant::now();
        let sent = self.send(Method::POST, path, body.into(), headers, started).await?;
        let (parts, body) = sent.response.into_parts();
        let what = Asked { method: Method::POST, url: sent.url, started, deadline: self.deadline };
        if parts.status != StatusCode::OK {
            let bytes = what.read(body).await?;
            return Err(what.status(parts.status, &bytes));
        }
        Ok(EventStream { what, headers: parts.headers, body, sse: SseParser::default(), done: false })
    }

    async fn whole(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        headers: &[(&str, &str)],
    ) -> Result<Reply, HttpError> {
        let started = Instant::now();
        let sent = self.send(method.clone(), path, body, headers, started).await?;
        let (parts, body) = sent.response.into_parts();
        let what = Asked { method, url: sent.url, started, deadline: self.deadline };
        let body = what.read(body).await?;
        let (status, headers, elapsed) = (parts.status, parts.headers, started.elapsed());
        Ok(Reply { method: what.method, url: what.url, status, headers, body, elapsed })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        headers: &[(&str, &str)],
        started: Instant,
    ) -> Result<Sent, HttpError> {
        let url = format!("{}{path}", self.base);
        let mut request = Request::builder().method(method.clone()).uri(&url);
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let transport =
            |detail: String| HttpError::Transport { method: method.clone(), url: url.clone(), detail };
        let request = request.body(Full::new(body)).map_err(|error| transport(error.to_string()))?;
        match tokio::time::timeout_at(started + self.deadline, self.inner.request(request)).await {
            Ok(Ok(response)) => Ok(Sent { url, response }),
            Ok(Err(error)) => Err(transport(chain(&error))),
            Err(_) => Err(HttpError::Deadline { method, url, after: self.deadline }),
        }
    }
}

struct Sent {
    url: String,
    response: http::Response<Incoming>,
}

/// A request under way.
#[derive(Debug)]
struct Asked {
    method: Method,
    url: String,
    started: Instant,
    deadline: Duration,
}

impl Asked {
    async fn read(&self, body: Incoming) -> Result<Bytes, HttpError> {
        self.in_time(Limited::new(body, MAX_BODY).collect())
            .await?
            .map(http_body_util::Collected::to_bytes)
            .map_err(|error| self.transport(error.to_string()))
    }

    async fn in_time<T>(&self, work: impl Future<Output = T>) -> Result<T, HttpError> {
        tokio::time::timeout_at(self.started + self.deadline, work).await.map_err(|_| HttpError::Deadline {
            method: self.method.clone(),
            url: self.url.clone(),
            after: self.deadline,
        })
    }

    fn transport(&self, detail: String) -> HttpError {
        HttpError::Transport { method: self.method.clone(), url: self.url.clone(), detail }
    }

    fn status(&self, status: StatusCode, body: &[u8]) -> HttpError {
        HttpError::Status { method: self.method.clone(), url: self.url.clone(), status, body: excerpt(body) }
    }
}

impl Reply {
    /// This reply, or an error where its status is not 200.
    pub fn ok(self) -> Result<Self, HttpError> {
        if self.status == StatusCode::OK {
            return Ok(self);
        }
        let body = excerpt(&self.body);
        Err(HttpError::Status { method: self.method, url: self.url, status: self.status, body })
    }

    /// The body as JSON.
    pub fn json(&self) -> Result<Value, HttpError> {
        serde_json::from_slice(&self.body).map_err(|source| HttpError::Json {
            method: self.method.clone(),
            url: self.url.clone(),
            source,
            text: excerpt(&self.body),
        })
    }

    /// A header's text; `None` where it is missing or no text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// An event stream that is being read.
#[derive(Debug)]
pub struct EventStream {
    what: Asked,
    /// The answer's headers.
    pub headers: HeaderMap,
    body: Incoming,
    sse: SseParser,
    done: bool,
}

/// One event of a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// When it had come, counted from sending the request.
    pub at: Duration,
    /// Its data.
    pub data: Value,
}

impl Event {
    /// Whether it stands for a generated token. The chunk that opens a chat answer names the role and carries no token;
    /// one with `usage` has no choices.
    pub fn is_token(&self) -> bool {
        let choice = &self.data["choices"][0];
        if choice["finish_reason"].is_string() || choice["text"].is_string() {
            return true;
        }
        let Some(delta) = choice["delta"].as_object() else { return false };
        let opening = delta.contains_key("role") && delta.get("content").is_none_or(|text| text == "");
        !opening && delta.iter().any(|(key, value)| key != "role" && !value.is_null())
    }

    /// The text that it adds to choice 0.
    pub fn text(&self) -> Option<&str> {
        let choice = &self.data["choices"][0];
        choice["text"].as_str().or_else(|| choice["delta"]["content"].as_str())
    }

    /// Why choice 0 ends with it.
    pub fn finish_reason(&self) -> Option<&str> {
        self.data["choices"][0]["finish_reason"].as_str()
    }

    /// Its `usage`; asked for with `stream_options.include_usage`.
    pub fn usage(&self) -> Option<&Value> {
        Some(&self.data["usage"]).filter(|usage| usage.is_object())
    }

    /// The error that the server reports with it.
    pub fn error(&self) -> Option<&Value> {
        Some(&self.data["error"]).filter(|error| !error.is_null())
    }
}

impl EventStream {
    /// The next event; `None` at the end of the stream, which is `data: [DONE]` or the end of the body.
    ///
    /// # Cancel safety
    /// Safe: no event is lost where the future is dropped.
    pub async fn next(&mut self) -> Result<Option<Event>, HttpError> {
        loop {
            while let Some(data) = self.sse.event() {
                if data == "[DONE]" {
                    self.done = true;
                    continue;
                }
                return match serde_json::from_str(&data) {
                    Ok(data) => Ok(Some(Event { at: self.what.started.elapsed(), data })),
                    Err(source) => Err(HttpError::Json {
                        method: self.what.method.clone(),
                        url: self.what.url.clone(),
                        source,
                        text: excerpt(data.as_bytes()),
                    }),
                };
            }
            // The body is read to its end also behind [DONE], so that the connection can be used again.
            match self.what.in_time(self.body.frame()).await? {
                None => return Ok(None),
                Some(Err(error)) => return Err(self.what.transport(chain(&error))),
                Some(Ok(frame)) => {
                    let Ok(data) = frame.into_data() else { continue };
                    self.sse.push(&data);
                    if self.sse.len() > MAX_BODY {
                        return Err(self.what.transport(format!("an event of more than {MAX_BODY} bytes")));
                    }
                }
            }
        }
    }

    /// Whether `data: [DONE]` has come.
    pub fn done(&self) -> bool {
        self.done
    }
}

/// A whole event stream of a completion or chat completion.
#[derive(Clone, Debug)]
pub struct Streamed {
    /// The answer's headers.
    pub headers: HeaderMap,
    /// The events, in order.
    pub events: Vec<Event>,
    /// Whether it ended with `data: [DONE]`.
    pub done: bool,
}

impl Streamed {
    /// A header's text; `None` where it is missing or no text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The generated text of choice 0.
    pub fn text(&self) -> String {
        self.events.iter().filter_map(Event::text).collect()
    }

    /// From sending the request to the first chunk that stands for a generated token; `None` where none came.
    pub fn ttft(&self) -> Option<Duration> {
        self.token_times().next()
    }

    /// The times between chunks that stand for generated tokens: ITL, as a client sees it.
    pub fn gaps(&self) -> impl Iterator<Item = Duration> + '_ {
        self.token_times().zip(self.token_times().skip(1)).map(|(a, b)| b.saturating_sub(a))
    }

    /// The last `finish_reason`.
    pub fn finish_reason(&self) -> Option<&str> {
        self.events.iter().rev().find_map(Event::finish_reason)
    }

    /// The `usage` of the last event that has one; asked for with `stream_options.include_usage`.
    pub fn usage(&self) -> Option<&Value> {
        self.events.iter().rev().find_map(Event::usage)
    }

    /// The error that the server reported within the stream.
    pub fn error(&self) -> Option<&Value> {
        self.events.iter().find_map(Event::error)
    }

    fn token_times(&self) -> impl Iterator<Item = Duration> + '_ {
        self.events.iter().filter(|event| event.is_token()).map(|event| event.at)
    }
}

/// Cuts a byte stream into the data of server-sent events.
#[derive(Debug, Default)]
struct SseParser {
    bytes: BytesMut,
    /// How far `bytes` was searched for a line's end.
    searched: usize,
    data: Option<String>,
}

impl SseParser {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Bytes kept.
    fn len(&self) -> usize {
        self.bytes.len() + self.data.as_ref().map_or(0, String::len)
    }

    /// The next whole event's data.
    fn event(&mut self) -> Option<String> {
        loop {
            let Some(end) = self.bytes[self.searched..].iter().position(|&b| b == b'\n') else {
                self.searched = self.bytes.len();
                return None;
            };
            let line = self.bytes.split_to(self.searched + end + 1);
            self.searched = 0;
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\r', '\n']);
            if line.is_empty() {
                if let Some(data) = self.data.take() {
                    return Some(data);
                }
            } else if let Some(text) = line.strip_prefix("data:") {
                let text = text.strip_prefix(' ').unwrap_or(text);
                match &mut self.data {
                    Some(data) => {
                        data.push('\n');
                        data.push_str(text);
                    }
                    None => self.data = Some(text.to_owned()),
                }
            }
        }
    }
}

fn excerpt(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().take(2000).collect()
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn streamed(events: &[(u64, Value)]) -> Streamed {
        let events = events
            .iter()
            .map(|(ms, data)| Event { at: Duration::from_millis(*ms), data: data.clone() })
            .collect();
        Streamed { headers: HeaderMap::new(), events, done: true }
    }

    #[test]
    fn events_survive_any_cut() {
        let text = ": hello\r\ndata: {\"a\":1}\r\n\r\ndata:x\ndata: y\n\nevent: z\n\ndata: [DONE]\n\n";
        for cut in 1..text.len() {
            let mut parser = SseParser::default();
            let mut events = Vec::new();
            for piece in text.as_bytes().chunks(cut) {
                parser.push(piece);
                events.extend(std::iter::from_fn(|| parser.event()));
            }
            assert_eq!(events, ["{\"a\":1}", "x\ny", "[DONE]"], "cut every {cut} bytes");
            assert_eq!(parser.len(), 0);
        }
    }

    #[test]
    fn the_opening_chunk_of_a_chat_is_no_token() {
        let chat = |delta: Value| json!({"choices": [{"delta": delta, "finish_reason": null}]});
        let answer = streamed(&[
            (1, chat(json!({"role": "assistant", "content": ""}))),
            (20, chat(json!({"content": "He"}))),
            (25, chat(json!({"content": ""}))),
            (31, json!({"choices": [{"delta": {"content": "y"}, "finish_reason": "length"}]})),
            (32, json!({"choices": [], "usage": {"completion_tokens": 3}})),
        ]);
        assert_eq!(answer.ttft(), Some(Duration::from_millis(20)));
        assert_eq!(answer.gaps().map(|gap| gap.as_millis()).collect::<Vec<_>>(), [5, 6]);
        assert_eq!(answer.text(), "Hey");
        assert_eq!(answer.finish_reason(), Some("length"));
        assert_eq!(answer.usage().unwrap()["completion_tokens"], 3);
        assert_eq!(answer.error(), None);
    }

    #[test]
    fn only_plain_loopback_style_urls_are_taken() {
        assert!(Client::new("http://127.0.0.1:80/").is_ok());
        for bad in ["", "127.0.0.1:80", "https://a:1", "http://a:1/v1"] {
            assert!(matches!(Client::new(bad), Err(HttpError::Url(_))), "{bad}");
        }
    }
}
