#!/usr/bin/env python3
"""Hands KV tensors from one PyTorch process to another, through the connector and two real agents.

    hand_over.py --agents PROGRAM [--device cuda|cpu] [--blocks N]

PROGRAM is the example `two_agents` of baton-agent. Two engines stand in for vLLM, each a process with KV tensors of
the shapes and strides that vLLM's attention backends take, filled by kernels that are still running when the blocks
are held. One holds, the other pulls into poisoned memory; then every byte of it is looked at. Each shape goes both
ways: straight from memory to memory, and over QUIC (through a relay, since agents that see that they share a host
do without). Needs torch and msgspec, neither vLLM nor pytest. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import select
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from baton_connector import layout, memory
from baton_connector.link import Link, Registration
from baton_connector.protocol import Hello
from baton_connector.scheduler import Scheduler
from baton_connector.worker import Worker

POISON = 0xA5
PATIENCE_S = 60.0
LEASE_MS = 60_000
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Shape:
    """KV tensors of one attention backend."""

    layers: int
    # `blocks` stands for the number of blocks.
    dims: tuple[int | str, ...]
    dtype: torch.dtype
    # Which dimension comes after which in memory; in order where it is empty.
    order: tuple[int, ...] = ()
    # All layers in one allocation.
    together: bool = False


SHAPES = {
    "K and V apart, NHD, bf16 (FlashAttention, Llama 8B)": Shape(32, (2, "blocks", 16, 8, 128), torch.bfloat16),
    "K and V together, NHD, bf16 (FlashInfer)": Shape(32, ("blocks", 2, 16, 8, 128), torch.bfloat16),
    "K and V together, HND, bf16 (FlashInfer)": Shape(
        32, ("blocks", 2, 16, 8, 128), torch.bfloat16, order=(0, 1, 3, 2, 4)
    ),
    "latent, bf16 (MLA, DeepSeek)": Shape(61, ("blocks", 16, 576), torch.bfloat16),
    "K and V apart, NHD, fp8": Shape(32, (2, "blocks", 16, 8, 128), torch.float8_e4m3fn),
    "one allocation for all layers, bf16": Shape(16, (2, "blocks", 16, 8, 64), torch.bfloat16, together=True),
}


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes under a tensor, in the order of its memory."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    storage = tensor.untyped_storage()
    return flat.set_(storage, 0, (storage.nbytes(),))


def make(shape: Shape, blocks: int, device: str) -> dict[str, torch.Tensor]:
    """The tensors, poisoned."""
    dims = [blocks if dim == "blocks" else dim for dim in shape.dims]
    order = shape.order or tuple(range(len(dims)))
    physical = [dims[i] for i in order]
    inverse = [order.index(i) for i in range(len(order))]
    size = torch.empty(0, dtype=shape.dtype).element_size()
    count = 1
    for dim in dims:
        count *= dim
    tensors = {}
    base = None
    if shape.together:
        base = torch.full((shape.layers * count * size,), POISON, dtype=torch.uint8, device=device)
    for i in range(shape.layers):
        if base is not None:
            raw = base[i * count * size : (i + 1) * count * size]
        else:
            raw = torch.full((count * size,), POISON, dtype=torch.uint8, device=device)
        tensors[f"model.layers.{i}.self_attn"] = raw.view(shape.dtype).view(physical).permute(inverse)
    return tensors


def block_of(tensor: torch.Tensor, shape: Shape, block: int) -> torch.Tensor:
    """One block of one layer, as bytes."""
    return tensor.select(shape.dims.index("blocks"), block).view(torch.uint8)


def content(layer: int, place: int, like: torch.Tensor) -> torch.Tensor:
    """What a layer's share of the prompt's block holds: bytes that differ from layer to layer and place to place."""
    generator = torch.Generator().manual_seed(layer << 20 | place)
    return torch.randint(0, 256, like.shape, dtype=torch.uint8, generator=generator)


class Engine:
    """What vLLM does for the connector, for one request at a time."""

    def __init__(self, name: str, sock: str, shape: Shape, blocks: int, device: str) -> None:
        self.shape = shape
        self.device = device
        self.tensors = make(shape, blocks, device)
        shared = memory.share(self.tensors)
        self.ready = shared.ready
        described = layout.describe(shared.views, [s.len for s in shared.storages], blocks, BLOCK_SIZE)
        hello = {
            "instance": f"{name}-{time.time_ns()}",
            "tp_size": 1,
            "model": "m",
            "block_size": BLOCK_SIZE,
            "num_blocks": blocks,
            "chunk_tokens": 0,
        }
        self.link = Link(sock, Hello(side="scheduler", **hello))
        registration = Registration(shared.storages, described, shared.gpu)
        self.worker = Worker(Link(sock, Hello(side={"worker": 0}, **hello), registration))
        self.scheduler = Scheduler(self.link, 1, BLOCK_SIZE)
        self.block_bytes = int(described.order["block_bytes"])

    def request(self, plan: dict[str, Any], tokens: int, computed: int) -> SimpleNamespace:
        return SimpleNamespace(
            request_id=plan["transfer_id"] + plan["action"],
            kv_transfer_params={"baton": plan},
            prompt_token_ids=list(range(tokens)),
            prompt_embeds=None,
            num_prompt_tokens=tokens,
            num_tokens=tokens,
            num_computed_tokens=computed,
            num_in_flight_tokens=0,
            lora_request=None,
            cache_salt=None,
            mm_features=[],
        )

    def wait_until_ready(self, request: SimpleNamespace) -> int:
        """Steps until the agent is there; how many tokens the connector wants to fetch."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            self.step()
            self.scheduler.heard({0: self.worker.epoch})
            if self.worker.epoch and self.worker.epoch == self.link.epoch:
                wanted, _ = self.scheduler.matched_tokens(request, 0)
                if wanted is not None:
                    return wanted
            time.sleep(0.01)
        raise TimeoutError("the agent did not accept the engine")

    def step(
        self, request: SimpleNamespace | None = None, ids: Sequence[int] = (), compute: Callable[[], None] | None = None
    ) -> Any:
        """One step of an engine: ask, compute blocks of a request where there is one, record, tell, hear. `ids`: the
        request's blocks up to and with those that `compute` fills."""
        computed = request.num_computed_tokens if request else 0
        tokens = len(ids) * BLOCK_SIZE - computed
        output = SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=request.request_id, num_computed_tokens=computed)] if request else [],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens={request.request_id: tokens} if request else {},
            preempted_req_ids=set(),
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: (list(ids),)),
        )
        plan = self.scheduler.take_step(output)
        self.worker.begin_step(plan.pulls, plan.holds, plan.computed)
        if request is not None and compute is not None:
            request.num_computed_tokens += tokens
            compute()
        if self.ready is not None:
            self.ready.record()
        self.worker.say_computed()
        return self.worker.end_step(idle=request is None)

    def hold(self, plan: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        """Computes and holds the prompt's blocks, in two chunks, without waiting for the writes."""
        request = self.request(plan, len(ids) * BLOCK_SIZE, 0)
        self.wait_until_ready(request)
        sources = [
            [content(layer, place, block_of(tensor, self.shape, block)).to(self.device) for place, block in enumerate(ids)]
            for layer, tensor in enumerate(self.tensors.values())
        ]
        if self.device == "cuda":
            torch.cuda.synchronize()

        def compute(begin: int, end: int) -> None:
            if self.device == "cuda":
                # Some 50 ms in which nothing is written yet: whoever does not wait for the event reads poison.
                torch.cuda._sleep(100_000_000)
            for tensor, blocks in zip(self.tensors.values(), sources, strict=True):
                for block, source in zip(ids[begin:end], blocks[begin:end], strict=True):
                    block_of(tensor, self.shape, block).copy_(source)

        half = len(ids) // 2
        self.step(request, ids[:half], lambda: compute(0, half))
        self.step(request, ids, lambda: compute(half, len(ids)))
        held, answer = self.scheduler.finished(request, list(ids), True)
        if not held or answer is None:
            raise RuntimeError("the connector did not hold the blocks")
        self.step()
        return answer["baton"]

    def wait_released(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self.step().sent:
                return
            time.sleep(0.001)
        raise TimeoutError("held blocks were not released")

    def pull(self, plan: dict[str, Any], ids: list[int]) -> float:
        """Pulls the prompt into these blocks; how long it took, in seconds."""
        tokens = len(ids) * BLOCK_SIZE
        request = self.request(plan, tokens, 0)
        wanted = self.wait_until_ready(request)
        if wanted != tokens:
            raise RuntimeError(f"the connector wants {wanted} of {tokens} tokens")
        started = time.monotonic()
        self.scheduler.allocated(request, list(ids), wanted)
        deadline = started + PATIENCE_S
        while time.monotonic() < deadline:
            done = self.step()
            if done.bad_blocks:
                raise RuntimeError(f"blocks {sorted(done.bad_blocks)} did not arrive")
            if done.received:
                self.scheduler.received(request.request_id)
                return time.monotonic() - started
        raise TimeoutError("the pull did not end")

    def check(self, ids: list[int]) -> None:
        """Every byte: the prompt's in these blocks, poison everywhere else."""
        for layer, tensor in enumerate(self.tensors.values()):
            for place, block in enumerate(ids):
                is_now = block_of(tensor, self.shape, block)
                if not torch.equal(is_now.cpu(), content(layer, place, is_now)):
                    raise RuntimeError(f"layer {layer}: block {block} does not hold what it should")
                is_now.fill_(POISON)
        for raw in {t.untyped_storage().data_ptr(): bytes_of(t) for t in self.tensors.values()}.values():
            if not bool((raw == POISON).all()):
                raise RuntimeError("bytes were written that belong to no block of the pull")

    def close(self) -> None:
        self.worker.close()
        self.scheduler.close()


def engine(name: str, sock: str, blocks: int, device: str, pipe: Any) -> None:
    """A process: starts engines, one after the other, and does with them what the pipe says."""
    logging.basicConfig(level=logging.ERROR, format=f"{name}: %(message)s")
    it: Engine | None = None
    try:
        while True:
            what, *args = pipe.recv()
            if what in ("start", "end") and it is not None:
                it.close()
                it = None
            if what == "end":
                return
            if what == "start":
                it = Engine(name, sock, SHAPES[args[0]], blocks, device)
                answer = it.block_bytes
            else:
                answer = getattr(it, what)(*args)
            pipe.send(("ok", answer))
    except Exception as error:
        pipe.send(("failed", f"{name}: {type(error).__name__}: {error}"))


class Child:
    """An engine's process."""

    def __init__(self, *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=engine, args=(*args, theirs), daemon=True)
        self.process.start()

    def ask(self, *what: Any) -> Any:
        self.pipe.send(what)
        if not self.pipe.poll(2 * PATIENCE_S):
            raise TimeoutError("an engine does not answer")
        state, value = self.pipe.recv()
        if state != "ok":
            raise RuntimeError(value)
        return value

    def end(self) -> None:
        try:
            self.pipe.send(("end",))
        except OSError:
            pass
        self.process.join(10)


class Relay:
    """Passes datagrams between one agent and another, so that what they say goes through a port that is neither's."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self.front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.front.bind(("127.0.0.1", 0))
        self.back = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.back.connect((host, int(port)))
        for sock in (self.front, self.back):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
            sock.setblocking(False)
        self.address = f"127.0.0.1:{self.front.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        client = None
        while True:
            readable, _, _ = select.select([self.front, self.back], [], [])
            for sock in readable:
                try:
                    for _ in range(64):
                        if sock is self.front:
                            data, client = self.front.recvfrom(1 << 16)
                            self.back.send(data)
                        elif client is not None:
                            self.front.sendto(self.back.recv(1 << 16), client)
                except (BlockingIOError, ConnectionRefusedError):
                    pass


def direct_bytes(metrics: str) -> int:
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("baton_agent_direct_bytes_total "):
                return int(float(line.split()[1]))
    raise RuntimeError("the agent does not tell how much it copied directly")


def hand_over(
    holder: Child, puller: Child, ways: dict[str, str], metrics: str, shape: str, blocks: int
) -> dict[str, Any]:
    """One shape, by each way: its name and the address that leads there."""
    count = blocks // 2
    # Scattered, and in no order, on both sides.
    held = [(7 * i + 3) % blocks for i in range(count)]
    wanted = [blocks - 1 - (5 * i) % blocks for i in range(count)]
    if len(set(held)) != count or len(set(wanted)) != count:
        raise ValueError("--blocks: use a number that neither 5 nor 7 divides")
    moved = count * holder.ask("start", shape)
    puller.ask("start", shape)
    figures: dict[str, Any] = {"shape": shape, "mb": round(moved / 1e6, 1)}
    for way, address in ways.items():
        before = direct_bytes(metrics)
        plan = {"version": 1, "transfer_id": f"{time.time_ns():032x}"}
        answer = holder.ask("hold", plan | {"action": "hold", "lease_ms": LEASE_MS}, held)
        source = {"engine_id": "a", "address": address, "epoch": answer["epoch"]}
        pull = {"action": "pull", "source": source, "num_tokens": answer["num_tokens"], "deadline_ms": 50_000}
        seconds = puller.ask("pull", plan | pull, wanted)
        puller.ask("check", wanted)
        holder.ask("wait_released")
        went = direct_bytes(metrics) - before
        if went != (moved if way == "direct" else 0):
            raise RuntimeError(f"{went} of {moved} bytes were copied directly; the way should be {way}")
        figures[f"{way}_mb_per_s"] = round(moved / seconds / 1e6)
    return figures


def run(agents: dict[str, Any], blocks: int, device: str) -> dict[str, Any]:
    """All shapes, until one fails."""
    a, b = agents["a"], agents["b"]
    ways = {"direct": a["address"], "quic": Relay(a["address"]).address}
    children = [Child(name, agents[name]["socket"], blocks, device) for name in ("a", "b")]
    result: dict[str, Any] = {"hand_over": "passed", "device": device, "torch": torch.__version__, "shapes": []}
    try:
        for shape in SHAPES:
            result["shapes"].append(hand_over(*children, ways, b["metrics"], shape, blocks))
            print(result["shapes"][-1], flush=True)
    except Exception as error:
        result |= {"hand_over": "failed", "shape": shape, "error": str(error)}
    finally:
        for child in children:
            child.end()
    return result


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--agents", required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--blocks", type=int, default=64)
    args = parser.parse_args()
    with subprocess.Popen([args.agents], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdin is not None and running.stdout is not None
        try:
            agents = json.loads(running.stdout.readline() or "null")
            if agents is None:
                result = {"hand_over": "failed", "error": "the agents did not start"}
            else:
                result = run(agents, args.blocks, args.device)
        finally:
            running.stdin.close()
    print(json.dumps(result))
    return int(result["hand_over"] != "passed")


if __name__ == "__main__":
    sys.exit(main())
