#!/usr/bin/env bash
# Baton's KV index beside its peers' (crates dynamo-kv-router and kv-index), in one run; ends in one JSON line.
#   TRACE=mooncake_conversation_trace.jsonl benches/peers/index/run.sh [options; --help lists them]
set -euo pipefail
cd "$(dirname "$0")"
if [[ -z "${TRACE:-}" ]]; then
    echo "set TRACE to the Mooncake conversation trace: JSON lines with input_length and hash_ids of 512-token blocks" \
        "(conversation_trace.jsonl of the Mooncake project's FAST'25 release)" >&2
    exit 2
fi
if [[ ! -r "$TRACE" ]]; then
    echo "TRACE=$TRACE: no such file" >&2
    exit 2
fi
trace="$(realpath "$TRACE")"
cargo build --release --locked >&2
exec "${CARGO_TARGET_DIR:-target}/release/baton-peers-index" --trace "$trace" "$@"
