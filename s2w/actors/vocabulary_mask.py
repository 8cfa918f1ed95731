"""Takes the ids past the shared vocabulary out of every vLLM engine.

Heads are padded: Qwen3's has 151,936 rows for 151,669 tokens. Nothing trains the padding rows, so their logits may be
anything; vLLM samples and normalises over them as if they were tokens. Engines of s2w are started with
:func:`engine_option`, and :func:`register` sets their logits past the shared vocabulary to -inf: one write to the
padding columns per step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

OPTION = "s2w_vocab_size"
"""Name of the vocabulary's size in vLLM's ``additional_config``, which reaches every process of an engine."""


def engine_option(vocab_size: int) -> dict[str, int]:
    """``additional_config`` of an engine that knows only the ids below ``vocab_size``."""
    return {OPTION: vocab_size}


def vocabulary_of(config: Any) -> int | None:
    """The size that a ``VllmConfig`` was given by :func:`engine_option`; None if it was not."""
    given = config.additional_config
    return given.get(OPTION) if isinstance(given, dict) else None


@functools.cache
def register() -> None:
    """Patches vLLM's ``LogitsProcessor``, through which every model computes its logits; idempotent.

    Logits that stay sharded over tensor-parallel ranks (``skip_gather``) are left to the caller, which knows the
    shard: :class:`s2w.teacher.pooler.ShardedHead`.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    construct, forward = LogitsProcessor.__init__, LogitsProcessor.forward

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        self.s2w_vocab_size = vocabulary_of(get_current_vllm_config())

    @functools.wraps(forward)
    def masked(
        self: Any,
        lm_head: Any,
        hidden_states: torch.Tensor,
        embedding_bias: torch.Tensor | None = None,
        skip_gather: bool = False,
    ) -> torch.Tensor | None:
        logits = forward(self, lm_head, hidden_states, embedding_bias, skip_gather)
        if logits is not None and not skip_gather and self.s2w_vocab_size is not None:
            # Filled, not cut off: vLLM's samplers expect the model's own number of columns.
            logits[..., self.s2w_vocab_size :] = -torch.inf
        return logits

    LogitsProcessor.__init__ = __init__  # type: ignore[method-assign]
    LogitsProcessor.forward = masked  # type: ignore[method-assign]
