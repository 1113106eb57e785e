# Every target installs what it needs on first use. `make demo` and `make test` are the two to begin with.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
CARGO ?= cargo
json = $(if $(JSON),--json)

.PHONY: help setup build demo up test lint e2e e2e-fast e2e-random record-events
.PHONY: bench bench-overhead bench-transfer bench-placement
.PHONY: kernels-check peers-handoff peers-http peers-index

help: ## this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup:
	@scripts/setup.sh

build: setup ## all binaries, into target/debug
	$(CARGO) build --workspace

demo: build ## four mock engines, three modes, one table (JSON=1: ends in a JSON line)
	target/debug/baton demo $(json)

up: build ## the same fleet, until Ctrl-C, with a curl line that works
	target/debug/baton up

test: build ## unit, property, protocol and integration tests, and the end-to-end suite on mock engines
	$(CARGO) test --workspace
	scripts/python-tests.sh

kernels-check: setup ## compile every CUDA kernel for sm_80, sm_90 and sm_100, and test their CPU reference; needs no GPU
	scripts/kernels-check.sh

lint: setup ## formatting, clippy, dependency rules
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	scripts/check-deps.sh

e2e: build ## acceptance suite on real vLLM with SmolLM2 and real etcd (JSON=1: ends in a JSON line)
	tests/e2e/run.sh smollm2 $(json)

e2e-fast: build ## acceptance suite on mock engines
	target/debug/baton-e2e --engine mock $(json)

e2e-random: build ## acceptance suite on real vLLM with a small random-weight model; no timed comparison, recorded KV events instead of live ones (CI)
	tests/e2e/run.sh random --skip ttft --skip sim --skip index $(json)

record-events: build ## record real vLLM's KV events anew, for the tests that replay them (tests/e2e/fixtures)
	tests/e2e/run.sh random --only index --record tests/e2e/fixtures

bench: setup ## simulated fleets side by side, as target/bench/report.html; TRACE=path FORMAT=mooncake|azure|sessions|multiturn, FLEET=file
	$(CARGO) build --release -p baton
	target/release/baton bench report $(if $(TRACE),--trace "$(TRACE)") $(if $(FORMAT),--format $(FORMAT)) $(if $(FLEET),--fleet "$(FLEET)") $(json)

bench-overhead: setup ## what tokenising and proxying add to TTFT
	$(CARGO) build --release -p baton-bench-overhead -p baton-coordinator -p baton-agent -p baton-mock-engine
	target/release/baton-bench-overhead $(json)

bench-transfer: setup ## block transfer between two processes of one host: over loopback QUIC, and from memory to memory
	$(CARGO) run --release -p baton-kv-transfer --example transfer_bench

bench-placement: setup ## how long a placement decision takes; TRACE=file: how it spreads a trace
	$(CARGO) build --release -p baton-bench-placement
	target/release/baton-bench-placement $(if $(TRACE),--trace $(TRACE))

peers-handoff: setup ## handoff beside vLLM's own NixlConnector on the same engines
	benches/peers/handoff/run.sh

peers-index: ## the KV index beside peers' own crates; TRACE=path of the Mooncake conversation trace
	@TRACE="$(TRACE)" benches/peers/index/run.sh

peers-http: setup ## the proxy path beside vllm-router: requests per second (ends in a JSON line)
	benches/peers/http/run.sh
