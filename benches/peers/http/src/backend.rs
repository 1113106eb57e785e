//! An engine that costs next to nothing: it reads a request by its length and answers from a constant.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Largest head of a request.
const MAX_HEAD: usize = 16 << 10;

/// A running engine.
pub struct Backend {
    /// Where it listens.
    pub address: SocketAddr,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    completions: AtomicU64,
    bytes: AtomicU64,
}

impl Backend {
    /// Listens on a free port of the loopback.
    pub async fn start(model: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let counts = Arc::new(Counts::default());
        let answers = Arc::new(Answers::new(model));
        let shared = counts.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (answers, counts) = (answers.clone(), shared.clone());
                tokio::spawn(async move {
                    if let Err(error) = serve(socket, &answers, &counts).await {
                        eprintln!("mock engine: {error:#}");
                    }
                });
            }
        });
        Ok(Self { address, counts })
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Completions answered, and bytes of their bodies.
    pub fn counts(&self) -> (u64, u64) {
        (self.counts.completions.load(Ordering::Relaxed), self.counts.bytes.load(Ordering::Relaxed))
    }
}

/// Whole answers, heads included.
struct Answers {
    completion: Vec<u8>,
    models: Vec<u8>,
    other: Vec<u8>,
    missing: Vec<u8>,
}

impl Answers {
    fn new(model: &str) -> Self {
        let answer = |status: &str, kind: &str, body: &str| {
            let length = body.len();
            format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n{body}")
                .into_bytes()
        };
        let completion = format!(
            r#"{{"id":"cmpl-0","object":"text_completion","created":0,"model":"{model}","choices":[{{"index":0,"text":" ok","logprobs":null,"finish_reason":"length","stop_reason":null}}],"usage":{{"prompt_tokens":1,"total_tokens":2,"completion_tokens":1}}}}"#
        );
        let models = format!(
            r#"{{"object":"list","data":[{{"id":"{model}","object":"model","created":0,"owned_by":"vllm","root":"{model}","max_model_len":131072}}]}}"#
        );
        Self {
            completion: answer("200 OK", "application/json", &completion),
            models: answer("200 OK", "application/json", &models),
            other: answer("200 OK", "text/plain", ""),
            missing: answer("404 Not Found", "text/plain", ""),
        }
    }
}

async fn serve(mut socket: TcpStream, answers: &Answers, counts: &Counts) -> Result<()> {
    socket.set_nodelay(true)?;
    let mut buffer = vec![0; 256 << 10];
    let mut filled = 0;
    loop {
        let head_end = loop {
            if let Some(end) = buffer[..filled].windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            if filled > MAX_HEAD {
                bail!("a head of more than {MAX_HEAD} bytes");
            }
            match socket.read(&mut buffer[filled..]).await {
                Ok(0) | Err(_) => return Ok(()),
                Ok(read) => filled += read,
            }
        };
        let head = std::str::from_utf8(&buffer[..head_end]).context("head")?;
        let mut length = 0;
        for line in head.lines().skip(1) {
            let Some((name, value)) = line.split_once(':') else { continue };
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse().context("content-length")?;
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                bail!("a body without a length");
            }
        }
        let answer = match head.split(' ').nth(1).unwrap_or_default() {
            "/v1/completions" | "/v1/chat/completions" => {
                counts.completions.fetch_add(1, Ordering::Relaxed);
                counts.bytes.fetch_add(length as u64, Ordering::Relaxed);
                &answers.completion
            }
            "/v1/models" => &answers.models,
            "/health" | "/metrics" => &answers.other,
            _ => &answers.missing,
        };
        // The rest of the body is read over the start of the buffer: nobody looks at it.
        let mut left: usize = length;
        let here = left.min(filled - head_end);
        left -= here;
        buffer.copy_within(head_end + here..filled, 0);
        filled -= head_end + here;
        while left > 0 {
            let most = left.min(buffer.len());
            match socket.read(&mut buffer[..most]).await {
                Ok(0) | Err(_) => return Ok(()),
                Ok(read) => left -= read,
            }
        }
        if socket.write_all(answer).await.is_err() {
            return Ok(());
        }
    }
}
