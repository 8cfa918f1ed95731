"""Sizes of models from their configurations alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from s2w.config.schema import StudentConfig
from s2w.models.shapes import Layer, ModelShape, model_config, published, quantized_bytes, shape_of, student_config
from s2w.testbed import __file__ as testbed

CHECKPOINT = Path(testbed).parent / "checkpoint"
# In billions, of the model cards (14B by its own sizes, where the card says 14.8): all parameters, and a token's.
PUBLISHED = [
    ("Qwen3-0.6B", 0.596, 0.596),
    ("Qwen3-1.7B", 1.72, 1.72),
    ("Qwen3-4B", 4.02, 4.02),
    ("Qwen3-8B", 8.19, 8.19),
    ("Qwen3-14B", 14.77, 14.77),
    ("Qwen3-32B", 32.8, 32.8),
    ("Qwen3-30B-A3B", 30.5, 3.3),
    ("Qwen3-235B-A22B", 235, 22),
]


def shape(name: str) -> ModelShape:
    return shape_of(model_config(name))


@pytest.mark.parametrize(("name", "total", "active"), PUBLISHED)
def test_published_counts(name: str, total: float, active: float) -> None:
    found = shape(f"Qwen/{name}")
    assert found.parameters / 1e9 == pytest.approx(total, rel=0.002)
    assert found.active / 1e9 == pytest.approx(active, rel=0.02)
    assert found.context == 40_960


def test_every_published_model_is_known_to_transformers() -> None:
    assert {model_config(name).model_type for name in published()} == {"qwen3", "qwen3_moe"}


def test_parameters_by_kind_and_kv_cache() -> None:
    small = shape("Qwen/Qwen3-0.6B")
    layer = Layer(attention=2 * 1024 * 2048, key_value=2 * 1024 * 1024, mlp=3 * 1024 * 3072, vectors=2 * 1024 + 2 * 128)
    assert set(small.layers) == {layer} and len(small.layers) == 28
    assert (small.embedding, small.head, small.other) == (151_936 * 1024, 0, 1024)
    assert small.head_elements == small.embedding
    assert small.kv_bytes(2) == 28 * 2 * 8 * 128 * 2
    assert small.largest_parameter == small.embedding

    experts = shape("Qwen/Qwen3-30B-A3B")
    assert experts.layers[0].experts == 128 * 3 * 2048 * 768 and experts.layers[0].router == 128 * 2048
    assert experts.head == experts.embedding == 151_936 * 2048
    assert experts.trunk == experts.other + 48 * (
        experts.layers[0].total - experts.layers[0].experts * (128 - 8) // 128
    )
    # transformers holds the first two matrices of all experts of a layer as one parameter.
    assert experts.largest_parameter == 128 * 2 * 768 * 2048


def test_a_checkpoint_has_as_many_parameters_as_its_configuration_says() -> None:
    with safe_open(CHECKPOINT / "teacher" / "model.safetensors", "pt") as weights:
        count = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert shape(str(CHECKPOINT / "teacher")).parameters == count


def test_the_student_as_it_starts() -> None:
    pruned = StudentConfig(model="Qwen/Qwen3-0.6B", init="pruned", keep_layers=10)
    assert len(shape_of(student_config(pruned)).layers) == 10
    fresh = StudentConfig(model="Qwen/Qwen3-0.6B", init="fresh", overrides={"num_hidden_layers": 3, "hidden_size": 64})
    found = shape_of(student_config(fresh))
    assert (len(found.layers), found.hidden_size) == (3, 64)


def test_fp8_blocks_have_a_scale_each() -> None:
    assert shape("Qwen/Qwen3-235B-A22B-FP8").quantization_block == (128, 128)
    assert quantized_bytes(3 * 128 * 128, (128, 128)) == 3 * (128 * 128 + 4)
