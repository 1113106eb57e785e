#!/usr/bin/env python3
"""A Baton agent for tests: the agent's half of the connector protocol, for several engines in one process.

It maps the engines' memory and copies blocks straight from one to the other as soon as they are computed: no network
and no hashes. With it, the connector can be tried on real vLLM alone:

    loopback_agent.py [--control FILE] e0=/tmp/e0.sock e1=/tmp/e1.sock

FILE may hold JSON with faults for the pulls to come: {"delay_s": 1.0, "fail": [0, 5]} (places in the pull).
A line of JSON on standard output tells of each event.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton_connector import protocol
from baton_connector.protocol import (
    Cancel,
    Computed,
    FrameReader,
    Hello,
    Hold,
    Layout,
    Pull,
    PullDone,
    Refused,
    Released,
    Storage,
    Welcome,
)


@dataclass
class Engine:
    """What the agent knows of one engine, under the agent's lock."""

    name: str
    epoch: int = 0
    instance: str = ""
    connections: list[socket.socket] = field(default_factory=list)
    workers: dict[int, socket.socket] = field(default_factory=dict)
    memory: dict[int, tuple[list[mmap.mmap], Layout]] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    # By request: blocks of its prompt that each rank has computed, in order.
    computed: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    # Pulls of a hold that went well; one from each rank ends it.
    pulled: dict[str, int] = field(default_factory=dict)


