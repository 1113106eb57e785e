#!/usr/bin/env python3
"""Handoff between two vLLM engines: vLLM's own NixlConnector and Baton, in one run on one machine.

For each prompt, the prefill leg goes to the one engine and then the decode leg, streamed, to the other. What is
measured is the decode leg's time to the first token: the handoff and one token's step. Prompts are random token
ids, new each time, so that neither engine has a prefix of one; both sides get the same prompts and take turns.
Baton's agents run as in production: mutual TLS, checksums, a coordinator. Nixl's payload is plain.

All four engines run at once with the same flags. Nixl's pair is stopped (SIGSTOP) while Baton's is asked: an idle
engine with NixlConnector takes most of a core for its progress thread. Baton's pair idles while Nixl's is asked; what
it and its agents take of the processor meanwhile is in the result. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[3]
MODEL = "smollm2"
HOST = "127.0.0.1"
START_S = 420.0
# An engine's worker spins for a second behind its last step before it sleeps.
SETTLE_S = 1.5
# Longest that an engine may take to answer, and how often a handoff is tried.
TIMEOUT_S = 60.0
ATTEMPTS = 3
# A decode leg that computed more than this many prompt tokens has not used what it was handed.
MOST_COMPUTED = 32


@dataclass
class Engine:
    name: str
    port: int
    process: subprocess.Popen[bytes]

    def ready(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://{HOST}:{self.port}/health", timeout=2).status == 200
        return False

    def counters(self) -> dict[str, float]:
        text = urllib.request.urlopen(f"http://{HOST}:{self.port}/metrics", timeout=30).read().decode()
        values: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("vllm:"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{")[0]
                values[name] = values.get(name, 0.0) + float(value)
        return values

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{self.name}: HTTP {error.code}: {error.read().decode()[:400]}") from None

    def stream(self, body: dict[str, Any]) -> tuple[float, str]:
        """Seconds to the first token, and the whole text."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=TIMEOUT_S)
        connection.connect()
        payload = json.dumps(body | {"stream": True}).encode()
        began = time.perf_counter()
        connection.request("POST", "/v1/completions", payload, {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"{self.name}: HTTP {answer.status}: {answer.read().decode()[:400]}")
        first, text = 0.0, ""
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            first = first or time.perf_counter() - began
            text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
        connection.close()
        return first, text


@dataclass
class Side:
    """One connector's pair of engines, and how a request is handed over between them."""

    name: str
    prefill: Engine
    decode: Engine
    hold: Callable[[], dict[str, Any]]
    pull: Callable[[dict[str, Any]], dict[str, Any]]
    # Whether its idle engines take so much of the processor that the other side cannot be measured beside them.
    spins: bool
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)
    unfinished: int = 0
    seconds: dict[int, list[float]] = field(default_factory=dict)
    prefill_seconds: dict[int, list[float]] = field(default_factory=dict)

    def rest(self, stopped: bool) -> None:
        """Stops both engines, with all their processes, or lets them go on, where the side needs it."""
        if self.spins:
            for engine in (self.prefill, self.decode):
                os.killpg(engine.process.pid, signal.SIGSTOP if stopped else signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """Of all processes of the side, so far."""
        sessions = {process.pid for process in [self.prefill.process, self.decode.process, *self.others]}
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # Behind the name, which is in parentheses: state, parent, group, session, … and utime, stime.
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) in sessions:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def insist(self, tokens: list[int], out: int) -> tuple[float, float, str]:
        """A handoff; one that does not come to its end is counted, and tried again, so that it is in no median."""
        for _ in range(ATTEMPTS - 1):
            try:
                return self.handoff(tokens, out)
            except TimeoutError:
                self.unfinished += 1
                print(f"{self.name}: a handoff of {len(tokens)} tokens did not end in {TIMEOUT_S} s", file=sys.stderr)
        return self.handoff(tokens, out)

    def handoff(self, tokens: list[int], out: int) -> tuple[float, float, str]:
        body = {"model": MODEL, "prompt": tokens, "temperature": 0}
        began = time.perf_counter()
        answer = self.prefill.complete(body | {"max_tokens": 1, "kv_transfer_params": self.hold()})
        prefill_s = time.perf_counter() - began
        params = answer.get("kv_transfer_params")
        if not params:
            raise SystemExit(f"{self.name}: the prefill leg's answer holds no kv_transfer_params")
        before = self.decode.counters()
        first_s, text = self.decode.stream(body | {"max_tokens": out, "kv_transfer_params": self.pull(params)})
        after = self.decode.counters()
        hits = after["vllm:external_prefix_cache_hits_total"] - before["vllm:external_prefix_cache_hits_total"]
        if len(tokens) - hits > MOST_COMPUTED:
            raise SystemExit(f"{self.name}: of {len(tokens)} tokens handed over, {hits:.0f} were taken")
        return prefill_s, first_s, text


