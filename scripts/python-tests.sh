#!/usr/bin/env bash
# Unit tests of the vLLM connector that need neither vLLM nor a GPU, in a small virtual environment of their own.
set -euo pipefail
cd "$(dirname "$0")/.."

venv="${BATON_CACHE:-$HOME/.cache/baton}/python-tests"
stamp="$venv/.ready-1"
if [ ! -f "$stamp" ]; then
    rm -rf "$venv"
    mkdir -p "$(dirname "$venv")"
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q msgspec==0.22.0 pytest==9.2.0
    touch "$stamp"
fi
PYTHONPATH=agent/connector exec "$venv/bin/python" -m pytest -q -p no:cacheprovider agent/connector/tests "$@"
