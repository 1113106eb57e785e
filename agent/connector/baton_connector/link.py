"""The connection to the agent: made and remade in the background, used from the engine's own thread.

The engine must never wait for the agent, nor fail with it. So:

* A daemon thread connects, says hello, registers memory where there is some, and hands over the finished
  session. From then on it only sleeps in `poll` until the agent hangs up (or until it has to write what a full
  socket did not take), and connects again.
* The engine's thread, in its hooks, sends and receives on the session without blocking. It alone decides when
  a session is over: first it takes every message the agent sent before hanging up, then it sees [`LOST`], and
  only then is the next session taken up. So nothing of two sessions is ever mixed.

Only the agent's own closing proves that it copies nothing any more. Where this side gives a session up, it
therefore stops sending, and still waits for the agent to close before it reports [`LOST`].

What is queued towards the agent is bounded by `MAX_QUEUED`; a session whose agent does not read is given up.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import protocol
from .memory import SharedStorage
from .protocol import CudaStorage, FrameReader, Gpu, Hello, Layout, ProtocolError, Refused, Storage, Welcome

logger = logging.getLogger("vllm.baton")

RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0
# After a refusal: the same words will be refused again, but the operator may mend the agent meanwhile.
RETRY_REFUSED_S = 15.0
HANDSHAKE_S = 30.0
MAX_QUEUED = 2 * protocol.MAX_MESSAGE
READ_BYTES = 1 << 16
# A session that ends sooner is not worth a log line, nor an immediate next try.
SHORT_LIFE_S = 5.0


class Lost:
    """The session is over: the agent copies nothing of it any more."""


LOST = Lost()


@dataclass(frozen=True)
class Registration:
    """A worker's memory, as it is described after the hello."""

    storages: Sequence[SharedStorage | CudaStorage]
    layout: Layout
    # Where the storages lie on one.
    gpu: Gpu | None = None


class _Refusal(Exception):
    pass


class _Session:
    def __init__(self, sock: socket.socket, reader: FrameReader, early: list[object], epoch: int) -> None:
        self.sock = sock
        self.reader = reader
        self.early = early
        self.epoch = epoch
        # Guards `unsent` and the writes that go with it; held for non-blocking calls only.
        self.lock = threading.Lock()
        self.unsent = bytearray()
        self.given_up = False
        self.readable = select.poll()
        self.readable.register(sock, select.POLLIN)

    def close(self) -> None:
        with self.lock:
            self.sock.close()

    def give_up(self) -> None:
        """Tells the agent to end the session. It is over once the agent has closed it."""
        self.given_up = True
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def write(self, data: bytes | bytearray) -> int:
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0


