"""The transfer plan: what the coordinator puts into a request's `kv_transfer_params`.

The Rust half, with examples, is `proto/src/plan.rs`. Everything of Baton's lies under the key `baton`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

VERSION = 1
KEY = "baton"

U32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
# msgspec bounds integers up to 63 bits only; larger ones are refused by the agent.
U64 = Annotated[int, msgspec.Meta(ge=0)]
TransferId = Annotated[str, msgspec.Meta(pattern="^[0-9a-fA-F]{32}$")]
EngineId = Annotated[str, msgspec.Meta(pattern="^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]


class Source(msgspec.Struct, frozen=True):
    """The holding side of a pull."""

    engine_id: EngineId
    address: Annotated[str, msgspec.Meta(min_length=3, max_length=300)]
    epoch: U64


class HoldPlan(msgspec.Struct, frozen=True, tag_field="action", tag="hold"):
    """Hold the prompt's blocks, each from when it is computed."""

    version: Literal[1]
    transfer_id: TransferId
    lease_ms: U32


class PullPlan(msgspec.Struct, frozen=True, tag_field="action", tag="pull"):
    """Fetch the blocks of the prompt, or of its beginning, before the request runs."""

    version: Literal[1]
    transfer_id: TransferId
    source: Source
    # All of the prompt's tokens, or those of whole blocks.
    num_tokens: U32
    deadline_ms: U32


Plan = HoldPlan | PullPlan


class PlanError(ValueError):
    """A plan that does not have its form; the request is then served as if it had none."""


def read(params: Any) -> Plan | None:
    """The plan in a request's `kv_transfer_params`; `None` where Baton has no part in it."""
    if not isinstance(params, dict) or KEY not in params:
        return None
    try:
        return msgspec.convert(params[KEY], Plan)
    except (msgspec.ValidationError, TypeError) as error:
        raise PlanError(f"kv_transfer_params.{KEY}: {error}") from None


def held(transfer_id: str, epoch: int, num_tokens: int) -> dict[str, Any]:
    """The answer to a hold, as it goes into the response's `kv_transfer_params`."""
    return {KEY: {"transfer_id": transfer_id, "epoch": epoch, "num_tokens": num_tokens}}
