"""What vLLM's layerwise reload of an engine's weights lacks, for every backend: updates that fail, and weights that are
missing from them.

vLLM itself goes on with the half of a layer that an update left behind when it failed: the next one then counts it
as loaded, drops what comes after it is "complete", and mixes two versions without an error.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.distributed.parallel_state import get_world_group
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

if TYPE_CHECKING:
    Base = WeightTransferEngine[Any, Any]
else:
    Base = object


class CheckedReload(Base):
    """Mixed into a backend's worker side, before it. An update is one call of ``receive_weights``.

    A failed update leaves a mixture of old and new layers, each of them whole, until the next one that is complete.
    """

    exact = False
    """Every element of a layer must come, but for the vocabulary's padding. Otherwise something of it: kernels for GPUs
    pad more than that."""
    tied_heads: Collection[nn.Module] = ()
    """Output heads that are loaded as the embedding; noted at the start, because the reload breaks the sharing while it
    runs."""

    def start_weight_update(self) -> None:
        self.tied_heads = tied_heads(self.model)
        discard_partial_layers(self.model)
        super().start_weight_update()  # type: ignore[safe-super]  # the backend's

    def receive_weights(self, update_info: Any) -> None:
        """Loads an update.

        Raises:
            RuntimeError: weights are missing or do not fit. The last worker raises for all of them.
        """
        error = None
        try:
            super().receive_weights(update_info)  # type: ignore[safe-super]
            if missing := incomplete_layers(self.model, self.tied_heads, exact=self.exact):
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
            discard_partial_layers(self.model)
            if world.rank_in_group == world.world_size - 1:
                # vLLM ends the session of a worker that raises here, so its reload has to end here too.
                self.finish_weight_update()
                raise RuntimeError("weight update failed: " + "; ".join(failures))


def incomplete_layers(model: nn.Module, tied: Collection[nn.Module], *, exact: bool) -> list[str]:
    """Names of layers of which something was missing from the update, or, unless ``exact``, everything.

    Args:
        tied: output heads that are loaded as the embedding.
    """
    incomplete = []
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        if info.load_numel_total is None or not module._parameters or module in tied:
            continue  # Complete already, nothing to load, or loaded as the embedding.
        expected = info.load_numel_total - vocabulary_padding(module)
        if info.load_numel < (expected if exact else min(expected, 1)):
            incomplete.append(f"{name} ({info.load_numel} of {expected} elements)")
    return incomplete


def discard_partial_layers(model: nn.Module) -> None:
    """Forgets what has come of layers that are not complete: they keep their old weights until all of it has come."""
    for module in model.modules():
        info = get_layerwise_info(module)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0


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