class Link:
    """One process's connection to the agent. `poll`, `send` and `epoch` are for one thread, the engine's."""

    def __init__(self, path: str, hello: Hello, registration: Registration | None = None) -> None:
        self._path = path
        self._hello = hello
        self._registration = registration
        side = hello.side if isinstance(hello.side, str) else f"worker {hello.side['worker']}"
        self._name = f"Baton agent at {path} ({side})"
        self._buffer = bytearray(READ_BYTES)
        self._view = memoryview(self._buffer)
        # The engine's; None before the first session and between two.
        self._session: _Session | None = None
        # Handed over by the background thread, taken by the engine's.
        self._next: _Session | None = None
        self._handover = threading.Lock()
        self._stopped = threading.Event()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="baton-link", daemon=True)
        self._thread.start()

    # ---- the engine's thread -------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch of the current session, 0 without one."""
        session = self._session
        return session.epoch if session is not None and not session.given_up else 0

    def poll(self) -> Sequence[object]:
        """What came since the last call: messages, and [`LOST`] where the session ended. Never blocks.

        A session that is ready is taken up when the one before is over; its messages come from the next call on.
        """
        session = self._session
        if session is None:
            if self._next is None:
                return ()
            with self._handover:
                session, self._next = self._next, None
            if session is None:
                return ()
            self._session = session
            early, session.early = session.early, []
            return early
        try:
            count = session.sock.recv_into(self._view)
        except (BlockingIOError, InterruptedError):
            return ()
        except OSError:
            count = 0
        return self._received(session, count)

    def _received(self, session: _Session, count: int) -> Sequence[object]:
        events: list[object] = []
        while count > 0:
            if not session.given_up:
                try:
                    for message in session.reader.feed(self._view[:count]):
                        events.append(message)
                except ProtocolError as error:
                    logger.error("%s: %s; connecting again", self._name, error)
                    session.give_up()
            # A short read has emptied the socket.
            if count < READ_BYTES:
                return events
            try:
                count = session.sock.recv_into(self._view)
            except (BlockingIOError, InterruptedError):
                return events
            except OSError:
                count = 0
        self._session = None
        session.close()
        events.append(LOST)
        return events

    def wait(self, milliseconds: int) -> None:
        """Sleeps until there may be something to poll, and at most so long."""
        session = self._session
        if session is not None:
            session.readable.poll(milliseconds)

    def send(self, frame: bytes) -> bool:
        """Sends a frame, or queues what the socket does not take. False where there is no session to send it on.

        True is no promise: a session that ends now takes it along, and `poll` says so.
        """
        session = self._session
        if session is None or session.given_up:
            return False
        try:
            with session.lock:
                if session.unsent:
                    if len(session.unsent) + len(frame) > MAX_QUEUED:
                        logger.error("%s does not read what it is sent; connecting again", self._name)
                        session.give_up()
                        return False
                    session.unsent += frame
                    return True
                sent = session.write(frame)
                if sent == len(frame):
                    return True
                session.unsent += memoryview(frame)[sent:]
        except OSError:
            return False
        self._wake()
        return True

    def close(self) -> None:
        """Hangs up for good."""
        self._stopped.set()
        self._wake()
        self._thread.join(timeout=1.0)
        for session in (self._session, self._next):
            if session is not None:
                session.close()
        self._session = self._next = None

    # ---- the background thread -----------------------------------------------------------------------------

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"\0")
        except OSError:
            # The pipe is full of wake-ups, or closed.
            pass

    def _run(self) -> None:
        delay = RETRY_FIRST_S
        # One line for each outage, and one for each new refusal.
        told = False
        refusal = ""
        while not self._stopped.is_set():
            try:
                session = self._connect()
            except _Refusal as error:
                if refusal != str(error):
                    refusal = str(error)
                    logger.error("%s refused this engine: %s; serving without transfers", self._name, refusal)
                self._stopped.wait(RETRY_REFUSED_S)
                continue
            except (OSError, ProtocolError) as error:
                if not told:
                    told = True
                    logger.warning("%s: %s; serving without transfers until it is there", self._name, error)
                self._stopped.wait(delay)
                delay = min(delay * 2, RETRY_MOST_S)
                continue
            refusal = ""
            level = logging.INFO if delay < RETRY_MOST_S else logging.DEBUG
            logger.log(level, "%s: connected, epoch %d", self._name, session.epoch)
            began = time.monotonic()
            self._publish(session)
            self._watch(session)
            self._withdraw(session)
            if self._stopped.is_set():
                return
            logger.log(level, "%s hung up; serving without transfers until it is back", self._name)
            told = True
            if time.monotonic() - began < SHORT_LIFE_S:
                self._stopped.wait(delay)
                delay = min(delay * 2, RETRY_MOST_S)
            else:
                delay = RETRY_FIRST_S

    def _publish(self, session: _Session) -> None:
        with self._handover:
            self._next = session

    def _withdraw(self, session: _Session) -> None:
        """A session that ended before the engine took it up is nothing to it."""
        with self._handover:
            unused = self._next is session
            if unused:
                self._next = None
        if unused:
            session.close()

    def _watch(self, session: _Session) -> None:
        """Returns when the session is over."""
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        while not self._stopped.is_set():
            try:
                with session.lock:
                    if session.unsent:
                        del session.unsent[: session.write(session.unsent)]
                    pending = bool(session.unsent)
                    poller.register(session.sock, select.POLLRDHUP | (select.POLLOUT if pending else 0))
                    socket_fd = session.sock.fileno()
                for fd, event in poller.poll():
                    if fd == self._wake_read:
                        os.read(self._wake_read, 4096)
                    elif fd == socket_fd and event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL):
                        return
            except (OSError, ValueError):
                # The engine's thread closed it.
                return

    def _connect(self) -> _Session:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(HANDSHAKE_S)
            sock.connect(self._path)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            reader = FrameReader()
            early: list[object] = []
            sock.sendall(protocol.frame(self._hello))
            epoch = self._welcome(sock, reader, early)
            if self._registration is not None:
                if self._registration.gpu is not None:
                    sock.sendall(protocol.frame(self._registration.gpu))
                for storage in self._registration.storages:
                    if isinstance(storage, CudaStorage):
                        sock.sendall(protocol.frame(storage))
                        continue
                    data = protocol.frame(Storage(len=storage.len))
                    sent = socket.send_fds(sock, [data], [storage.fd])
                    sock.sendall(data[sent:])
                sock.sendall(protocol.frame(self._registration.layout))
                epoch = self._welcome(sock, reader, early)
            sock.setblocking(False)
            return _Session(sock, reader, early, epoch)
        except BaseException:
            sock.close()
            raise

    def _welcome(self, sock: socket.socket, reader: FrameReader, early: list[object]) -> int:
        """Waits for a welcome. What comes right behind it is kept for the engine."""
        deadline = time.monotonic() + HANDSHAKE_S
        epoch: int | None = None
        while epoch is None:
            if time.monotonic() > deadline:
                raise TimeoutError("no answer to the handshake")
            data = sock.recv(READ_BYTES)
            if not data:
                raise ConnectionError("the agent hung up during the handshake")
            for message in reader.feed(data):
                if epoch is not None:
                    early.append(message)
                elif isinstance(message, Refused):
                    raise _Refusal(message.reason)
                elif not isinstance(message, Welcome):
                    raise ProtocolError(f"expected a welcome, got {type(message).__name__}")
                elif message.version != protocol.VERSION:
                    raise _Refusal(f"it speaks version {message.version} of the protocol, this connector {protocol.VERSION}")
                elif message.epoch < 1:
                    raise ProtocolError("the agent named no epoch")
                else:
                    epoch = message.epoch
        return epoch
