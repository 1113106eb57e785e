#!/usr/bin/env bash
# Compiles every CUDA kernel for every architecture with NVRTC, and runs the tests of the kernels' CPU reference (and of
# the kernels themselves, where there is a GPU). Needs no GPU and no CUDA toolkit: NVRTC comes from PyPI.
#
#   scripts/kernels-check.sh [--write]
#
# --write makes the PTX anew that the library embeds (kernels/ptx/), after a change of a kernel.
# BATON_CACHE names the folder that NVRTC is installed in; the default is ~/.cache/baton.
set -euo pipefail
cd "$(dirname "$0")/.."

# The PTX depends on it: a newer one needs a newer driver on every GPU host (12.8: driver 570). The first to know sm_100.
nvrtc=nvidia-cuda-nvrtc-cu12==12.8.93
venv=${BATON_CACHE:-$HOME/.cache/baton}/nvrtc
stamp=$venv/.ready

if [[ ! -f $stamp || "$(<"$stamp")" != "$nvrtc" ]]; then
    echo "kernels-check: installing NVRTC in $venv (230 MB)" >&2
    rm -rf "$venv"
    mkdir -p "$(dirname "$venv")"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "$nvrtc"
    echo "$nvrtc" >"$stamp"
fi
lib=$(echo "$venv"/lib/python3*/site-packages/nvidia/cuda_nvrtc/lib)

cargo=${CARGO:-cargo}
LD_LIBRARY_PATH="$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" \
    "$cargo" run --quiet -p baton-kernels --example compile_kernels -- "$@"
"$cargo" test --quiet -p baton-kernels
