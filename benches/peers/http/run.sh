#!/usr/bin/env bash
# Requests per second beside vllm-router: see src/main.rs. Arguments go there. Takes about three minutes.
set -euo pipefail
cd "$(dirname "$0")/../../.."

router_version=0.1.17
cache=${BATON_CACHE:-$HOME/.cache/baton}
env=$cache/vllm-router-$router_version

if ! command -v wrk >/dev/null; then
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends wrk >/dev/null
fi
if [[ ! -f $env/baton-stamp ]]; then
    echo "installing vllm-router $router_version in $env" >&2
    rm -rf "$env"
    mkdir -p "$cache"
    python3 -m venv "$env"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check "vllm-router==$router_version"
    touch "$env/baton-stamp"
fi

# SmolLM2's tokenizer where the tests on real vLLM left it (scripts/install-vllm.sh, tests/e2e/models.py), else the mock engine's.
model=$cache/models/smollm2-bfloat16
if [[ ! -f $model/tokenizer.json ]]; then
    model=$cache/models/mock
    cargo run --release -p baton-mock-engine -- make-model "$model"
fi

cargo build --release -p baton-coordinator
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
CARGO_TARGET_DIR=$target cargo build --release --manifest-path benches/peers/http/Cargo.toml
# Not exec: the bench ends its children by their process groups.
"$target/release/baton-bench-http" --coordinator "$target/release/baton-coordinator" \
    --router "$env/bin/vllm-router" --model "$model" --script benches/peers/http/load.lua "$@"
