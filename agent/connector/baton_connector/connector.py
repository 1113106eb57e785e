"""The class that vLLM loads.

    --kv-transfer-config '{"kv_connector": "BatonConnector", "kv_role": "kv_both",
                           "kv_connector_module_path": "baton_connector.connector",
                           "kv_load_failure_policy": "recompute",
                           "kv_connector_extra_config": {"socket": "/run/baton/e0.sock"}}'

vLLM makes one in the scheduler's process and one in each worker's. Where the engine is of a kind that Baton
cannot hand KV to or from, one line says so and the engine serves without transfers.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import RequestStatus

from . import layout, memory
from .link import Link, Registration
from .protocol import Hello
from .scheduler import Scheduler, StepPlan
from .worker import Worker

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.baton")

# Ends after which the prompt's KV is whole and somebody waits for it.
NORMAL_ENDS = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


@dataclass
class BatonMetadata(KVConnectorMetadata):
    """From the scheduler to every worker, each step."""

    step: StepPlan


@dataclass
class BatonWorkerMetadata(KVConnectorWorkerMetadata):
    """From the workers back: the epoch of each rank that is not in the one the scheduler believes."""

    epochs: dict[int, int]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> BatonWorkerMetadata:
        assert isinstance(other, BatonWorkerMetadata)
        return BatonWorkerMetadata(self.epochs | other.epochs)


class BatonConnector(KVConnectorBase_V1):
    """Baton's KV connector, both roles."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._socket = transfer.kv_connector_extra_config.get("socket")
        if not isinstance(self._socket, str) or not self._socket:
            raise ValueError("kv_connector_extra_config.socket: name the Unix socket of the Baton agent, as in its config")
        if getattr(transfer, "kv_load_failure_policy", "recompute") != "recompute":
            raise ValueError(
                'kv_load_failure_policy: set it to "recompute", or a failed transfer fails the request'
            )
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._believed: dict[int, int] = {}
        self._rank = 0
        self._bad_blocks: set[int] = set()
        # Whether this step has nothing to compute.
        self._idle = False
        # On a GPU: recorded behind each step's forward pass, for the agent's reads to wait for.
        self._ready: torch.cuda.Event | None = None
        self._kv_config = kv_cache_config
        self._reason = unsupported(vllm_config, kv_cache_config)

        if role is KVConnectorRole.WORKER:
            from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

            self._rank = get_tensor_model_parallel_rank()
            # Passive until its memory is registered.
            self._worker = Worker(None)
        elif self._reason is not None:
            logger.error("Baton: %s; serving without transfers", self._reason)
        else:
            self._scheduler = Scheduler(
                link=Link(self._socket, self._hello("scheduler")),
                tp_size=vllm_config.parallel_config.tensor_parallel_size,
                block_size=self._block_size(),
            )

    def _block_size(self) -> int:
        return self._kv_config.kv_cache_groups[0].kv_cache_spec.block_size

    def _hello(self, side: Any) -> Hello:
        config = self._vllm_config
        name = config.model_config.served_model_name
        return Hello(
            # Equal in all processes of an engine, and made anew at each start.
            instance=f"{config.kv_transfer_config.engine_id}-{config.instance_id}",
            side=side,
            tp_size=config.parallel_config.tensor_parallel_size,
            model=name if isinstance(name, str) else (name or [config.model_config.model])[0],
            block_size=self._block_size(),
            num_blocks=self._kv_config.num_blocks,
            chunk_tokens=chunk_tokens_of(config),
        )

    def shutdown(self) -> None:
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()

    # ---- worker --------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._reason is not None:
            return
        try:
            registration = self._describe(kv_caches)
        except (memory.MemoryRefused, layout.LayoutError) as error:
            logger.error("Baton: %s; serving without transfers", error)
            return
        if self._worker is not None:
            # An engine may lay out its cache anew.
            self._worker.close()
        self._worker = Worker(Link(self._socket, self._hello({"worker": self._rank}), registration))

    def _describe(self, kv_caches: dict[str, torch.Tensor]) -> Registration:
        group = self._kv_config.kv_cache_groups[0]
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        shared = memory.share(kv_caches)
        self._ready = shared.ready
        config = self._vllm_config
        described = layout.describe(
            shared.views,
            [storage.len for storage in shared.storages],
            self._kv_config.num_blocks,
            self._block_size(),
            [specs.get(view.layer, group.kv_cache_spec).page_size_bytes for view in shared.views],
            kv_heads_of(config, [specs.get(view.layer, group.kv_cache_spec) for view in shared.views]),
        )
        first = next(iter(kv_caches.values()))
        described.facts.update(
            dtype=str(first.dtype).removeprefix("torch."),
            cache_dtype=str(config.cache_config.cache_dtype),
            attention=attention_of(config, group.kv_cache_spec, list(kv_caches)),
        )
        described.order.update(
            tp_rank=str(self._rank),
            tp_size=str(config.parallel_config.tensor_parallel_size),
        )
        logger.info(
            "Baton: %d storages shared, %d blocks of %s bytes in %d pieces%s",
            len(shared.storages),
            self._kv_config.num_blocks,
            described.order["block_bytes"],
            len(described.pieces),
            "" if described.heads else "; only engines of the same tensor parallelism and order can exchange them",
        )
        return Registration(shared.storages, described, shared.gpu)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        # Before anything of the step is written.
        assert isinstance(kv_connector_metadata, BatonMetadata)
        assert self._worker is not None
        if kv_connector_metadata.step.preempted:
            self._worker.preempted(kv_connector_metadata.step.preempted)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        # Here rather than in `start_load_kv`, which an engine calls behind a step's forward pass: the blocks to
        # fill are already nobody else's, and the transfer runs beside the pass.
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, BatonMetadata)
        assert self._worker is not None
        step = connector_metadata.step
        self._believed = step.believed
        self._worker.begin_step(step.pulls, step.holds, step.computed)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self._idle = getattr(forward_context, "attn_metadata", True) is None

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        # Behind the step's forward pass, and behind a draft model's, which computes layers of its own: an engine that
        # drafts calls `get_finished` before it. Also behind a pass that failed, and that computed nothing.
        assert self._worker is not None
        if sys.exc_info()[0] is not None:
            return
        if self._ready is not None:
            self._ready.record()
        self._worker.say_computed()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        assert self._worker is not None
        done = self._worker.end_step(self._idle)
        self._bad_blocks |= done.bad_blocks
        return done.sent or None, done.received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def build_connector_worker_meta(self) -> BatonWorkerMetadata | None:
        assert self._worker is not None
        epoch = self._worker.epoch
        if self._believed.get(self._rank, epoch) == epoch:
            return None
        return BatonWorkerMetadata({self._rank: epoch})

    # ---- scheduler -----------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if self._scheduler is not None and num_external_tokens > 0:
            self._scheduler.allocated(request, list(blocks.get_block_ids()[0]), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> BatonMetadata:
        if self._scheduler is None:
            return BatonMetadata(StepPlan())
        return BatonMetadata(self._scheduler.take_step(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self._scheduler is None:
            return
        heard = getattr(connector_output, "kv_connector_worker_meta", None)
        if isinstance(heard, BatonWorkerMetadata):
            self._scheduler.heard(heard.epochs)
        for request_id in connector_output.finished_recving or ():
            self._scheduler.received(request_id)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is None:
            return False, None
        return self._scheduler.finished(request, block_ids, request.status in NORMAL_ENDS)


def unsupported(config: VllmConfig, kv_config: KVCacheConfig) -> str | None:
    """What keeps this engine from handing KV to others, with the mend where there is one."""
    groups = kv_config.kv_cache_groups
    if len(groups) != 1:
        return f"models with {len(groups)} KV cache groups (hybrid attention) are not supported yet"
    spec = groups[0].kv_cache_spec
    for layer_spec in getattr(spec, "kv_cache_specs", {"": spec}).values():
        if not isinstance(layer_spec, FullAttentionSpec):
            return f"KV caches of kind {type(layer_spec).__name__} are not supported yet, only full attention"
    parallel = config.parallel_config
    for name, size in (
        ("pipeline_parallel_size", parallel.pipeline_parallel_size),
        ("decode_context_parallel_size", getattr(parallel, "decode_context_parallel_size", 1)),
        ("prefill_context_parallel_size", getattr(parallel, "prefill_context_parallel_size", 1)),
        ("data_parallel_size", parallel.data_parallel_size),
    ):
        if size > 1:
            return f"{name}={size} is not supported yet: set it to 1"
    if getattr(parallel, "data_parallel_index", 0) > 0:
        return "only the first data-parallel rank of an engine is supported yet: start one engine per rank"
    if getattr(config.cache_config, "calculate_kv_scales", False):
        return "calculate_kv_scales makes each engine scale its KV differently: set it to false"
    return None


def chunk_tokens_of(config: VllmConfig) -> int:
    """Most prompt tokens that one step computes; 0 where a prompt is computed at once."""
    scheduler = config.scheduler_config
    if not getattr(scheduler, "enable_chunked_prefill", False):
        return 0
    names = ("max_num_batched_tokens", "max_num_scheduled_tokens", "long_prefill_token_threshold")
    limits = [getattr(scheduler, name, None) or 0 for name in names]
    return min((limit for limit in limits if limit > 0), default=0)


def kv_heads_of(config: VllmConfig, specs: list[Any]) -> tuple[int, int] | None:
    """KV heads of the model and of this rank, as vLLM spreads them: evenly, and each on several ranks where these
    outnumber them. `None` where the layers differ, or pack their heads in ways of their own."""
    ranks = config.parallel_config.tensor_parallel_size
    # Every rank has all of a latent vector.
    total = 1 if config.model_config.use_mla else config.model_config.get_total_num_kv_heads()
    count = max(1, total // ranks)
    for spec in specs:
        if spec.num_kv_heads != count or getattr(spec, "num_head_slots", None) not in (None, count):
            return None
        if getattr(spec, "tokens_per_state", 1) != 1:
            return None
    return (total, count) if total % ranks == 0 or ranks % total == 0 else None


def attention_of(config: VllmConfig, spec: Any, layers: list[str]) -> str:
    """The attention kernels, which decide how a block is packed inside; on a CPU with their instruction set."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends

    names = sorted(backend.get_name() for backend in get_current_attn_backends(config, layers))
    if "CPU_ATTN" in names:
        context = config.compilation_config.static_forward_context
        sets = sorted({str(getattr(context.get(layer), "isa", None)) for layer in layers})
        return f"{','.join(names)} {','.join(sets)}"
    return ",".join(names)