class Stack(contextlib.ExitStack):
    """Starts processes, each with its log, and ends them all, with all their children."""

    def __init__(self, logs: Path) -> None:
        super().__init__()
        self.logs = logs

    def start(self, name: str, command: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        log = self.enter_context(open(self.logs / f"{name}.log", "wb"))
        process = subprocess.Popen(
            command, env=os.environ | (env or {}), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self.callback(self._end, process)
        return process

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        for how, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
                os.killpg(process.pid, signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def engine(self, name: str, port: int, model: Path, config: dict[str, Any], env: dict[str, str]) -> Engine:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", MODEL, "--host", HOST, "--port", str(port)]
        command += ["--enforce-eager", "--block-size", "32", "--disable-uvicorn-access-log"]
        command += ["--kv-transfer-config", json.dumps(config | {"kv_role": "kv_both"})]
        common = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        return Engine(name, port, self.start(name, command, common | env))


def nixl(stack: Stack, model: Path, port: int) -> Side:
    engines = [
        stack.engine(
            f"nixl-{i}",
            port + i,
            model,
            {"kv_connector": "NixlConnector", "kv_buffer_device": "cpu"},
            {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port + 4 + i)},
        )
        for i in range(2)
    ]
    return Side(
        "nixl",
        *engines,
        hold=lambda: {"do_remote_decode": True, "do_remote_prefill": False},
        pull=lambda answer: answer,
        spins=True,
    )


def baton(stack: Stack, model: Path, port: int, bins: Path, run: Path) -> Side:
    control, transfers = port + 9, [port + 10, port + 11]
    certs = run / "certs"
    tool = str(bins / "baton")
    subprocess.run([tool, "certs", "init", str(certs)], check=True, stdout=subprocess.DEVNULL)
    for name in ("coordinator", "p0", "d0"):
        subprocess.run([tool, "certs", "issue", str(certs), name], check=True, stdout=subprocess.DEVNULL)

    def tls(name: str) -> str:
        return f'[tls]\nca = "{certs}/ca.pem"\ncert = "{certs}/{name}.pem"\nkey = "{certs}/{name}.key"\n'

    (run / "coordinator.toml").write_text(
        f'listen = "{HOST}:{port + 8}"\ncontrol_listen = "{HOST}:{control}"\nstore = "embedded:{run}/coordinator.redb"\n'
        f'{tls("coordinator")}[[models]]\nname = "{MODEL}"\npath = "{model}"\n'
    )
    others = [stack.start("coordinator", [str(bins / "baton-coordinator"), "--config", str(run / "coordinator.toml")])]
    engines = []
    for i, name in enumerate(("p0", "d0")):
        events, replay = port + 12 + 2 * i, port + 13 + 2 * i
        (run / f"{name}.toml").write_text(
            f'engine_id = "{name}"\nrole = "both"\ncoordinator = "https://{HOST}:{control}"\n'
            f'metrics_listen = "{HOST}:{port + 16 + i}"\n'
            f'[engine]\nurl = "http://{HOST}:{port + i}"\nkv_events = "tcp://{HOST}:{events}"\n'
            f'kv_events_replay = "tcp://{HOST}:{replay}"\nsocket = "{run}/{name}.sock"\n'
            f'[transfer]\nlisten = "{HOST}:{transfers[i]}"\n{tls(name)}'
        )
        others.append(stack.start(f"agent-{name}", [str(bins / "baton-agent"), "--config", str(run / f"{name}.toml")]))
        config = {
            "kv_connector": "BatonConnector",
            "kv_connector_module_path": "baton_connector.connector",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"socket": str(run / f"{name}.sock")},
        }
        path = os.pathsep.join(filter(None, [str(REPO / "agent" / "connector"), os.environ.get("PYTHONPATH", "")]))
        engines.append(stack.engine(f"baton-{i}", port + i, model, config, {"PYTHONPATH": path}))

    def hold() -> dict[str, Any]:
        plan = {"version": 1, "transfer_id": uuid.uuid4().hex, "action": "hold", "lease_ms": 60_000}
        return {"baton": plan}

    def pull(answer: dict[str, Any]) -> dict[str, Any]:
        held = answer["baton"]
        source = {"engine_id": "p0", "address": f"{HOST}:{transfers[0]}", "epoch": held["epoch"]}
        plan = {"version": 1, "transfer_id": held["transfer_id"], "action": "pull", "num_tokens": held["num_tokens"]}
        return {"baton": plan | {"source": source, "deadline_ms": 30_000}}

    return Side("baton", *engines, hold=hold, pull=pull, spins=False, others=others)


def wait_ready(sides: list[Side]) -> None:
    deadline = time.monotonic() + START_S
    for engine in [engine for side in sides for engine in (side.prefill, side.decode)]:
        while not engine.ready():
            if engine.process.poll() is not None:
                raise SystemExit(f"{engine.name} ended with {engine.process.returncode}: see its log")
            if time.monotonic() > deadline:
                raise SystemExit(f"{engine.name} was not ready in {START_S:.0f} s: see its log")
            time.sleep(0.5)


def words(model: Path) -> list[int]:
    """Tokens that are whole words. Others, run together, are no text, which upsets the engines' detokenizer."""
    vocabulary: dict[str, int] = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    return sorted(token for text, token in vocabulary.items() if re.fullmatch("Ġ[A-Za-z]{2,}", text))


def rounds(sizes: list[int], repeats: list[int], rng: random.Random) -> Iterator[int]:
    """Sizes mixed, so that a slow minute of the machine falls on all of them."""
    asked = [size for size, times in zip(sizes, repeats) for _ in range(times)]
    rng.shuffle(asked)
    return iter(asked)


def summary(side: Side) -> dict[str, dict[str, float]]:
    return {
        str(size): {
            "p50_ms": round(statistics.median(seconds) * 1e3, 1),
            "min_ms": round(min(seconds) * 1e3, 1),
            "max_ms": round(max(seconds) * 1e3, 1),
            "n": len(seconds),
            "cold_prefill_p50_ms": round(statistics.median(side.prefill_seconds[size]) * 1e3, 1),
        }
        for size, seconds in sorted(side.seconds.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model to serve")
    parser.add_argument("--bins", type=Path, required=True, help="folder of Baton's binaries")
    parser.add_argument("--run", type=Path, required=True, help="folder for logs, certificates and sockets")
    parser.add_argument("--port", type=int, default=23200, help="first of 40 ports")
    parser.add_argument("--sizes", type=int, nargs="+", default=[60, 1000, 3000], help="prompt lengths in tokens")
    parser.add_argument("--repeats", type=int, nargs="+", default=[15, 9, 7], help="measurements of each")
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    if len(args.sizes) != len(args.repeats):
        parser.error("--repeats: give one number for each of --sizes")
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    args.run.mkdir(parents=True, exist_ok=True)

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with Stack(args.run) as stack:
        sides = [
            nixl(stack, args.model, args.port),
            baton(stack, args.model, args.port + 20, args.bins, args.run),
        ]
        print(f"seed {seed}; waiting for four engines, logs in {args.run}", file=sys.stderr)
        wait_ready(sides)

        equal = total = 0
        idle_cpu_s = idle_s = 0.0
        # The first handoff of each side pays for its connections, and the first of each size for its kernels.
        vocabulary = words(args.model)
        for counted, asked in ((False, iter(args.sizes)), (True, rounds(args.sizes, args.repeats, rng))):
            for size in asked:
                tokens = rng.choices(vocabulary, k=size)
                rng.shuffle(sides)
                texts = []
                for side, other in (sides, sides[::-1]):
                    other.rest(stopped=True)
                    side.rest(stopped=False)
                    time.sleep(SETTLE_S)
                    began, other_began = time.perf_counter(), other.cpu_seconds()
                    prefill_s, first_s, text = side.insist(tokens, out=8)
                    if not other.spins:
                        idle_cpu_s += other.cpu_seconds() - other_began
                        idle_s += time.perf_counter() - began
                    texts.append(text)
                    if counted:
                        side.seconds.setdefault(size, []).append(first_s)
                        side.prefill_seconds.setdefault(size, []).append(prefill_s)
                    print(
                        f"{'' if counted else 'warm-up '}{side.name:6} {size:5} tokens: prefill {prefill_s * 1e3:8.1f} ms, "
                        f"handoff and first token {first_s * 1e3:6.1f} ms",
                        file=sys.stderr,
                    )
                total += 1
                equal += texts[0] == texts[1]

    by_name = {side.name: summary(side) for side in sides}
    ratios = {
        size: round(by_name["baton"][size]["p50_ms"] / by_name["nixl"][size]["p50_ms"], 3) for size in by_name["nixl"]
    }
    result = {
        "benchmark": "peers-handoff",
        "seed": seed,
        "nixl": by_name["nixl"],
        "baton": by_name["baton"],
        "ratio_p50": ratios,
        "baton_idle_cores": round(idle_cpu_s / idle_s, 3),
        "unfinished": {side.name: side.unfinished for side in sides},
        "equal_answers": f"{equal}/{total}",
        "within_1_1": all(ratio <= 1.1 for ratio in ratios.values()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
