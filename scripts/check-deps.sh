#!/usr/bin/env bash
# Rules on dependencies: one TLS crypto provider in the whole workspace, and nothing that is not a released version.
set -euo pipefail
cd "$(dirname "$0")/.."

tree=$(cargo tree --workspace --locked --prefix none --edges normal,build --format '{p}' | sort -u)
for banned in aws-lc-rs aws-lc-sys openssl openssl-sys native-tls; do
    if grep -qE "^$banned v" <<<"$tree"; then
        echo "check-deps: $banned is in the tree; ring is the one crypto provider (cargo tree -i $banned)" >&2
        exit 1
    fi
done
if grep -E '^name|^version' Cargo.lock | paste - - | grep -E 'version = "[^"+]*-(alpha|beta|rc|dev|pre)' >&2; then
    echo "check-deps: pre-release versions above; pin released ones" >&2
    exit 1
fi
