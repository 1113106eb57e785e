//! What the tests of a whole engine share: starting one, and talking HTTP to it.

#![allow(dead_code, reason = "each test program uses its own part")]

pub(crate) mod agent;

use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use baton_mock_engine::make_model::make_model;
use baton_mock_engine::server::{ServeConfig, Server};
use clap::Parser;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tempfile::TempDir;

static MODEL: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    make_model(folder.path()).unwrap();
    folder
});

/// The folder of a model.
pub(crate) fn model() -> &'static Path {
    MODEL.path()
}

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    serve: ServeConfig,
}

/// A running engine and a client of it.
pub(crate) struct Engine {
    pub(crate) server: Server,
    pub(crate) client: Client<HttpConnector, Full<Bytes>>,
}

impl Engine {
    /// An engine with blocks of 16 tokens and these options besides.
    pub(crate) async fn start(options: &[&str]) -> Self {
        let model = model().to_str().unwrap();
        let fixed =
            ["engine", "--model", model, "--served-model-name", "m", "--port", "0", "--block-size", "16"];
        let arguments = Arguments::try_parse_from(fixed.iter().chain(options)).unwrap();
        let server = Server::start(arguments.serve).await.unwrap();
        Self { server, client: Client::builder(TokioExecutor::new()).build_http() }
    }

    pub(crate) async fn send(&self, method: &str, path: &str, body: &str) -> Response<Incoming> {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.server.address()))
            .header("content-type", "application/json")
            .body(Full::from(body.to_owned()))
            .unwrap();
        self.client.request(request).await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        let response = self.send("GET", path, "").await;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self.send("POST", path, &body.to_string()).await;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap())
    }

    /// The data of all events of a stream; `[DONE]` as a string.
    pub(crate) async fn events(&self, path: &str, body: &Value) -> Vec<Value> {
        let response = self.send("POST", path, &body.to_string()).await;
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let text = std::str::from_utf8(&body).unwrap();
        assert!(text.ends_with("\n\n"));
        let data = |event: &str| {
            let data = event.strip_prefix("data: ").unwrap();
            if data == "[DONE]" { Value::from("[DONE]") } else { serde_json::from_str(data).unwrap() }
        };
        text.trim_end().split("\n\n").map(data).collect()
    }

    /// The text of a completion.
    pub(crate) async fn complete(&self, body: Value) -> String {
        let (status, answer) = self.post("/v1/completions", &body).await;
        assert_eq!(status, 200, "{answer}");
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    }

    /// The value of a metric without labels of its own.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.get("/metrics").await;
        let head = format!("vllm:{name}{{");
        let line = text.lines().find(|line| line.starts_with(&head)).unwrap_or_else(|| panic!("no {name}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until a metric has a value.
    pub(crate) async fn wait_for(&self, name: &str, value: f64) {
        for _ in 0..1000 {
            if self.metric(name).await == value {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{name} is {} and not {value}", self.metric(name).await);
    }
}
