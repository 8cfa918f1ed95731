"""Configurations of MoE models with the sizes of Qwen3-235B-A22B."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3MoeConfig

QWEN3_235B = {
    "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_attention_heads": 64,
    "num_key_value_heads": 4, "num_local_experts": 128, "num_hidden_layers": 94, "vocab_size": 151936,
}  # fmt: skip


def moe_config(block: list[int] | None = None, **sizes: Any) -> Qwen3MoeConfig:
    fp8: dict[str, Any] = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}} if block else {}
    return Qwen3MoeConfig(**{**QWEN3_235B, **sizes}, **fp8)
