"""The worker side of the shared-memory backend: reads a segment and reloads vLLM's model on CPU.

vLLM's layerwise reload is the base. On CPU it is not enough: kernels work on packed copies of the weights, and two
kinds of copies are left stale, without an error. Both are repaired here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from vllm.distributed.parallel_state import get_world_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from s2w.weights.shm import SegmentInfo, read_segment


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The backend needs no set-up."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A segment that holds the whole model."""

    segment: SegmentInfo


class SharedMemoryTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """One update is one segment with every weight of the model."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # At every update it warns of layers that have no weights of their own (rotary tables, tied heads);
        # what is missing is found here, and is an error.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)

    def init_transfer_engine(self, init_info: InitInfo) -> None: ...

    def start_weight_update(self) -> None:
        # A tied head shares the embedding's parameter but has its own packed copy. Noted now, because the
        # reload breaks the sharing while it runs.
        self._tied_heads = tied_heads(self.model)
        # With a kernel in place vLLM assumes an in-place update and does not repack the experts.
        self._moe_kernels: list[tuple[Any, Any]] = []
        for module in self.model.modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                self._moe_kernels.append((method, method.moe_kernel))
                method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class also synchronises an accelerator, which there is none of.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Loads the segment.

        Raises:
            RuntimeError: weights are missing or do not fit; the model is then a mixture of old and new until the
                next complete update. The last worker raises for all of them.
        """
        error = None
        try:
            cast(Any, self.model).load_weights(read_segment(update_info.segment))
            if missing := self._incomplete_layers():
                error = f"the update misses weights of {', '.join(missing[:8])} ({len(missing)} layers)"
        except Exception as exception:
            error = f"{type(exception).__name__}: {exception}"
        # Only one worker raises, the last one: vLLM's multiprocess executor stops reading answers at the first
        # failure, so an answer of a later worker would be taken for that of the next call.
        world = get_world_group()
        errors: list[str | None] = [None] * world.world_size
        torch.distributed.all_gather_object(errors, error, group=world.cpu_group)
        failures = dict.fromkeys(e for e in errors if e is not None)
        if failures:
            self._discard_partial_layers()
            if world.rank_in_group == world.world_size - 1:
                # vLLM ends the session of a worker that raises here, so its reload has to end here too.
                self._finalize()
                raise RuntimeError("weight update failed: " + "; ".join(failures))

    def finish_weight_update(self) -> None:
        self._finalize()

    def _finalize(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for head in self._tied_heads:
            cast(Any, head).quant_method.process_weights_after_loading(head)
        for method, kernel in self._moe_kernels:
            # Only where an update failed before it reached this layer.
            if method.moe_kernel is None:
                method.moe_kernel = kernel

    def _incomplete_layers(self) -> list[str]:
        """Names of layers with elements that were missing from the update."""
        incomplete = []
        for name, module in self.model.named_modules():
            info = get_layerwise_info(module)
            if info.load_numel_total is None or not module._parameters or module in self._tied_heads:
                continue  # Complete already, nothing to load, or loaded as the embedding.
            expected = info.load_numel_total - vocabulary_padding(module)
            if info.load_numel < expected:
                incomplete.append(f"{name} ({info.load_numel} of {expected} elements)")
        return incomplete

    def _discard_partial_layers(self) -> None:
        """Makes such layers keep their old weights: the missing part would otherwise be uninitialised memory."""
        for module in self.model.modules():
            info = get_layerwise_info(module)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0

    def shutdown(self) -> None: ...


def tied_heads(model: nn.Module) -> list[ParallelLMHead]:
    """Output heads whose weight is also the weight of another module."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(module)
    return [m for modules in owners.values() if len(modules) > 1 for m in modules if isinstance(m, ParallelLMHead)]


def vocabulary_padding(module: nn.Module) -> int:
    """Elements of padding rows, which no checkpoint fills and vLLM counts as loadable."""
    if not isinstance(module, VocabParallelEmbedding):
        return 0
    rows = module.shard_indices.num_elements_padded - module.shard_indices.num_org_elements
    return rows * module.embedding_dim
