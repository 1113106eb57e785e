"""A link without a socket: tests say what comes in, and see what went out."""

from __future__ import annotations

from typing import Any

import msgspec
from baton_connector import protocol
from baton_connector.link import LOST


class FakeLink:
    def __init__(self, epoch: int = 5) -> None:
        self.epoch = epoch
        self.sent: list[Any] = []
        self._events: list[object] = []
        self.waits = 0
        # What comes in while the engine waits, one list each time.
        self.meanwhile: list[list[object]] = []

    def come(self, *events: object) -> None:
        self._events += events

    def lose(self) -> None:
        self.epoch = 0
        self._events.append(LOST)

    def poll(self) -> list[object]:
        events, self._events = self._events, []
        return events

    def wait(self, milliseconds: int) -> None:
        self.waits += 1
        if self.meanwhile:
            self.come(*self.meanwhile.pop(0))

    def send(self, frame: bytes) -> bool:
        if self.epoch == 0:
            return False
        self.sent.append(msgspec.msgpack.decode(frame[4:], type=protocol.ToAgent))
        return True

    def close(self) -> None:
        self.epoch = 0
