"""The scheduler's half of the connector: turns the plans in requests into holds and pulls.

A hold begins with the step that computes the first of its prompt, and grows with each step that computes more of it:
this side tells the agent of the hold, and the workers, behind the step, which blocks are computed. So the engine that
pulls has the KV of earlier chunks while later ones are computed. The blocks stay when the request finishes. A request
that ends in any other way has its hold cancelled, and gives its blocks back when the agent says that nobody copies
them; one that is preempted has given them back already, and the workers wait for that word before they go on.

A plan is carried out only while every worker's memory is registered with the agent in the very session (epoch)
that this side has: otherwise a hold could reach an agent that cannot tell the workers when it ends. Workers name
their epoch in the output of a step whenever it differs from what the scheduler last believed. After a new session
nobody has spoken yet, so the first request with a plan waits for one empty step, about a millisecond.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import plan as plans
from . import protocol
from .link import LOST, Link
from .plan import HoldPlan, Plan, PullPlan
from .protocol import Cancel, Content, ContentKeys, Hold, MultimodalItem, Pull
from .worker import NEVER, ComputedBlocks, WantedPull

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.baton")

# Steps for which a request with a plan waits to hear from the workers; they answer after one or two.
MOST_WAITS = 8
# Between two log lines about plans that cannot be carried out: clients can send any number of them.
LOG_EVERY_S = 1.0


@dataclass
class StepPlan:
    """What one step asks of the workers."""

    pulls: list[WantedPull] = field(default_factory=list)
    # Blocks of held prompts that it computes.
    computed: list[ComputedBlocks] = field(default_factory=list)
    # Requests that are over, and whose blocks stay until the workers report them as sent.
    holds: list[str] = field(default_factory=list)
    # Requests whose blocks it may overwrite, once nobody copies them.
    preempted: list[str] = field(default_factory=list)
    # The epoch that the scheduler believes each rank to be in; a worker that is in another one says so.
    believed: dict[int, int] = field(default_factory=dict)


@dataclass
class _Begun:
    """A hold that the agent knows of."""

    epoch: int
    # The prompt's, as the agent was told.
    tokens: int
    # Leading blocks that the workers were given to name.
    blocks: int = 0


@dataclass
class _Planned:
    request: Request
    plan: Plan | None
    waits: int = 0
    # The pull was handed to the workers, or the hold begun; or it will never be.
    settled: bool = False
    pulling: bool = False
    hold: _Begun | None = None


class Scheduler:
    """State of the scheduler's half. All hooks run on the engine's thread."""

    def __init__(self, link: Link, tp_size: int, block_size: int) -> None:
        self.link = link
        self._block_size = block_size
        self._ranks: dict[int, int] = dict.fromkeys(range(tp_size), 0)
        self._requests: dict[str, _Planned] = {}
        # Those of them with a hold to begin, or whose prompt is not computed to the end.
        self._growing: dict[str, _Planned] = {}
        self._step = StepPlan()
        self._logged = float("-inf")

    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """How many tokens beyond the first `computed` come from elsewhere; None: ask again next step."""
        if not request.kv_transfer_params:
            return 0, False
        planned = self._planned(request)
        plan = planned.plan
        if plan is None or planned.settled:
            return 0, False
        wanted = 0
        if isinstance(plan, PullPlan):
            wanted = self._wanted(request, plan, computed)
            if wanted == 0:
                return 0, False
        self._listen()
        if not self._ready():
            # A hold waits too: it begins with the request's first step, or never.
            if self.link.epoch and NEVER not in self._ranks.values() and planned.waits < MOST_WAITS:
                planned.waits += 1
                return None, False
            self._log("plan of %s is not carried out: no session with the agent", request.request_id)
            planned.settled = isinstance(plan, PullPlan)
            return 0, False
        return wanted, wanted > 0

    def _wanted(self, request: Request, plan: PullPlan, computed: int) -> int:
        prompt = request.num_prompt_tokens
        if request.num_tokens != prompt:
            # Preempted after its first tokens: the source is gone by now.
            return 0
        # All of the prompt, or whole blocks of its beginning: the engine computes the rest behind them.
        whole = plan.num_tokens == prompt
        fits = whole or (plan.num_tokens < prompt and plan.num_tokens % self._block_size == 0)
        if not _is_plain(request) or not fits:
            self._log("pull of %d tokens does not fit the prompt of %s (%d)", plan.num_tokens, request.request_id, prompt)
            return 0
        # The step that computes the last token, which is needed in any case, takes a few more along: up to
        # one block, that is sooner done than a transfer.
        missing = plan.num_tokens - computed
        return missing if missing > self._block_size else 0

    def allocated(self, request: Request, block_ids: list[int], external: int) -> None:
        """The request has its blocks; `external` tokens of them are to be pulled."""
        if external == 0:
            return
        planned = self._requests.get(request.request_id)
        if planned is None or planned.settled or not isinstance(planned.plan, PullPlan):
            return
        plan = planned.plan
        planned.settled = True
        planned.pulling = True
        first = (plan.num_tokens - external) // self._block_size
        wanted = block_ids[first : -(-plan.num_tokens // self._block_size)]
        try:
            frame = protocol.frame(
                Pull(
                    request_id=request.request_id,
                    transfer_id=plan.transfer_id,
                    source=plan.source,
                    deadline_ms=plan.deadline_ms,
                    content=_content(request, plan.num_tokens),
                    first_block=first,
                    block_ids=wanted,
                )
            )
        except protocol.ProtocolError as error:
            self._log("pull for %s: %s", request.request_id, error)
            # The workers report it as failed.
            frame = b""
        self._step.pulls.append(WantedPull(request.request_id, frame, wanted, plan.deadline_ms / 1000))

    def take_step(self, output: SchedulerOutput) -> StepPlan:
        """What this step, which the engine has put together, asks of the workers."""
        self._listen()
        for request_id in output.preempted_req_ids or ():
            self._preempted(request_id)
        if self._growing:
            self._grow(output)
        step, self._step = self._step, StepPlan()
        step.believed = self._ranks
        return step

    def heard(self, epochs: dict[int, int]) -> None:
        """Workers said which epoch they are in."""
        # A new dict: the old one may be on its way to the workers.
        self._ranks = {rank: epochs.get(rank, epoch) for rank, epoch in self._ranks.items()}

    def received(self, request_id: str) -> None:
        """The pull for this request is over."""
        planned = self._requests.get(request_id)
        if planned is not None:
            planned.pulling = False

    def finished(self, request: Request, block_ids: list[int], normally: bool) -> tuple[bool, dict[str, Any] | None]:
        """The request is over. True: its blocks stay until the workers report it as sent."""
        request_id = request.request_id
        planned = self._requests.pop(request_id, None)
        self._growing.pop(request_id, None)
        if planned is None:
            return False, None
        if planned.pulling:
            self._cancel(request_id)
        hold = planned.hold
        if hold is None:
            return False, None
        self._listen()
        if len(block_ids) < hold.blocks:
            # Preempted since the last step.
            self._take_back(request_id, hold)
            return False, None
        # Where the session is over, a worker may not have heard yet: each says for itself when nobody copies.
        self._step.holds.append(request_id)
        if self.link.epoch != hold.epoch:
            return True, None
        if normally and self._is_whole(request, hold):
            return True, plans.held(planned.plan.transfer_id, hold.epoch, hold.tokens)
        if normally:
            self._log("hold of %s ends: its prompt was not computed to the end", request_id)
        self._cancel(request_id)
        return True, None

    def _is_whole(self, request: Request, hold: _Begun) -> bool:
        computed = request.num_computed_tokens - getattr(request, "num_in_flight_tokens", 0)
        # A prompt may grow where a client streams it.
        same = request.num_prompt_tokens == hold.tokens
        return same and computed >= hold.tokens and hold.blocks * self._block_size >= hold.tokens

    def _grow(self, output: SchedulerOutput) -> None:
        """Begins the holds of requests that this step computes for the first time; and names the blocks that will be
        complete behind it, those that were found in the prefix cache too: until then another request may be
        computing them."""
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, planned in list(self._growing.items()):
            if request_id not in computed:
                continue
            hold = planned.hold or self._begin(planned)
            if hold is None:
                del self._growing[request_id]
                continue
            before = computed[request_id]
            if before < hold.blocks * self._block_size:
                # The engine takes back what it had computed, and computes it once more.
                self._preempted(request_id)
                continue
            tokens = before + output.num_scheduled_tokens[request_id]
            if tokens < hold.tokens:
                blocks = tokens // self._block_size
            else:
                # The last one may be partly filled.
                blocks = -(-hold.tokens // self._block_size)
                del self._growing[request_id]
            block_ids = output.kv_connector_block_state.get_block_ids(request_id)[0][hold.blocks : blocks]
            if block_ids or hold.blocks == 0:
                self._step.computed.append(ComputedBlocks(request_id, hold.epoch, hold.blocks, block_ids))
            hold.blocks += len(block_ids)

    def _begin(self, planned: _Planned) -> _Begun | None:
        """Tells the agent of a hold."""
        planned.settled = True
        request, plan = planned.request, planned.plan
        if not _is_plain(request):
            return None
        prompt = request.num_prompt_tokens
        if not self._ready():
            self._log("hold of %s is not made: no session with the agent", request.request_id)
            return None
        hold = Hold(
            request_id=request.request_id,
            transfer_id=plan.transfer_id,
            lease_ms=plan.lease_ms,
            content=_content(request, prompt),
            block_ids=[],
        )
        try:
            if not self.link.send(protocol.frame(hold)):
                return None
        except protocol.ProtocolError as error:
            self._log("hold of %s is not made: %s", request.request_id, error)
            return None
        planned.hold = _Begun(self.link.epoch, prompt)
        return planned.hold

    def _preempted(self, request_id: str) -> None:
        """The engine has given back the request's blocks. It is not held once more: the one that pulls has been told
        that this transfer is over."""
        planned = self._requests.get(request_id)
        if planned is not None and planned.hold is not None:
            self._growing.pop(request_id, None)
            self._take_back(request_id, planned.hold)
            planned.hold = None

    def _take_back(self, request_id: str, hold: _Begun) -> None:
        if self.link.epoch == hold.epoch:
            self._cancel(request_id)
        self._step.preempted.append(request_id)

    def _cancel(self, request_id: str) -> None:
        self.link.send(protocol.frame(Cancel(request_id=request_id)))

    def close(self) -> None:
        self.link.close()

    def _listen(self) -> None:
        """Notices where a session ended or began; the scheduler is sent nothing else."""
        # Behind the end of one session the next may be ready.
        while events := self.link.poll():
            for event in events:
                if event is not LOST:
                    logger.error("unexpected message from the Baton agent: %s", type(event).__name__)

    def _planned(self, request: Request) -> _Planned:
        planned = self._requests.get(request.request_id)
        if planned is None:
            try:
                planned = _Planned(request, plans.read(request.kv_transfer_params))
            except plans.PlanError as error:
                self._log("plan of %s is ignored: %s", request.request_id, error)
                planned = _Planned(request, None)
            self._requests[request.request_id] = planned
            if isinstance(planned.plan, HoldPlan):
                self._growing[request.request_id] = planned
        return planned

    def _ready(self) -> bool:
        epoch = self.link.epoch
        return epoch != 0 and all(rank == epoch for rank in self._ranks.values())

    def _log(self, text: str, *args: object) -> None:
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            logger.warning(text, *args)


def _is_plain(request: Request) -> bool:
    """Whether tokens and keys tell all that the prompt's KV was computed from."""
    return request.prompt_token_ids is not None and getattr(request, "prompt_embeds", None) is None


def _content(request: Request, num_tokens: int) -> Content:
    """What the KV of the prompt's first tokens is computed from."""
    lora = request.lora_request
    items = [
        MultimodalItem(feature.identifier, feature.mm_position.offset, feature.mm_position.length)
        for feature in getattr(request, "mm_features", None) or ()
    ]
    return Content(
        tokens=protocol.token_bytes(request.prompt_token_ids[:num_tokens]),
        keys=ContentKeys(
            lora=lora.lora_name if lora is not None else None,
            salt=request.cache_salt or None,
            multimodal=sorted(items, key=lambda item: item.offset),
        ),
    )
