"""Layouts of engines that vLLM refuses, refused before."""

from __future__ import annotations

import re
from typing import Any

import pytest
from qwen3_moe import moe_config

from s2w.errors import ConfigError
from s2w.models.parallel import check_parallel


@pytest.mark.parametrize(
    ("sizes", "layout", "sentence"),
    [
        ({}, {"tensor_parallel": 8}, None),
        ({}, {"tensor_parallel": 64, "expert_parallel": True}, None),
        ({"num_key_value_heads": 6}, {"tensor_parallel": 4}, "does not divide the 6 key-value heads"),
        ({"num_key_value_heads": 6}, {"tensor_parallel": 8}, "does not divide the 6 key-value heads"),
        ({"moe_intermediate_size": 1540}, {"tensor_parallel": 8}, "does not divide the 1540 columns of an expert"),
        ({"moe_intermediate_size": 1540}, {"tensor_parallel": 8, "expert_parallel": True}, None),
        ({"mlp_only_layers": [0], "intermediate_size": 100}, {"tensor_parallel": 8}, "the 100 columns of an MLP"),
        (
            {"num_attention_heads": 48, "moe_intermediate_size": 1539, "num_key_value_heads": 3},
            {"tensor_parallel": 3},
            "the 151936 rows of the padded vocabulary",
        ),
        ({"num_local_experts": 4}, {"tensor_parallel": 8}, "is more than the 4 experts"),
    ],
)
def test_layouts_that_vllm_refuses(sizes: dict[str, Any], layout: dict[str, Any], sentence: str | None) -> None:
    if sentence is None:
        check_parallel("teacher", moe_config(**sizes), **layout)
    else:
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            check_parallel("teacher", moe_config(**sizes), **layout)
