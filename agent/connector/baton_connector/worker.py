"""The worker's half of the connector: asks the agent for blocks, and tells the engine when they are there, and
when held ones may go.

Everything runs on the engine's thread, several times a step: `preempted` before it may overwrite blocks, `begin_step`
with what the scheduler wants, `say_computed` behind the forward pass, `end_step` for what is done. vLLM asserts that
it knows each request that is reported, so each pull and each hold is reported exactly once, whatever the agent says
or fails to say.

A hold is known here from the step that computes the first of its prompt. The agent may end it before the request
does; its blocks stay with the request all the same, and the hold is reported when the scheduler says that the
request is over. A worker that never knew of it has named none of its blocks to the agent, so that nobody copies
them from this rank.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from . import protocol
from .link import LOST, Link
from .protocol import Computed, PullDone, Released

logger = logging.getLogger("vllm.baton")

# The epoch of a worker whose memory cannot be shared.
NEVER = -1
# Releases that came ahead of their hold; the scheduler's word is at most one step behind the agent's.
MAX_EARLY = 4096
# How long past its deadline a pull may stay unanswered, or a preempted request be waited for, before a line is logged.
OVERDUE_S = 5.0
# Between two looks at the clock while a preempted request is waited for.
PREEMPTED_WAIT_MS = 100
# How long a step without anything to compute may wait for the agent: the first ones in a row, and later ones. Such steps
# follow one another as fast as the engine can make them; this makes them few, and leaves the processor to others, most of all where a
# pull waits for a prompt that another engine is computing. A request that arrives meanwhile waits that much longer.
IDLE_WAIT_MS = 2
IDLE_STEPS = 50
LONG_IDLE_WAIT_MS = 10


@dataclass
class WantedPull:
    """Blocks to fetch, as the scheduler hands them to the workers."""

    request_id: str
    # Empty where the request is too large for a message.
    frame: bytes
    block_ids: list[int]
    deadline_s: float


@dataclass
class ComputedBlocks:
    """Blocks of a held prompt that a step computes, from block `first_block` of the prompt on. The first of a request
    begins its hold, which the scheduler has sent to the agent in this epoch; it may have no blocks yet."""

    request_id: str
    epoch: int
    first_block: int
    block_ids: list[int]


@dataclass
class Done:
    """What the engine is to be told after a step."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    bad_blocks: set[int] = field(default_factory=set)


