//! Memory on a GPU, as a worker names it.

use super::*;
use crate::engine::connector::core::Storages;

fn gpu() -> ToAgent {
    ToAgent::Gpu { uuid: vec![1; 16], ready: vec![2; 64] }
}

fn storage(byte: u8) -> ToAgent {
    ToAgent::CudaStorage { handle: vec![byte; 64], len: 4096 }
}

/// A worker that has said hello, and what it says then.
fn said(messages: Vec<ToAgent>) -> Bed {
    let mut bed = Bed::new();
    bed.input(Input::Connected(worker(0)));
    bed.say(worker(0), hello("i", Side::Worker(0), 1));
    bed.sent();
    bed.done.clear();
    messages.into_iter().for_each(|message| bed.say(worker(0), message));
    bed
}

#[test]
fn allocations_are_opened_in_their_order_on_the_gpu_that_was_named() {
    let bed = said(vec![gpu(), storage(5), storage(6), ToAgent::Layout(layout(0))]);
    let Some(Action::Map(_, Storages::Gpu { uuid, ready, storages }, _, BLOCKS)) = bed.done.last() else {
        panic!("nothing to map");
    };
    assert_eq!((uuid, ready), (&[1; 16], &[2; 64]));
    let handles: Vec<_> = storages.iter().map(|storage| (storage.handle[63], storage.len)).collect();
    assert_eq!(handles, [(5, 4096), (6, 4096)]);
}

#[test]
fn what_names_no_memory_is_refused() {
    for (messages, reason) in [
        (vec![storage(5)], "cuda_storage: send"),
        (vec![gpu(), gpu()], "gpu: send"),
        (vec![gpu(), ToAgent::Storage { len: 8 }], "storage: send"),
        (vec![ToAgent::Storage { len: 8 }], "no file descriptor"),
        (vec![ToAgent::Gpu { uuid: vec![1; 15], ready: vec![2; 64] }], "gpu.uuid"),
        (vec![ToAgent::Gpu { uuid: vec![1; 16], ready: vec![] }], "gpu.ready"),
        (vec![gpu(), ToAgent::CudaStorage { handle: vec![0; 65], len: 1 }], "cuda_storage.handle"),
    ] {
        let mut bed = said(messages);
        let sent = bed.sent();
        let refused = |sent: &[(ConnId, ToConnector)]| match sent {
            [(_, ToConnector::Refused { reason: said })] => said.contains(reason),
            _ => false,
        };
        assert!(refused(&sent), "{reason}: {sent:?}");
        assert_eq!(bed.closed(), [worker(0)].into());
    }
}
