#!/usr/bin/env bash
# The acceptance suite on real vLLM: installs vLLM and writes the models on first use, then runs baton-e2e.
#
#   tests/e2e/run.sh smollm2|random [flags of baton-e2e]
#
# BATON_CACHE names the folder that all is kept in; the default is ~/.cache/baton.
set -euo pipefail
cd "$(dirname "$0")/../.."

model=${1:?"which model: smollm2 or random"}
shift
cache=${BATON_CACHE:-$HOME/.cache/baton}
python=$(scripts/install-vllm.sh | tail -n 1)

# Their tokenizer is the mock engine's.
target/debug/baton-mock-engine make-model "$cache/models/mock" >/dev/null
"$python" tests/e2e/models.py hybrid "$cache/models/hybrid" --tokenizer "$cache/models/mock"
case $model in
smollm2) "$python" tests/e2e/models.py smollm2 "$cache/models/smollm2-float32" --dtype float32 ;;
random)
    "$python" tests/e2e/models.py random "$cache/models/random" --tokenizer "$cache/models/mock"
    ;;
*)
    echo "run.sh: unknown model '$model': smollm2 or random" >&2
    exit 2
    ;;
esac
exec target/debug/baton-e2e --engine vllm --model "$model" --cache "$cache" "$@"
