#!/usr/bin/env bash
# Handoff beside vLLM's own NixlConnector: see bench.py. Arguments go there. Takes about ten minutes.
set -euo pipefail
cd "$(dirname "$0")/../../.."

python=$(scripts/install-vllm.sh --nixl | tail -n 1)
cache=${BATON_CACHE:-$HOME/.cache/baton}
"$python" tests/e2e/models.py smollm2 "$cache/models/smollm2-bfloat16"
cargo build --release -p baton-coordinator -p baton-agent -p baton
run=$(mktemp -d "${TMPDIR:-/tmp}/baton-handoff.XXXXXX")
exec "$python" benches/peers/handoff/bench.py --model "$cache/models/smollm2-bfloat16" \
    --bins "${CARGO_TARGET_DIR:-target}/release" --run "$run" "$@"
