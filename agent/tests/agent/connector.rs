//! The socket of the engine's connectors.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use baton_agent::agent::{Agent, StartError};
use baton_proto::connector::{MAX_MESSAGE, Side, ToAgent, ToConnector};

use crate::engine::{Attached, Connection, Engine, Memory, framed, hello};
use crate::fleet::{NOWHERE, Site, metric_is};

async fn agent(site: &Site) -> Agent {
    Agent::start(site.config("e", &Engine::start(site.path(), "e").await, NOWHERE)).await.unwrap()
}

async fn refusal(connection: &mut Connection) -> String {
    loop {
        match connection.next().await {
            Some(ToConnector::Refused { reason }) => {
                connection.closed().await;
                return reason;
            }
            Some(ToConnector::Welcome { .. }) => {}
            other => panic!("{other:?} instead of a refusal"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_is_private_and_goes_with_the_agent() {
    let site = Site::new();
    let agent = agent(&site).await;
    let mode = std::fs::metadata(site.socket("e")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = Agent::start(site.config("e", &Engine::start(site.path(), "e").await, NOWHERE)).await;
    assert!(matches!(second, Err(StartError::Socket(_))));
    assert!(site.socket("e").exists(), "the second agent leaves the first one's socket alone");
    agent.stop().await;
    assert!(!site.socket("e").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_agents_socket_is_replaced_and_other_files_are_not() {
    let site = Site::new();
    drop(UnixListener::bind(site.socket("e")).unwrap());
    let agent = agent(&site).await;
    agent.stop().await;
    std::fs::write(site.socket("e"), "precious").unwrap();
    let error = Agent::start(site.config("e", &Engine::start(site.path(), "e").await, NOWHERE)).await.err();
    assert!(error.unwrap().to_string().contains("engine.socket"));
    assert_eq!(std::fs::read_to_string(site.socket("e")).unwrap(), "precious");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_message_ends_the_connection() {
    let site = Site::new();
    let agent = agent(&site).await;
    let mut too_long = (MAX_MESSAGE as u32 + 1).to_le_bytes().to_vec();
    too_long.extend([0; 64]);
    let mut unknown = framed(&ToAgent::Storage { len: 1 });
    let at = unknown.windows(7).position(|window| window == b"storage").unwrap();
    unknown[at] = b'S';
    for (bytes, word) in [
        (too_long, "16777217 bytes"),
        (vec![1, 0, 0, 0, 0xc1], "message"),
        (unknown, "Storage"),
        (framed(&ToAgent::Cancel { request_id: "r".into() }), "cancel"),
        (framed(&hello("i", Side::Worker(3), 2)), "rank 3"),
    ] {
        let mut connection = Connection::open(&site.socket("e")).await;
        connection.send(&bytes, None).await;
        let reason = refusal(&mut connection).await;
        assert!(reason.contains(word), "{reason}");
    }
    let mut connection = Connection::open(&site.socket("e")).await;
    connection.hang_up();
    assert_eq!(connection.next().await, None);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_may_come_in_pieces_and_in_one_piece() {
    let site = Site::new();
    let agent = agent(&site).await;
    let mut scheduler = Connection::open(&site.socket("e")).await;
    for byte in framed(&hello("i", Side::Scheduler, 1)) {
        scheduler.send(&[byte], None).await;
    }
    assert!(matches!(scheduler.next().await, Some(ToConnector::Welcome { .. })));
    let mut many = Vec::new();
    for i in 0..1000 {
        many.extend(framed(&ToAgent::Cancel { request_id: format!("request-{i}") }));
    }
    scheduler.send(&many, None).await;
    metric_is(&agent, "baton_agent_connector_up", 1.0).await;
    scheduler.hang_up();
    assert_eq!(scheduler.next().await, None);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_does_not_fit_its_layout_is_refused() {
    let site = Site::new();
    let agent = agent(&site).await;
    let memory = Memory::new(1);
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    for (len, word) in [(4096, "layout"), (1 << 20, "layout")] {
        let mut worker = Connection::open(&site.socket("e")).await;
        worker.say(&hello("i", Side::Worker(0), 1)).await;
        worker.say_with(&ToAgent::Storage { len }, &file).await;
        worker.say(&ToAgent::Layout(memory.layout("bf16", 0, 1))).await;
        let reason = refusal(&mut worker).await;
        assert!(reason.contains(word), "{reason}");
    }
    let mut worker = Connection::open(&site.socket("e")).await;
    worker.say(&hello("i", Side::Worker(0), 1)).await;
    worker.say(&ToAgent::Storage { len: 4096 }).await;
    assert!(refusal(&mut worker).await.contains("file descriptor"));
    // After all that, one that does it right is welcome.
    Attached::one(&site.socket("e"), "j").await;
    agent.stop().await;
}
