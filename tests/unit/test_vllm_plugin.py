"""What the plugin changes in vLLM, where no engine is needed to see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from s2w import vllm_plugin


class Layer(torch.nn.Module):
    """An embedding, as far as packing goes."""

    cpu_linear: Any


def test_embeddings_are_packed_at_their_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Any] = []

    def pack(self: Any, layer: Any) -> None:
        packed.append(layer)
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(UnquantizedEmbeddingMethod, "process_weights_after_loading", pack)
    vllm_plugin._pack_when_needed.__wrapped__()
    method, head, embedding = UnquantizedEmbeddingMethod(), Layer(), Layer()
    for layer in (head, embedding):
        method.process_weights_after_loading(layer)
    assert packed == []
    x, weight = torch.randn(2, 3), torch.randn(5, 3)
    for _ in range(2):
        assert torch.equal(head.cpu_linear(x, weight, None), x @ weight.T)
    assert packed == [head]
    # New weights, as after a swap, are packed anew.
    method.process_weights_after_loading(head)
    head.cpu_linear(x, weight, None)
    assert packed == [head, head]
