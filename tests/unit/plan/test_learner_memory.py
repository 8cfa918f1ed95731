"""Memory of a learner rank by rule; what autograd keeps is compared with what it does keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from s2w.config.schema import LearnerConfig
from s2w.models.shapes import model_config, shape_of
from s2w.plan.learner_memory import LargestBatch, layer_activations, rank_memory

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attn_implementation": "sdpa",
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 4}
SEQUENCE = 512


def kept(model: PreTrainedModel) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, but for the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.arange(SEQUENCE)[None] % 64, use_cache=False)
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("model", "config", "more"),
    [
        (Qwen3ForCausalLM, Qwen3Config, {}),
        (Qwen3MoeForCausalLM, Qwen3MoeConfig, EXPERTS),
        (LlamaForCausalLM, LlamaConfig, {}),
    ],
    ids=["qwen3", "qwen3_moe", "llama"],
)
def test_activations_are_those_that_autograd_keeps(
    model: type[PreTrainedModel], config: type[Any], more: dict[str, Any], dtype: torch.dtype
) -> None:
    # The difference of two depths: what is outside of the layers does not count.
    sizes = []
    for layers in (1, 3):
        made: Any = model(config(**SIZES, **more, num_hidden_layers=layers))
        sizes.append(kept(made.to(dtype)))
    shape = shape_of(config(**SIZES, **more, num_hidden_layers=1))
    rule = layer_activations(shape, shape.layers[0], dtype.itemsize)
    measured = (sizes[1] - sizes[0]) / 2 / SEQUENCE
    print(model.__name__, dtype, measured, rule, rule / measured)
    assert rule == pytest.approx(measured, rel=0.15)


def memory(learner: LearnerConfig, *, chunk_rows: int = 1024, **changes: Any) -> dict[str, int]:
    arguments: dict[str, Any] = {
        "device": "cuda",
        "itemsize": 2,
        "heads": [4096],
        "signal_row": 8192,
        "engine_itemsize": 2,
    }
    batch = LargestBatch(tokens=4096, sequence=4096, rows=3072, chunk_rows=chunk_rows)
    return rank_memory(shape_of(model_config("Qwen/Qwen3-8B")), learner, batch, **(arguments | changes))


@pytest.mark.parametrize(("stage", "weights", "optimizer", "gradients"), [(1, 1, 8, 1), (2, 1, 8, 8), (3, 8, 8, 8)])
def test_what_zero_shards(stage: int, weights: int, optimizer: int, gradients: int) -> None:
    parameters = shape_of(model_config("Qwen/Qwen3-8B")).parameters
    parts = memory(LearnerConfig(zero_stage=stage, ranks=8))
    assert parts["weights"] == 2 * parameters // weights
    assert parts["master copy"] == 4 * parameters // optimizer
    assert parts["moments"] == 8 * parameters // optimizer
    assert parts["gradients"] == 4 * parameters // gradients


def test_eighteen_bytes_a_parameter_in_bfloat16_and_twenty_in_float32() -> None:
    parameters = shape_of(model_config("Qwen/Qwen3-8B")).parameters
    names = ("weights", "master copy", "moments", "gradients", "flat copy of gradients")

    def each(parts: dict[str, int]) -> float:
        return sum(parts.get(name, 0) for name in names) / parameters

    assert each(memory(LearnerConfig(zero_stage=2))) == 18
    assert each(memory(LearnerConfig(zero_stage=0), itemsize=4)) == 20


def test_the_loss_grows_with_its_chunk_and_checkpointing_saves_activations() -> None:
    plain, small = memory(LearnerConfig()), memory(LearnerConfig(), chunk_rows=256)
    assert plain["loss"] - small["loss"] == (1024 - 256) * 151_936 * (4 + 4 + 4 + 2)
    checkpointed = memory(LearnerConfig(activation_checkpointing=True))
    assert checkpointed["activations"] < plain["activations"] / 8
    assert plain["teacher heads"] == 2 * 151_936 * 4096
    assert plain["signals"] == 3072 * 8192
    assert memory(LearnerConfig(), heads=[])["loss"] < plain["loss"]
