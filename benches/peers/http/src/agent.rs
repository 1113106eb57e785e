//! An agent's control session for a mock engine: it registers it, beats, and says what it holds.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use baton_proto::BlockHash;
use baton_proto::control::pack_hashes;
use baton_proto::control::v1::agent_message::Message as Said;
use baton_proto::control::v1::control_client::ControlClient;
use baton_proto::control::v1::coordinator_message::Message as Answer;
use baton_proto::control::v1::kv_event::Event;
use baton_proto::control::v1::{self, KvEvent};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

const EPOCH: u64 = 1;
const BEAT: Duration = Duration::from_secs(1);

/// A certificate authority for one run.
pub struct Certificates {
    issuer: Issuer<'static, KeyPair>,
    ca: String,
}

impl Certificates {
    /// A new authority.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let ca = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), ca })
    }

    /// Certificate and key for a name, as PEM.
    pub fn issue(&self, name: &str) -> Result<(String, String)> {
        let key = KeyPair::generate()?;
        let params = CertificateParams::new(vec![name.to_owned()])?;
        Ok((params.signed_by(&key, &self.issuer)?.pem(), key.serialize_pem()))
    }

    /// The authority's certificate, as PEM.
    pub fn ca(&self) -> &str {
        &self.ca
    }
}

/// A session.
pub struct Agent {
    said: mpsc::Sender<v1::AgentMessage>,
    answers: Streaming<v1::CoordinatorMessage>,
    seq: u64,
}

impl Agent {
    /// Registers an engine that serves `model`; it neither holds nor pulls, so every request stays on one engine, as
    /// with the peer.
    pub async fn connect(
        certificates: &Certificates,
        control: &str,
        id: &str,
        url: &str,
        model: &str,
        block_size: u32,
    ) -> Result<Self> {
        let (cert, key) = certificates.issue(id)?;
        let tls = ClientTlsConfig::new()
            .domain_name("coordinator")
            .ca_certificate(Certificate::from_pem(certificates.ca()))
            .identity(Identity::from_pem(cert, key));
        let channel = Endpoint::from_shared(format!("https://{control}"))?.tls_config(tls)?.connect().await?;
        let (said, messages) = mpsc::channel(16);
        let register = v1::Register {
            engine_id: id.to_owned(),
            epoch: EPOCH,
            models: vec![model.to_owned()],
            engine_url: url.to_owned(),
            transfer_address: format!("{id}.invalid:7420"),
            block_size,
            num_blocks: 1 << 20,
            block_bytes: 1 << 20,
            wire_block_bytes: 0,
            role: v1::Role::Both as i32,
            can_transfer: false,
            layout: String::new(),
            last_event_seq: 0,
            groups: Vec::new(),
            adapters: Vec::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        said.send(v1::AgentMessage { message: Some(Said::Register(register)) }).await?;
        let mut client = ControlClient::new(channel);
        let mut answers = client.session(ReceiverStream::new(messages)).await?.into_inner();
        match answers.message().await?.and_then(|message| message.message) {
            Some(Answer::Registered(_)) => {}
            other => bail!("the registration was answered with {other:?}"),
        }
        let beats = said.clone();
        tokio::spawn(async move {
            let beat = || v1::AgentMessage { message: Some(Said::Heartbeat(v1::Heartbeat {})) };
            while beats.send(beat()).await.is_ok() {
                tokio::time::sleep(BEAT).await;
            }
        });
        Ok(Self { said, answers, seq: 0 })
    }

    /// Says that the engine holds these blocks, and waits until the coordinator has them.
    pub async fn stored(&mut self, hashes: &[BlockHash]) -> Result<()> {
        self.seq += 1;
        let stored = v1::BlocksStored {
            hashes: pack_hashes(hashes),
            tier: v1::Tier::Gpu as i32,
            ..Default::default()
        };
        let mut events = vec![KvEvent { event: Some(Event::Stored(stored)) }];
        if self.seq == 1 {
            events.insert(0, KvEvent { event: Some(Event::Cleared(v1::Cleared {})) });
        }
        let batch = v1::EventBatch { epoch: EPOCH, seq: self.seq, events };
        self.said.send(v1::AgentMessage { message: Some(Said::Events(batch)) }).await?;
        loop {
            match self.answers.message().await?.context("the session ended")?.message {
                Some(Answer::EventAck(ack)) if ack.seq >= self.seq => return Ok(()),
                Some(Answer::Resync(resync)) => bail!("a resync was asked for: {}", resync.reason),
                _ => {}
            }
        }
    }
}
