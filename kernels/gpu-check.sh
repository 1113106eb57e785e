#!/usr/bin/env bash
# On a machine with an NVIDIA GPU (driver 570 or newer): builds, checks and times the GPU path in one call of under ten
# minutes. The last line is JSON; the exit status says whether all that is required passed.
#
#   kernels/gpu-check.sh          builds with cargo, or takes what --pack left in target/gpu-check
#   kernels/gpu-check.sh --pack   needs no GPU: builds the programs into target/gpu-check, for a GPU machine that has
#                                 neither cargo nor a network (copy the tree with that folder; 64-bit x86, glibc 2.36)
#
# GIB sets how much KV is handed from process to process (default 8; each process keeps that much on the GPU).
set -uo pipefail
cd "$(dirname "$0")/.."

packed=target/gpu-check

# Builds the test programs and examples, and links them to fixed names in a folder.
pack() {
    local dir=$1 line name path
    rm -rf "$dir"
    mkdir -p "$dir"
    local json
    json=$(cargo test --release --no-run --message-format=json -p baton-kernels) || return 1
    while IFS= read -r line; do
        case $line in
        *'"kind":["lib"]'*) name=unit-tests ;;
        *'"kind":["test"]'*) name=kernel-tests ;;
        *) continue ;;
        esac
        path=$(sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' <<<"$line")
        [[ -n $path ]] && cp "$path" "$dir/$name"
    done < <(grep '"profile":{[^}]*"test":true' <<<"$json")
    cargo build --release -p baton-kernels --example gpu_bench || return 1
    cargo build --release -p baton-kv-transfer --example gpu_transfer || return 1
    cargo build --release -p baton-agent --example two_agents || return 1
    cp target/release/examples/{gpu_bench,gpu_transfer,two_agents} "$dir/"
    for name in unit-tests kernel-tests gpu_bench gpu_transfer two_agents; do
        [[ -x $dir/$name ]] || { echo "gpu-check: cargo built no $name" >&2; return 1; }
    done
    strip "$dir"/* 2>/dev/null
    return 0
}

# The connector's one dependency, for the Python of a machine that has torch and not it.
pack_python() {
    local dir=$1 version
    for version in 3.10 3.11 3.12 3.13; do
        python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
            --platform manylinux2014_x86_64 --python-version "$version" --dest "$dir/wheels" msgspec==0.22.0 ||
            echo "gpu-check: no msgspec for Python $version; the GPU machine has to have it" >&2
    done
}

case "${1:-}" in
--pack)
    pack "$packed" && pack_python "$packed" && du -sh "$packed"
    exit
    ;;
"") ;;
*)
    echo "gpu-check: unknown argument '$1': use no argument, or --pack" >&2
    exit 2
    ;;
esac

if [[ ! -x $packed/two_agents ]]; then
    pack "$packed" || { echo '{"gpu_check":"failed","step":"build"}'; exit 1; }
fi

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
failed=()
export BATON_REQUIRE_GPU=1

# Runs a step, and shows its end where it fails. All of them together have less than ten minutes.
deadline=$((SECONDS + 560))
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS))
    shift 2
    if ((left < limit)); then limit=$((left > 1 ? left : 1)); fi
    echo "== $name"
    if timeout "$limit" "$@" >"$out/$name" 2>&1; then
        tail -n 3 "$out/$name"
        return 0
    fi
    tail -n 40 "$out/$name"
    return 1
}

gpu=$(nvidia-smi --query-gpu=name,driver_version,pcie.link.gen.max,pcie.link.width.max --format=csv,noheader 2>/dev/null | head -n 1)
echo "GPU: ${gpu:-unknown}"

step unit-tests 60 "$packed/unit-tests" || failed+=(unit-tests)
step kernel-tests 120 "$packed/kernel-tests" || failed+=(kernel-tests)

step bench 120 "$packed/gpu_bench" || failed+=(bench)
step transfer 120 "$packed/gpu_transfer" --gib "${GIB:-8}" || failed+=(transfer)

# The connector's part: tensors of vLLM's shapes from PyTorch's own allocator, handed over through two agents.
connector=absent
if python3 -c 'import torch' 2>/dev/null; then
    if ! python3 -c 'import msgspec' 2>/dev/null; then
        tag=$(python3 -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
        for wheel in "$packed"/wheels/msgspec-*-"$tag"-*.whl; do
            [[ -f $wheel ]] && python3 -m zipfile -e "$wheel" "$out/python"
        done
    fi
    if PYTHONPATH=$out/python python3 -c 'import msgspec' 2>/dev/null; then
        connector=passed
        if ! PYTHONPATH=$out/python step connector 150 python3 agent/connector/tests/hand_over.py \
            --agents "$packed/two_agents"; then
            connector=failed
            failed+=(connector)
        fi
    fi
fi

# Fewer random cases: under the sanitizer each takes long. A machine where it cannot run says so; what it finds fails.
sanitizer=absent
if command -v compute-sanitizer >/dev/null; then
    sanitizer=clean
    for tool in memcheck racecheck; do
        if ! PROPTEST_CASES=8 step "sanitizer-$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$packed/kernel-tests" device:: memory:: --test-threads 1; then
            if grep -qi 'not supported' "$out/sanitizer-$tool"; then
                sanitizer=unsupported
            else
                sanitizer=failed
                failed+=("sanitizer-$tool")
            fi
            break
        fi
    done
fi

# A step's JSON, or null where it ended without one.
json() { grep -h '^{' "$out/$1" 2>/dev/null | tail -n 1 | grep . || echo null; }
result=passed
((${#failed[@]} == 0)) || result=failed
printf '{"gpu_check":"%s","failed":"%s","gpu":"%s","sanitizer":"%s","connector":"%s","bench":%s,"transfer":%s,"hand_over":%s}\n' \
    "$result" "${failed[*]-}" "${gpu//\"/}" "$sanitizer" "$connector" "$(json bench)" "$(json transfer)" "$(json connector)"
[[ $result == passed ]]
