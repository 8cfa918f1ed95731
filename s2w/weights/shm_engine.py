"""The worker side of the shared-memory backend: reads a segment and reloads vLLM's model on CPU.

vLLM's layerwise reload is the base. On CPU it is not enough: kernels work on packed copies of the weights, and two
kinds of copies are left stale, without an error. Both are repaired here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from s2w.weights.reload import CheckedReload
from s2w.weights.shm import SegmentInfo, read_segment


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The backend needs no set-up."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A segment that holds the whole model."""

    segment: SegmentInfo


class SegmentEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """One update is one segment with every weight of the model."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # At every update it warns of layers that have no weights of their own (rotary tables, tied heads);
        # what is missing is found in CheckedReload, and is an error.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)

    def init_transfer_engine(self, init_info: InitInfo) -> None: ...

    def start_weight_update(self) -> None:
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
        cast(Any, self.model).load_weights(read_segment(update_info.segment))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for method, kernel in self._moe_kernels:
            # Only where an update failed before it reached this layer.
            if method.moe_kernel is None:
                method.moe_kernel = kernel

    def shutdown(self) -> None: ...


class SharedMemoryTransferEngine(CheckedReload, SegmentEngine):
    """The backend as vLLM knows it."""

    exact = True

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        for head in self.tied_heads:
            # A tied head shares the embedding's parameter but has its own packed copy.
            cast(Any, head).quant_method.process_weights_after_loading(head)
