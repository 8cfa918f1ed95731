"""Which tensor and pipeline parallel layouts a model's sizes allow, as vLLM requires.

vLLM checks these in its workers, when the engine starts: ``divide`` in its layers and models, and the FP8 block shapes
in vllm/model_executor/layers/quantization and layers/fused_moe/oracle/fp8.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from s2w.errors import ConfigError

EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
"""What configurations call the number of experts."""
VOCABULARY_BLOCK = 64
"""vLLM pads the rows of embedding and head to a multiple of it."""
SMALLEST_QUANTIZATION_BLOCK = 32
"""Where quantization blocks of experts do not fit, vLLM splits them, but not below this size."""


def check_parallel(
    section: str,
    config: PretrainedConfig,
    *,
    tensor_parallel: int,
    pipeline_parallel: int = 1,
    expert_parallel: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Compares a layout with the model's sizes.

    Args:
        section: the section of the settings, for error messages: ``teacher``, ``rollout``.
        overrides: fields of the configuration that the run changes.

    Raises:
        ConfigError: names the size that does not fit, and what to write.
    """
    text_config = config.get_text_config()

    def size(name: str) -> int:
        value = (overrides or {}).get(name, getattr(text_config, name, None))
        return value if isinstance(value, int) else 0

    experts = next(filter(None, map(size, EXPERTS)), 0)
    if expert_parallel and not experts:
        raise ConfigError(f"{section}.expert_parallel=true, but the model has no experts: write false")
    if pipeline_parallel > (layers := size("num_hidden_layers")):
        raise ConfigError(
            f"{section}.pipeline_parallel={pipeline_parallel} is more than the {layers} layers of the model"
        )
    if 0 < experts < tensor_parallel:
        raise ConfigError(
            f"{section}.tensor_parallel={tensor_parallel} is more than the {experts} experts of the model"
        )

    heads, kv_heads = size("num_attention_heads"), size("num_key_value_heads")
    copied = 0 < kv_heads < tensor_parallel and tensor_parallel % kv_heads == 0
    dense = not experts or bool(
        getattr(text_config, "mlp_only_layers", None)
        or size("decoder_sparse_step") > 1
        or size("first_k_dense_replace")
    )
    expert_width = size("moe_intermediate_size") or size("intermediate_size")
    split = {
        "attention heads": heads,
        "key-value heads": 0 if copied else kv_heads,
        "columns of an MLP (intermediate_size)": size("intermediate_size") if dense else 0,
        "columns of an expert (moe_intermediate_size)": expert_width if experts and not expert_parallel else 0,
        "columns of the shared expert": size("shared_expert_intermediate_size"),
        "rows of the padded vocabulary": math.ceil(size("vocab_size") / VOCABULARY_BLOCK) * VOCABULARY_BLOCK,
    }
    for what, count in split.items():
        if count % tensor_parallel:
            raise ConfigError(
                f"{section}.tensor_parallel={tensor_parallel} does not divide the {count} {what} of the model"
            )

    if experts and not expert_parallel and (block := quantization_block(text_config)):
        share = expert_width // tensor_parallel
        if not _experts_fit(share, tensor_parallel, block, size("hidden_size")):
            raise ConfigError(
                f"{section}.tensor_parallel={tensor_parallel} cuts the {expert_width} columns of an expert into shares "
                f"of {share}, which do not fit the checkpoint's quantization blocks of {block[0]} x {block[1]}: write "
                f"{section}.expert_parallel=true, or a smaller {section}.tensor_parallel"
            )


def quantization_block(config: PretrainedConfig) -> tuple[int, int] | None:
    """Rows and columns that share a scale in a block-quantized FP8 checkpoint."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    shape = quantization.get("weight_block_size")
    return (shape[0], shape[1]) if quantization.get("quant_method") == "fp8" and shape else None


def _experts_fit(share: int, tensor_parallel: int, block: tuple[int, int], hidden_size: int) -> bool:
    rows, columns = block
    if share % rows == 0 and (tensor_parallel == 1 or share % columns == 0):
        return True
    return math.gcd(rows, columns, share, hidden_size) >= SMALLEST_QUANTIZATION_BLOCK
