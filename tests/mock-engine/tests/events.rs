//! KV events over ZMQ: what a subscriber sees, and what it can have replayed.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};
use support::Engine;
use zeromq::{DealerSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

/// Sequence number and batch of a message's last two frames.
fn batch(message: ZmqMessage) -> (i64, Option<Value>) {
    let frames = message.into_vec();
    let [.., number, payload] = frames.as_slice() else { panic!("{frames:?}") };
    let number = i64::from_be_bytes(number.as_ref().try_into().unwrap());
    (number, (!payload.is_empty()).then(|| rmp_serde::from_slice(payload).unwrap()))
}

async fn replay(endpoint: &str, from: u64) -> Vec<(i64, Option<Value>)> {
    let mut dealer = DealerSocket::new();
    dealer.connect(endpoint).await.unwrap();
    let mut request = ZmqMessage::from(Vec::new());
    request.push_back(from.to_be_bytes().to_vec().into());
    dealer.send(request).await.unwrap();
    let mut batches = Vec::new();
    loop {
        let message = tokio::time::timeout(Duration::from_secs(10), dealer.recv()).await.unwrap().unwrap();
        assert!(message.get(0).unwrap().is_empty());
        batches.push(batch(message));
        if batches.last().unwrap().0 == -1 {
            return batches;
        }
    }
}

/// Hears the batches with these numbers, and nothing in between.
async fn hear(subscriber: &mut SubSocket, heard: &mut Vec<Value>, numbers: std::ops::Range<i64>) {
    for expected in numbers {
        let message = tokio::time::timeout(Duration::from_secs(10), subscriber.recv()).await.unwrap();
        let (number, batch) = batch(message.unwrap());
        assert_eq!(number, expected);
        heard.push(batch.unwrap());
    }
}

/// Which blocks are cached, by what the batches say; the hashes are checked to form chains.
fn follow(batches: &[Value]) -> BTreeSet<u64> {
    let mut cached = BTreeSet::new();
    for batch in batches {
        assert_eq!(batch[2], 0);
        for event in batch[1].as_array().unwrap() {
            let hashes =
                event["block_hashes"].as_array().into_iter().flatten().map(|hash| hash.as_u64().unwrap());
            match event["type"].as_str().unwrap() {
                "BlockStored" => {
                    assert_eq!(event["block_size"], 16);
                    let hashes: Vec<u64> = hashes.collect();
                    assert_eq!(event["token_ids"].as_array().unwrap().len(), 16 * hashes.len());
                    assert!(
                        event["parent_block_hash"].as_u64().is_none_or(|parent| cached.contains(&parent))
                    );
                    cached.extend(hashes);
                }
                "BlockRemoved" => hashes.for_each(|hash| assert!(cached.remove(&hash))),
                "AllBlocksCleared" => cached.clear(),
                other => panic!("{other}"),
            }
        }
    }
    cached
}

#[tokio::test(flavor = "multi_thread")]
async fn subscribers_and_replays_tell_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let events = format!("ipc://{}/events", folder.path().display());
    let replays = format!("ipc://{}/replays", folder.path().display());
    let options = [
        "--blocks",
        "20",
        "--kv-events-endpoint",
        &events,
        "--kv-replay-endpoint",
        &replays,
        "--kv-events-topic",
        "t",
        "--kv-events-buffer-steps",
        "5",
    ];
    let engine = Engine::start(&options).await;
    let mut subscriber = SubSocket::new();
    subscriber.connect(&events).await.unwrap();
    subscriber.subscribe("").await.unwrap();
    let prompt = |salt: u32| (0..100).map(|i| i * salt + 3).collect::<Vec<u32>>();
    // A subscription takes a moment to arrive; until then nothing is heard. Each reset is a batch.
    let mut heard = Vec::new();
    let (mut published, mut next) = (0, 0);
    while heard.is_empty() {
        engine.post("/reset_prefix_cache", &json!({})).await;
        published += 1;
        if let Ok(message) = tokio::time::timeout(Duration::from_millis(200), subscriber.recv()).await {
            let message = message.unwrap();
            assert_eq!(message.get(0).unwrap().as_ref(), b"t");
            assert_eq!(message.len(), 3);
            let (number, batch) = batch(message);
            next = number + 1;
            heard.push(batch.unwrap());
        }
    }
    // Prompts of 6 full blocks each in a cache of 19: the fourth evicts the first one's end.
    for salt in 2..6 {
        engine.complete(json!({"prompt": prompt(salt), "max_tokens": 1})).await;
    }
    let count = published + 4;
    hear(&mut subscriber, &mut heard, next..count).await;
    let all = replay(&replays, 0).await;
    let numbers: Vec<i64> = all.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, (0.max(count - 5)..count).chain([-1]).collect::<Vec<_>>());
    assert_eq!(all[all.len() - 2].1.as_ref(), heard.last());
    let cached = follow(&heard);
    assert!((13..=19).contains(&cached.len()), "{}", cached.len());

    let last = replay(&replays, count as u64 - 1).await;
    assert_eq!(last.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [count - 1, -1]);
    assert_eq!(replay(&replays, count as u64).await, [(-1, None)]);

    engine.post("/reset_prefix_cache", &json!({})).await;
    hear(&mut subscriber, &mut heard, count..count + 1).await;
    assert!(follow(&heard).is_empty());
    engine.server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_hash_the_same_content_differently() {
    let mut seen = BTreeSet::new();
    for _ in 0..2 {
        let folder = tempfile::tempdir().unwrap();
        let events = format!("ipc://{}/events", folder.path().display());
        let replays = format!("ipc://{}/replays", folder.path().display());
        let options = ["--blocks", "20", "--kv-events-endpoint", &events, "--kv-replay-endpoint", &replays];
        let engine = Engine::start(&options).await;
        engine.complete(json!({"prompt": (0..32).collect::<Vec<u32>>(), "max_tokens": 1})).await;
        // The answer may be out before its events are.
        let batches = tokio::time::timeout(Duration::from_secs(10), async {
            loop {
                let replayed = replay(&replays, 0).await;
                let batches: Vec<Value> = replayed.into_iter().filter_map(|(_, batch)| batch).collect();
                if !batches.is_empty() {
                    return batches;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        let batches = batches.await.unwrap();
        assert_eq!(batches.len(), 1);
        seen.extend(follow(&batches));
        engine.server.stop().await.unwrap();
    }
    assert_eq!(seen.len(), 4);
}
