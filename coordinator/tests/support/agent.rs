//! An agent's side of a session.

use std::time::Duration;

use baton_proto::control::v1;
use baton_proto::control::v1::agent_message::Message as Said;
use baton_proto::control::v1::control_client::ControlClient;
use baton_proto::control::v1::coordinator_message::Message as Answer;
use baton_proto::control::v1::kv_event::Event;
use baton_proto::control::{pack_hashes, v1::KvEvent};
use baton_proto::{BlockHash, TransferId};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Status, Streaming};

use super::Fleet;

/// A session.
pub struct Agent {
    said: mpsc::Sender<v1::AgentMessage>,
    answers: Streaming<v1::CoordinatorMessage>,
    /// The answer to the registration.
    pub registered: v1::Registered,
    /// What came and nobody asked for yet.
    seen: Vec<Answer>,
}

/// A registration of an engine that can transfer.
pub fn register(id: &str, url: &str) -> v1::Register {
    v1::Register {
        engine_id: id.to_owned(),
        epoch: 1,
        models: vec!["m".to_owned()],
        engine_url: url.to_owned(),
        transfer_address: format!("{id}.example:7420"),
        block_size: 16,
        num_blocks: 1000,
        block_bytes: 4096,
        wire_block_bytes: 0,
        chunk_tokens: 0,
        role: v1::Role::Both as i32,
        can_transfer: true,
        layout: "same".to_owned(),
        last_event_seq: 0,
        groups: Vec::new(),
        version: "test".to_owned(),
        adapters: Vec::new(),
    }
}

/// A client of the control plane with a certificate of this name.
pub async fn client(fleet: &Fleet, name: &str) -> Result<ControlClient<Channel>, tonic::transport::Error> {
    let (cert, key) = fleet.certificates.issue(name);
    let tls = ClientTlsConfig::new()
        .domain_name("coordinator")
        .ca_certificate(Certificate::from_pem(fleet.certificates.ca()))
        .identity(Identity::from_pem(cert, key));
    let address = format!("https://{}", fleet.server.control_address);
    let channel = Endpoint::from_shared(address)?.tls_config(tls)?.connect().await?;
    Ok(ControlClient::new(channel))
}

impl Agent {
    pub async fn connect(fleet: &Fleet, register: v1::Register) -> Self {
        let name = register.engine_id.clone();
        Self::try_connect(fleet, &name, Said::Register(register)).await.unwrap()
    }

    /// Opens a session with a certificate of this name and a first message.
    pub async fn try_connect(fleet: &Fleet, name: &str, first: Said) -> Result<Self, Status> {
        let mut client = client(fleet, name).await.map_err(|error| Status::unavailable(error.to_string()))?;
        let (said, messages) = mpsc::channel(16);
        said.send(v1::AgentMessage { message: Some(first) }).await.unwrap();
        let mut answers = client.session(ReceiverStream::new(messages)).await?.into_inner();
        let first = answers.message().await?.and_then(|message| message.message);
        let Some(Answer::Registered(registered)) = first else { panic!("{first:?}") };
        Ok(Self { said, answers, registered, seen: Vec::new() })
    }

    pub async fn say(&self, message: Said) {
        self.said.send(v1::AgentMessage { message: Some(message) }).await.unwrap();
    }

    /// Sends a batch; `cleared` begins it.
    pub async fn events(&self, epoch: u64, seq: u64, cleared: bool, stored: &[BlockHash]) {
        let mut events = Vec::new();
        if cleared {
            events.push(KvEvent { event: Some(Event::Cleared(v1::Cleared {})) });
        }
        let stored = v1::BlocksStored {
            hashes: pack_hashes(stored),
            tier: v1::Tier::Gpu as i32,
            parent: Default::default(),
            group: 0,
        };
        events.push(KvEvent { event: Some(Event::Stored(stored)) });
        self.say(Said::Events(v1::EventBatch { epoch, seq, events })).await;
    }

    /// The next answer of a kind; others are kept.
    pub async fn next<T>(&mut self, mut pick: impl FnMut(&Answer) -> Option<T>) -> T {
        if let Some(at) = self.seen.iter().position(|answer| pick(answer).is_some()) {
            return pick(&self.seen.remove(at)).unwrap();
        }
        loop {
            let next = tokio::time::timeout(Duration::from_secs(20), self.answers.message()).await;
            let answer = next.expect("an answer comes").unwrap().expect("the session lasts").message.unwrap();
            match pick(&answer) {
                Some(picked) => return picked,
                None => self.seen.push(answer),
            }
        }
    }

    pub async fn ack(&mut self) -> u64 {
        self.next(|answer| match answer {
            Answer::EventAck(ack) => Some(ack.seq),
            _ => None,
        })
        .await
    }

    pub async fn resync(&mut self) {
        self.next(|answer| matches!(answer, Answer::Resync(_)).then_some(())).await;
    }

    /// Names of the peers it was told last.
    pub async fn peers(&mut self) -> Vec<String> {
        self.next(|answer| match answer {
            Answer::Peers(peers) => Some(peers.peers.iter().map(|peer| peer.engine_id.clone()).collect()),
            _ => None,
        })
        .await
    }

    /// Whether an answer came meanwhile that nobody asked for.
    pub fn has_seen(&self, is: impl Fn(&Answer) -> bool) -> bool {
        self.seen.iter().any(is)
    }

    /// Name and address of the engine that it was told to measure the link from.
    pub async fn asked_to_probe(&mut self) -> (String, String) {
        self.next(|answer| match answer {
            Answer::ProbeLink(probe) => Some((probe.engine_id.clone(), probe.transfer_address.clone())),
            _ => None,
        })
        .await
    }

    pub async fn released(&mut self) -> TransferId {
        self.next(|answer| match answer {
            Answer::ReleaseHold(hold) => {
                Some(TransferId::from_bytes(hold.transfer_id.as_ref().try_into().unwrap()))
            }
            _ => None,
        })
        .await
    }

    /// The status that ends the session.
    pub async fn ended(mut self) -> Status {
        loop {
            match tokio::time::timeout(Duration::from_secs(20), self.answers.message())
                .await
                .expect("it ends")
            {
                Ok(Some(_)) => {}
                Ok(None) => return Status::ok("closed"),
                Err(status) => return status,
            }
        }
    }
}
