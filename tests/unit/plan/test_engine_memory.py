"""Memory of a vLLM engine by rule."""

from __future__ import annotations

import pytest

from s2w.config.schema import RolloutConfig, TeacherConfig
from s2w.models.shapes import ModelShape, model_config, shape_of
from s2w.plan.engine_memory import GIB, engine_memory, engine_weights, graph_sizes, stage_layers


def shape(name: str) -> ModelShape:
    return shape_of(model_config(f"Qwen/{name}"))


def teacher(**settings: object) -> TeacherConfig:
    return TeacherConfig(model="m", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Qwen3-4B", "Qwen3-8B", "Qwen3-30B-A3B"])
def test_one_gpu_holds_all_weights(name: str) -> None:
    model = shape(name)
    assert engine_weights(model, teacher(), 2) == 2 * model.parameters


def test_what_a_tensor_parallel_rank_has() -> None:
    model = shape("Qwen3-235B-A22B")
    layer = model.layers[0]
    # 4 key-value heads over 8 ranks: each has a whole one.
    one = layer.attention // 8 + layer.key_value // 4 + layer.experts // 8 + layer.router + layer.vectors
    expected = 2 * (94 * one + (model.embedding + model.head) // 8 + model.other)
    assert engine_weights(model, teacher(tensor_parallel=8), 2) == expected
    assert engine_weights(model, teacher(tensor_parallel=8, expert_parallel=True), 2) == expected


def test_experts_that_the_ranks_do_not_divide() -> None:
    model = shape("Qwen3-30B-A3B")
    sizes = [engine_weights(model, teacher(tensor_parallel=3, expert_parallel=ep), 2) for ep in (False, True)]
    # 43 of 128 experts instead of a third.
    assert sizes[1] - sizes[0] == pytest.approx(2 * 48 * model.layers[0].experts * (43 / 128 - 1 / 3), rel=1e-6)


def test_stages_of_a_pipeline() -> None:
    assert stage_layers(94, 2) == [47, 47] and stage_layers(94, 4) == [23, 24, 24, 23] and stage_layers(7, 1) == [7]
    model = shape("Qwen3-32B")
    whole = engine_weights(model, teacher(), 2)
    half = engine_weights(model, teacher(pipeline_parallel=2), 2)
    # The last stage has the head, the first the embedding.
    assert half == whole - 2 * (32 * model.layers[0].total + model.embedding)
    tied = shape("Qwen3-4B")
    assert engine_weights(tied, teacher(pipeline_parallel=2), 2) == 2 * (
        18 * tied.layers[0].total + tied.embedding + tied.other
    )


def test_fp8_halves_the_matrices_and_leaves_embedding_and_head() -> None:
    layout = teacher(tensor_parallel=8, expert_parallel=True)
    sizes = [engine_weights(shape(name), layout, 2) for name in ("Qwen3-235B-A22B", "Qwen3-235B-A22B-FP8")]
    ends = 2 * 2 * 151_936 * 4096 // 8
    assert (sizes[1] - ends) / (sizes[0] - ends) == pytest.approx(0.5, abs=0.002)


def test_the_kv_cache_is_what_is_left() -> None:
    model = shape("Qwen3-8B")
    engine = RolloutConfig(gpu_memory_utilization=0.5)
    memory = engine_memory(model, engine, device="cuda", itemsize=2, max_model_len=33_792, gpu_bytes=80 * GIB)
    assert sum(memory.parts.values()) == memory.share == 40 * GIB
    assert memory.kv_token == model.kv_bytes(2) == 147_456
    assert memory.sequences(33_792) == memory.parts["KV cache"] // 147_456 // 33_792
    assert memory.sequences(33_791) == memory.sequences(33_792)  # blocks of 16 tokens
    wide = engine_memory(
        model, RolloutConfig(tensor_parallel=16), device="cuda", itemsize=2, max_model_len=1, gpu_bytes=80 * GIB
    )
    assert wide.kv_token == 147_456 // 8  # 8 heads: two ranks have the same one


def test_no_room_for_a_cache_is_no_sequence() -> None:
    memory = engine_memory(
        shape("Qwen3-32B"), teacher(), device="cuda", itemsize=2, max_model_len=8, gpu_bytes=40 * GIB
    )
    assert memory.parts["KV cache"] < 0 and memory.sequences(8) == 0


def test_batch_sizes_with_a_graph() -> None:
    assert graph_sizes(RolloutConfig(max_sequences=8), 2048) == [1, 2, 4, 8, 16]
    assert graph_sizes(RolloutConfig(max_sequences=256), 2048)[-3:] == [480, 496, 512]
    eager = RolloutConfig(enforce_eager=True)
    memory = engine_memory(shape("Qwen3-0.6B"), eager, device="cuda", itemsize=2, max_model_len=8, gpu_bytes=80 * GIB)
    assert memory.parts["CUDA graphs"] == 0


def test_processes_on_the_cpu_share_the_weights_and_have_a_cache_each() -> None:
    model = shape("Qwen3-0.6B")
    one = engine_memory(model, RolloutConfig(kv_cache_gib=2), device="cpu", itemsize=4, max_model_len=8)
    two = engine_memory(
        model, RolloutConfig(kv_cache_gib=2, tensor_parallel=2), device="cpu", itemsize=4, max_model_len=8
    )
    assert one.parts["weights"] == 4 * model.parameters and one.parts["KV cache"] == 2 * GIB
    assert two.parts["KV cache"] == 4 * GIB
    # Norms are in each of them.
    assert 0 < two.parts["weights"] - one.parts["weights"] < 1e6
