#!/usr/bin/env bash
# Installs what the build and the tests need besides Rust and Python 3: protoc, etcd and a C toolchain from
# the distribution's packages. Does nothing, quickly, where all of it is there.
set -euo pipefail

missing=()
command -v cc >/dev/null || missing+=(gcc libc6-dev)
command -v g++ >/dev/null || missing+=(g++)
command -v protoc >/dev/null || missing+=(protobuf-compiler)
[ -f /usr/include/google/protobuf/empty.proto ] || missing+=(libprotobuf-dev)
command -v etcd >/dev/null || missing+=(etcd-server)
command -v pkg-config >/dev/null || missing+=(pkg-config)
python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)

if [ ${#missing[@]} -gt 0 ]; then
    as_root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || {
            echo "setup: need ${missing[*]}; install them, or run this once as root" >&2
            exit 1
        }
        as_root=(sudo)
    fi
    command -v apt-get >/dev/null || {
        echo "setup: no apt-get here; install the equivalents of: ${missing[*]}" >&2
        exit 1
    }
    echo "setup: installing ${missing[*]}" >&2
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
