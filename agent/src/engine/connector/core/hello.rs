//! What a connection may say of itself.

use baton_proto::connector::{Hello, Side, VERSION};
use baton_proto::wire::MAX_RANKS;

/// Longest text in a hello, in bytes.
const MAX_TEXT: usize = 1024;

/// What is wrong with a hello, and what would mend it.
pub(super) fn check(hello: &Hello) -> Result<(), String> {
    if hello.version != VERSION {
        return Err(format!(
            "hello.version: the connector speaks {} and the agent {VERSION}; install the connector that came with this agent",
            hello.version
        ));
    }
    for (field, text) in [("instance", &hello.instance), ("model", &hello.model)] {
        if text.is_empty() || text.len() > MAX_TEXT {
            return Err(format!("hello.{field}: {} bytes; send 1 to {MAX_TEXT}", text.len()));
        }
    }
    if !(1..=MAX_RANKS).contains(&hello.tp_size) {
        return Err(format!("hello.tp_size: {}; 1 to {MAX_RANKS} workers are supported", hello.tp_size));
    }
    if !(1..=1 << 16).contains(&hello.block_size) {
        return Err(format!("hello.block_size: {}; 1 to 65536 tokens are supported", hello.block_size));
    }
    if !(1..=u64::from(u32::MAX)).contains(&hello.num_blocks) {
        return Err(format!("hello.num_blocks: {}; 1 to 2^32 - 1 are supported", hello.num_blocks));
    }
    match hello.side {
        Side::Worker(rank) if rank >= hello.tp_size => {
            Err(format!("hello.side: rank {rank} of {} workers", hello.tp_size))
        }
        _ => Ok(()),
    }
}
