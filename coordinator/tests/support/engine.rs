//! An engine's HTTP server.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::serve::Listener;
use futures::StreamExt;
use http::{HeaderMap, StatusCode};
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};

use super::Certificates;

/// What an engine does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Serves it; a prefill leg is held.
    Serve,
    /// Serves it, but never holds.
    NeverHold,
    /// Answers with a status and an error in vLLM's shape.
    Status(u16),
    /// Never answers.
    Hang,
    /// Sends headers, then breaks off.
    BreakOff,
    /// Streams one event for each permit of [`Engine::steps`]; without a stream, serves it for one.
    Step,
    /// Fails for one permit.
    StepToFail,
}

/// A server that looks like an engine.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
    address: SocketAddr,
    scheme: &'static str,
}

struct Inner {
    behaviour: Mutex<Behaviour>,
    requests: Mutex<Vec<(String, HeaderMap, Bytes)>>,
    tokens: Mutex<Option<Vec<u32>>>,
    steps: Semaphore,
    aborted: AtomicUsize,
    came: Notify,
}

/// Counts a request that ended before it was answered to the end.
struct Unfinished(Arc<Inner>, bool);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.1 {
            self.0.aborted.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl Engine {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        Self::serve(listener, address, "http")
    }

    /// An engine that speaks https with a certificate of this name, to holders of the CA's certificates only.
    pub async fn start_tls(certificates: &Certificates, name: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(rustls_pki_types::CertificateDer::from_pem_slice(certificates.ca().as_bytes()).unwrap())
            .unwrap();
        let verifier =
            rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .build()
                .unwrap();
        let (cert, key) = certificates.issue(name);
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![rustls_pki_types::CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()],
                rustls_pki_types::PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
            )
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        Self::serve(TlsListener { listener, acceptor }, address, "https")
    }

    fn serve<L: Listener<Addr = SocketAddr>>(listener: L, address: SocketAddr, scheme: &'static str) -> Self {
        let inner = Arc::new(Inner {
            behaviour: Mutex::new(Behaviour::Serve),
            requests: Mutex::default(),
            tokens: Mutex::default(),
            steps: Semaphore::new(0),
            aborted: AtomicUsize::new(0),
            came: Notify::new(),
        });
        let app = Router::new().fallback(answer).with_state(inner.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { inner, address, scheme }
    }

    pub fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    pub fn behave(&self, behaviour: Behaviour) {
        *self.inner.behaviour.lock().unwrap() = behaviour;
    }

    /// Lets a stream of [`Behaviour::Step`] go on by so many events.
    pub fn step(&self, events: usize) {
        self.inner.steps.add_permits(events);
    }

    /// What it makes of every text.
    pub fn tokenize_as(&self, tokens: &[u32]) {
        *self.inner.tokens.lock().unwrap() = Some(tokens.to_vec());
    }

    /// Bodies of requests to generate as they came, oldest first.
    pub fn bodies(&self) -> Vec<Bytes> {
        self.inner.requests.lock().unwrap().iter().map(|request| request.2.clone()).collect()
    }

    /// The last body.
    pub fn last(&self) -> Value {
        serde_json::from_slice(self.bodies().last().expect("a request came")).unwrap()
    }

    pub fn last_path(&self) -> String {
        self.inner.requests.lock().unwrap().last().unwrap().0.clone()
    }

    pub fn last_headers(&self) -> HeaderMap {
        self.inner.requests.lock().unwrap().last().unwrap().1.clone()
    }

    /// Requests that were dropped before their end.
    pub fn aborted(&self) -> usize {
        self.inner.aborted.load(Ordering::SeqCst)
    }

    /// Waits until so many requests came.
    pub async fn until_requests(&self, count: usize) {
        while self.bodies().len() < count {
            self.inner.came.notified().await;
        }
    }
}

async fn answer(
    State(inner): State<Arc<Inner>>,
    uri: http::Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if uri.path() == "/tokenize" {
        return match &*inner.tokens.lock().unwrap() {
            Some(tokens) => axum::Json(json!({ "tokens": tokens })).into_response(),
            None => StatusCode::NOT_FOUND.into_response(),
        };
    }
    inner.requests.lock().unwrap().push((uri.path().to_owned(), headers, body.clone()));
    inner.came.notify_one();
    let behaviour = *inner.behaviour.lock().unwrap();
    let request: Value = serde_json::from_slice(&body).unwrap();
    let plan = &request["kv_transfer_params"]["baton"];
    let mut unfinished = Unfinished(inner.clone(), false);
    match behaviour {
        Behaviour::Status(status) => {
            unfinished.1 = true;
            let error = json!({"error": {"message": "no", "type": "X", "param": null, "code": status}});
            return (StatusCode::from_u16(status).unwrap(), error.to_string()).into_response();
        }
        Behaviour::Hang => std::future::pending().await,
        Behaviour::BreakOff => {
            let broken = futures::stream::iter([Err::<Bytes, _>(std::io::Error::other("broken"))]);
            return Response::new(Body::from_stream(broken));
        }
        Behaviour::Step if request["stream"] != true => inner.steps.acquire().await.unwrap().forget(),
        Behaviour::StepToFail => {
            inner.steps.acquire().await.unwrap().forget();
            unfinished.1 = true;
            return StatusCode::INTERNAL_SERVER_ERROR.into_response();
        }
        Behaviour::Serve | Behaviour::NeverHold | Behaviour::Step => {}
    }
    if request["stream"] == true {
        let events = request["max_tokens"].as_u64().unwrap_or(4) as usize;
        let stream = futures::stream::unfold((0, unfinished), move |(sent, mut unfinished)| {
            let inner = inner.clone();
            async move {
                // The last event is out: what follows is no abort.
                unfinished.1 |= sent > events;
                if unfinished.1 {
                    return None;
                }
                if behaviour == Behaviour::Step {
                    inner.steps.acquire().await.unwrap().forget();
                }
                let event = match sent == events {
                    true => "data: [DONE]\n\n".to_owned(),
                    false => format!("data: {{\"choices\":[{{\"index\":0,\"text\":\"t{sent}\"}}]}}\n\n"),
                };
                Some((Ok::<_, Infallible>(Bytes::from(event)), (sent + 1, unfinished)))
            }
        });
        let headers = [("content-type", "text/event-stream; charset=utf-8"), ("x-request-id", "r-1")];
        return (headers, Body::from_stream(stream.boxed())).into_response();
    }
    let mut reply = json!({
        "id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, "text": " ok", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 1},
    });
    if plan["action"] == "hold" && behaviour != Behaviour::NeverHold {
        let tokens = request["prompt"].as_array().map_or(201, Vec::len);
        let held = json!({"transfer_id": plan["transfer_id"], "epoch": 1, "num_tokens": tokens});
        reply["kv_transfer_params"] = json!({ "baton": held });
    }
    unfinished.1 = true;
    ([("content-type", "application/json")], reply.to_string()).into_response()
}

struct TlsListener {
    listener: TcpListener,
    acceptor: tokio_rustls::TlsAcceptor,
}

impl Listener for TlsListener {
    type Io = tokio_rustls::server::TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let (socket, peer) = self.listener.accept().await.unwrap();
            if let Ok(stream) = self.acceptor.accept(socket).await {
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}