class Worker:
    """State of one worker rank. `link` is absent where its memory cannot be shared: then every pull fails at
    once, and no hold is made."""

    def __init__(self, link: Link | None) -> None:
        self.link = link
        self._pulls: dict[str, WantedPull] = {}
        # Holds of this session whose requests run: whether the agent has released them.
        self._begun: dict[str, bool] = {}
        # Those whose requests are over.
        self._holds: set[str] = set()
        self._early: dict[str, None] = {}
        # What is said behind this step's forward pass.
        self._computed: list[ComputedBlocks] = []
        self._done = Done()
        self._overdue_s = 0.0
        # In a row, up to now.
        self._idle_steps = 0

    @property
    def epoch(self) -> int:
        """The epoch in which this worker's memory is registered; 0 while it is not, NEVER if it cannot be."""
        return self.link.epoch if self.link is not None else NEVER

    @property
    def waits(self) -> bool:
        """Whether a pull is unanswered."""
        return bool(self._pulls)

    def preempted(self, request_ids: Collection[str]) -> None:
        """Returns when nobody copies blocks of these requests, whose holds the scheduler has cancelled: the step that
        begins may overwrite them."""
        overdue_s = time.monotonic() + OVERDUE_S
        self._listen()
        while waiting := [request_id for request_id in request_ids if self._begun.get(request_id) is False]:
            if time.monotonic() > overdue_s:
                # To go on would change blocks under a copy.
                overdue_s = float("inf")
                logger.error(
                    "the Baton agent has not released %d preempted requests in time; the engine waits for it: restart "
                    "the agent if it hangs",
                    len(waiting),
                )
            assert self.link is not None
            self.link.wait(PREEMPTED_WAIT_MS)
            self._listen()
        for request_id in request_ids:
            self._begun.pop(request_id, None)

    def begin_step(
        self, pulls: Iterable[WantedPull], holds: Iterable[str], computed: Iterable[ComputedBlocks]
    ) -> None:
        """Takes up what the scheduler wants. `holds`: requests that are over, and whose blocks stay until the hold is."""
        self._listen()
        epoch = self.epoch
        self._computed = list(computed)
        for blocks in self._computed:
            if blocks.epoch == epoch and blocks.request_id not in self._begun:
                self._begun[blocks.request_id] = blocks.request_id in self._early
                self._early.pop(blocks.request_id, None)
        for request_id in holds:
            # Not known: its session is over, or was never this worker's.
            if self._begun.pop(request_id, True):
                self._done.sent.add(request_id)
            else:
                self._holds.add(request_id)
        for pull in pulls:
            if self.link is not None and pull.frame and self.link.send(pull.frame):
                self._pulls[pull.request_id] = pull
                self._overdue_s = max(self._overdue_s, time.monotonic() + pull.deadline_s + OVERDUE_S)
            else:
                self._fail(pull)

    def say_computed(self) -> None:
        """Tells the agent which blocks of held prompts are computed. Called behind each forward pass."""
        computed, self._computed = self._computed, []
        for blocks in computed:
            if blocks.block_ids and self._begun.get(blocks.request_id) is False:
                assert self.link is not None
                message = Computed(blocks.request_id, blocks.first_block, blocks.block_ids)
                self.link.send(protocol.frame(message))

    def end_step(self, idle: bool = False) -> Done:
        """What was done since the last call. `idle`: the step computed nothing, so there is time to wait."""
        if self._pulls or self._holds:
            self._idle_steps = self._idle_steps + 1 if idle else 0
            if idle and self.link is not None and self._done == Done():
                self.link.wait(IDLE_WAIT_MS if self._idle_steps <= IDLE_STEPS else LONG_IDLE_WAIT_MS)
            self._listen()
        if self._pulls and time.monotonic() > self._overdue_s:
            # Its blocks cannot be given back before the agent answers or hangs up: it may still write to them.
            self._overdue_s = float("inf")
            logger.error(
                "the Baton agent has not answered %d pulls in time; their requests wait for it: restart the agent "
                "if it hangs",
                len(self._pulls),
            )
        done, self._done = self._done, Done()
        return done

    def close(self) -> None:
        if self.link is not None:
            self.link.close()

    def _fail(self, pull: WantedPull) -> None:
        self._done.received.add(pull.request_id)
        self._done.bad_blocks.update(pull.block_ids)

    def _listen(self) -> None:
        if self.link is None:
            return
        # Behind the end of one session the next may be ready.
        while events := self.link.poll():
            for event in events:
                if isinstance(event, PullDone):
                    self._pull_done(event)
                elif isinstance(event, Released):
                    for request_id in event.request_ids:
                        self._release(request_id)
                elif event is LOST:
                    self._lost()
                else:
                    logger.error("unexpected message from the Baton agent: %s", type(event).__name__)

    def _pull_done(self, message: PullDone) -> None:
        pull = self._pulls.pop(message.request_id, None)
        if pull is None:
            logger.error("the Baton agent ended a pull for %r, which is not waiting for one", message.request_id[:80])
            return
        if not self._pulls:
            self._overdue_s = 0.0
        failed = set(message.failed_blocks)
        if message.error or failed:
            logger.warning(
                "pull for %s: %s; %d of %d blocks are computed here",
                pull.request_id,
                message.error[:200] or "failed",
                len(failed),
                len(pull.block_ids),
            )
        if not failed.issubset(pull.block_ids) or (message.error and not failed):
            # It names no block, or one that it was not given: then none is known to be good.
            failed = set(pull.block_ids)
        self._done.received.add(pull.request_id)
        self._done.bad_blocks |= failed

    def _release(self, request_id: str) -> None:
        if request_id in self._begun:
            self._begun[request_id] = True
            return
        if request_id in self._holds:
            self._holds.remove(request_id)
            self._done.sent.add(request_id)
            return
        if len(self._early) >= MAX_EARLY:
            del self._early[next(iter(self._early))]
        self._early[request_id] = None

    def _lost(self) -> None:
        """The agent copies nothing any more: pulls have failed, and held blocks are free."""
        holds = len(self._begun) + len(self._holds)
        if self._pulls or holds:
            logger.warning("the Baton agent hung up with %d pulls and %d holds open", len(self._pulls), holds)
        for pull in self._pulls.values():
            self._fail(pull)
        self._pulls.clear()
        self._overdue_s = 0.0
        self._done.sent |= self._holds
        self._holds.clear()
        self._begun.clear()
        self._early.clear()
