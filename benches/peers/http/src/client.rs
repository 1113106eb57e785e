//! One HTTP request at a time, for checks.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// An answer.
pub struct Answer {
    pub status: u16,
    headers: String,
    pub body: Vec<u8>,
}

impl Answer {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The body as JSON; an error unless the status is 200.
    pub fn json(&self) -> Result<Value> {
        ensure!(self.status == 200, "status {}: {}", self.status, String::from_utf8_lossy(&self.body));
        Ok(serde_json::from_slice(&self.body)?)
    }
}

/// Asks over a connection of its own.
pub async fn ask(host: &str, method: &str, path: &str, body: &[u8]) -> Result<Answer> {
    let mut socket = TcpStream::connect(host).await.with_context(|| format!("{host} cannot be reached"))?;
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).await?;
    socket.write_all(body).await?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).await?;
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").context("no head")?;
    let headers = String::from_utf8(answer[..end].to_vec())?;
    let status = headers.split(' ').nth(1).context("no status")?.parse()?;
    if headers.to_ascii_lowercase().contains("transfer-encoding") {
        bail!("an answer without a length");
    }
    Ok(Answer { status, headers, body: answer.split_off(end + 4) })
}