class LoopbackAgent:
    """Serves the engines whose sockets `listen` opened."""

    def __init__(self, control: Path | None = None, quiet: bool = True) -> None:
        self.engines: dict[str, Engine] = {}
        self.events: list[dict[str, Any]] = []
        self.refuse: str | None = None
        self.faults: dict[str, Any] = {}
        self._control = control
        self._quiet = quiet
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._listeners: list[socket.socket] = []
        self._epoch = time.time_ns() // 1_000_000

    def listen(self, name: str, path: str) -> None:
        Path(path).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen()
        self.engines[name] = Engine(name)
        self._listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener, self.engines[name]), daemon=True).start()

    def close(self) -> None:
        """Like the death of the agent: every connection goes at once."""
        with self._lock:
            for listener in self._listeners:
                Path(listener.getsockname()).unlink(missing_ok=True)
                listener.close()
            for engine in self.engines.values():
                self._end(engine)

    def send(self, name: str, message: Any, rank: int | None = 0) -> None:
        """A message to a worker of this engine, or with `rank=None` bytes to all its connections."""
        with self._lock:
            engine = self.engines[name]
            if rank is None:
                for connection in engine.connections:
                    connection.sendall(message)
            else:
                engine.workers[rank].sendall(protocol.frame(message))

    def wait(self, event: str, timeout: float = 10.0, **fields: Any) -> dict[str, Any]:
        """The first event of this kind, past or to come."""

        def found() -> dict[str, Any] | None:
            for happened in self.events:
                if happened["event"] == event and fields.items() <= happened.items():
                    return happened
            return None

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, timeout), f"no {event} {fields}: {self.events}"
            happened = found()
            assert happened is not None
            return happened

    def _tell(self, event: str, **fields: Any) -> None:
        with self._changed:
            self.events.append({"event": event, "at": round(time.time(), 4)} | fields)
            self._changed.notify_all()
        if not self._quiet:
            print(json.dumps(self.events[-1]), flush=True)

    def _accept(self, listener: socket.socket, engine: Engine) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection, engine), daemon=True).start()

    def _serve(self, connection: socket.socket, engine: Engine) -> None:
        reader = FrameReader(protocol.ToAgent)
        storages: list[mmap.mmap] = []
        fds: list[int] = []
        rank: int | None = None
        with self._lock:
            engine.connections.append(connection)
        try:
            while True:
                data, new_fds, _, _ = socket.recv_fds(connection, 1 << 16, 16)
                fds += new_fds
                if not data:
                    break
                for message in reader.feed(data):
                    match message:
                        case Hello():
                            if self.refuse is not None:
                                connection.sendall(protocol.frame(Refused(self.refuse)))
                                return
                            with self._lock:
                                if engine.epoch == 0 or engine.instance != message.instance:
                                    self._epoch += 1
                                    engine.epoch, engine.instance = self._epoch, message.instance
                                if isinstance(message.side, dict):
                                    rank = message.side["worker"]
                                connection.sendall(protocol.frame(Welcome(protocol.VERSION, engine.epoch)))
                            self._tell("hello", engine=engine.name, rank=rank, hello=repr(message))
                        case Storage(len=length):
                            fd = fds.pop(0)
                            storages.append(mmap.mmap(fd, length))
                            os.close(fd)
                        case Layout():
                            assert rank is not None
                            with self._lock:
                                engine.memory[rank] = (storages, message)
                                engine.workers[rank] = connection
                                connection.sendall(protocol.frame(Welcome(protocol.VERSION, engine.epoch)))
                            self._tell("layout", engine=engine.name, facts=message.facts | message.order, pieces=len(message.pieces))
                        case Hold():
                            with self._lock:
                                engine.holds[message.transfer_id] = message
                                timer = threading.Timer(message.lease_ms / 1000, self._release, (engine, message))
                                timer.daemon = True
                                timer.start()
                            self._tell("hold", engine=engine.name, request=message.request_id)
                        case Computed():
                            assert rank is not None
                            with self._lock:
                                # It may come before its hold: that is on another connection.
                                blocks = engine.computed.setdefault(message.request_id, {}).setdefault(rank, [])
                                assert message.first_block == len(blocks)
                                blocks += message.block_ids
                            self._tell(
                                "computed", engine=engine.name, request=message.request_id, rank=rank, blocks=len(blocks)
                            )
                        case Pull():
                            assert rank is not None
                            thread = threading.Thread(target=self._pull, args=(engine, rank, connection, message), daemon=True)
                            thread.start()
                        case Cancel():
                            self._tell("cancel", engine=engine.name, request=message.request_id)
                            for hold in [h for h in engine.holds.values() if h.request_id == message.request_id]:
                                self._release(engine, hold)
        except OSError:
            pass
        finally:
            with self._lock:
                if connection in engine.connections:
                    self._end(engine)

    def _end(self, engine: Engine) -> None:
        """The engine's epoch is over: holds are void, and all its connections close."""
        engine.holds.clear()
        engine.computed.clear()
        engine.pulled.clear()
        engine.workers.clear()
        engine.memory.clear()
        engine.epoch = 0
        for connection in engine.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            connection.close()
        engine.connections.clear()

    def _pull(self, engine: Engine, rank: int, connection: socket.socket, pull: Pull) -> None:
        faults = dict(self.faults)
        if self._control is not None and self._control.exists():
            faults |= json.loads(self._control.read_text())
        self._tell("pull", engine=engine.name, request=pull.request_id, blocks=len(pull.block_ids), first=pull.first_block)
        time.sleep(faults.get("delay_s", 0))
        with self._changed:
            # A hold and the pull for it come over different sockets, and the pull may be sooner.
            source = self.engines.get(pull.source.engine_id)
            self._changed.wait_for(lambda: source is None or pull.transfer_id in source.holds, 2.0)
            began = time.monotonic()
            copied, error = 0, ""
            while copied < len(pull.block_ids) and not error:
                count, error = self._copy(engine, rank, pull, copied)
                copied += count
                if count == 0 and not error and not self._changed.wait(began + pull.deadline_ms / 1000 - time.monotonic()):
                    error = "deadline"
            if rank not in engine.memory:
                return
            failed = pull.block_ids[copied:]
            spoiled = [pull.block_ids[i] for i in faults.get("fail", []) if i < len(pull.block_ids)]
            if spoiled:
                failed, error = failed + spoiled, "made to fail by the test"
            connection.sendall(protocol.frame(PullDone(pull.request_id, failed, error)))
            self._tell(
                "pull_done",
                engine=engine.name,
                request=pull.request_id,
                failed=failed,
                error=error,
                ms=round((time.monotonic() - began) * 1e3, 2),
            )
            source = self.engines.get(pull.source.engine_id)
            hold = source.holds.get(pull.transfer_id) if source is not None else None
            if source is not None and hold is not None and not failed:
                source.pulled[pull.transfer_id] = source.pulled.get(pull.transfer_id, 0) + 1
                if source.pulled[pull.transfer_id] == len(source.workers):
                    self._release(source, hold)

    def _release(self, engine: Engine, hold: Hold) -> None:
        with self._lock:
            if engine.holds.get(hold.transfer_id) is not hold:
                return
            del engine.holds[hold.transfer_id]
            engine.pulled.pop(hold.transfer_id, None)
            engine.computed.pop(hold.request_id, None)
            for worker in engine.workers.values():
                worker.sendall(protocol.frame(Released([hold.request_id])))
            self._tell("released", engine=engine.name, request=hold.request_id)

    def _copy(self, engine: Engine, rank: int, pull: Pull, at: int) -> tuple[int, str]:
        """Copies what is computed of the pull's blocks from place `at` on; how many that are, and what went wrong."""
        source = self.engines.get(pull.source.engine_id)
        if rank not in engine.memory:
            return 0, "the engine is gone"
        if source is None or source.epoch != pull.source.epoch:
            return 0, "stale epoch"
        hold = source.holds.get(pull.transfer_id)
        if hold is None:
            return 0, "unknown transfer"
        theirs, their_layout = source.memory[rank]
        ours, our_layout = engine.memory[rank]
        # All of what is held, or whole blocks of its beginning.
        if hold.content.keys != pull.content.keys or not hold.content.tokens.startswith(pull.content.tokens):
            return 0, "content differs"
        if (their_layout.facts, their_layout.order) != (our_layout.facts, our_layout.order):
            return 0, "layouts differ"
        assert [piece.len for piece in their_layout.pieces] == [piece.len for piece in our_layout.pieces]
        held = source.computed.get(hold.request_id, {}).get(rank, [])[pull.first_block + at :]
        count = min(len(held), len(pull.block_ids) - at)
        for theirs_id, ours_id in zip(held[:count], pull.block_ids[at : at + count], strict=True):
            for a, b in zip(their_layout.pieces, our_layout.pieces):
                begin, end = b.offset + ours_id * b.stride, a.offset + theirs_id * a.stride
                ours[b.storage][begin : begin + b.len] = theirs[a.storage][end : end + a.len]
        return count, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--control", type=Path)
    parser.add_argument("engines", nargs="+", metavar="NAME=SOCKET")
    args = parser.parse_args()
    agent = LoopbackAgent(args.control, quiet=False)
    for engine in args.engines:
        name, path = engine.split("=", 1)
        agent.listen(name, path)
    threading.Event().wait()


if __name__ == "__main__":
    main()
