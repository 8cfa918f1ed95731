"""How large a model is, from its configuration alone: parameters by kind, KV cache of a token.

The model is built on the meta device, which gives every parameter's name and shape and no weights. The configurations
of the recipes' models are in the package (``published.json``), so that these need no network.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from s2w.config.schema import StudentConfig
from s2w.errors import ConfigError
from s2w.models.checkpoint import resolve_path
from s2w.models.parallel import EXPERTS, quantization_block
from s2w.models.student import LAYER, evenly_spaced, fresh_config, pruned_config

PUBLISHED = Path(__file__).with_name("published.json")
"""Values of the published config.json files, by hub id."""
_KINDS = (
    ("experts", (".experts.",)),
    ("router", (".mlp.gate.", ".router.", "shared_expert_gate")),
    ("key_value", (".k_proj.", ".v_proj.", ".key.", ".value.", "kv_a_proj", "kv_b_proj")),
    ("attention", ("attn.", ".attention.")),
    ("mlp", ("mlp.", "feed_forward.", "ffn.")),
)
"""Parts of the names of a layer's matrices, by kind; the first that is found counts."""
_SHAPES: dict[str, ModelShape] = {}
"""Shapes so far, by the configuration's JSON."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Parameters of one layer; what is no matrix (norms, biases) is ``vectors``."""

    attention: int = 0
    """Query and output projections; fused projections of models that have such."""
    key_value: int = 0
    mlp: int = 0
    """Of every token: a dense MLP, shared experts."""
    experts: int = 0
    router: int = 0
    vectors: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a causal language model."""

    layers: tuple[Layer, ...]
    embedding: int
    head: int
    """0 where it is the embedding (tied)."""
    other: int
    """Parameters outside of the layers: the last norm."""
    hidden_size: int
    vocab_rows: int
    """Rows of embedding and head, padding included."""
    query_width: int
    """Attention heads times their size."""
    kv_heads: int
    kv_head_elements: int
    """Elements that the KV cache holds of a token for each head of each layer: key and value."""
    query_norms: bool
    """Queries and keys are normed."""
    mlp_width: int
    """Columns of an MLP that every token goes through, 0 where there is none."""
    experts: int
    experts_per_token: int
    expert_width: int
    largest_parameter: int
    """Elements of the largest parameter as transformers holds it (the experts of a layer are one)."""
    quantization_block: tuple[int, int] | None
    """FP8 checkpoints: rows and columns that share a scale."""
    context: int | None
    """Longest sequence that the configuration allows, tokens."""

    @property
    def parameters(self) -> int:
        return self.embedding + self.head + self.other + sum(layer.total for layer in self.layers)

    @property
    def trunk(self) -> int:
        """Parameters that a token's computation goes through, without embedding and head: of the experts those of
        one token."""
        share = self.experts_per_token / self.experts if self.experts else 0.0
        routed = sum(layer.experts for layer in self.layers)
        return self.other + sum(layer.total for layer in self.layers) - routed + round(routed * share)

    @property
    def active(self) -> int:
        """Parameters of the trunk, the embedding and the head: what model cards call activated."""
        return self.trunk + self.embedding + self.head

    @property
    def head_elements(self) -> int:
        """Elements of the output head, tied or not."""
        return self.head or self.embedding

    def kv_bytes(self, itemsize: int) -> int:
        """KV cache of a token in all layers."""
        return len(self.layers) * self.kv_heads * self.kv_head_elements * itemsize


def shape_of(config: PretrainedConfig) -> ModelShape:
    """The shape of the model that transformers builds from ``config``.

    Raises:
        ConfigError: transformers builds no causal language model from it.
    """
    text = config.get_text_config()
    key = text.to_json_string()
    if key not in _SHAPES:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(text)
        except (AttributeError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{config.model_type!r} gives no causal language model: {' '.join(str(error).split())}"
            ) from error
        _SHAPES[key] = _measure(model, text)
    return _SHAPES[key]


def _measure(model: PreTrainedModel, text: PretrainedConfig) -> ModelShape:
    # Modules give their parameters without a type.
    embedding: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings().weight
    counts: dict[int, dict[str, int]] = {}
    other = largest = 0
    for name, parameter in model.named_parameters():
        largest = max(largest, parameter.numel())
        if parameter is embedding or parameter is head:
            continue
        if match := LAYER.match(name):
            layer = counts.setdefault(int(match[2]), {})
            kind = _kind(f".{match[3]}", parameter.ndim)
            layer[kind] = layer.get(kind, 0) + parameter.numel()
        else:
            other += parameter.numel()
    heads, width = text.num_attention_heads, text.hidden_size
    head_size = getattr(text, "head_dim", None) or width // heads
    latent = getattr(text, "kv_lora_rank", None)
    experts = next((size for name in EXPERTS if (size := getattr(text, name, None))), 0)
    layers = tuple(Layer(**counts[index]) for index in sorted(counts))
    return ModelShape(
        layers=layers,
        embedding=embedding.numel(),
        head=0 if head is embedding else head.numel(),
        other=other,
        hidden_size=width,
        vocab_rows=len(embedding),
        query_width=heads * head_size,
        kv_heads=1 if latent else getattr(text, "num_key_value_heads", None) or heads,
        kv_head_elements=latent + text.qk_rope_head_dim if latent else 2 * head_size,
        query_norms=any("q_norm" in name for name, _ in model.named_parameters()),
        mlp_width=text.intermediate_size if any(layer.mlp for layer in layers) else 0,
        experts=experts,
        experts_per_token=getattr(text, "num_experts_per_tok", 0) if experts else 0,
        expert_width=(getattr(text, "moe_intermediate_size", None) or text.intermediate_size) if experts else 0,
        largest_parameter=largest,
        quantization_block=quantization_block(text),
        context=getattr(text, "max_position_embeddings", None),
    )


@functools.cache
def published() -> dict[str, dict[str, Any]]:
    """Configurations in the package, by hub id."""
    return json.loads(PUBLISHED.read_text())


def model_config(reference: str, revision: str | None = None) -> PretrainedConfig:
    """Configuration of a checkpoint: a directory, a model of the package, else a hub id.

    Raises:
        ConfigError: there is no such checkpoint, or its configuration cannot be read.
    """
    if not Path(reference).expanduser().is_dir() and revision is None and reference in published():
        values = dict(published()[reference])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    path = resolve_path(reference, revision)
    try:
        return AutoConfig.from_pretrained(path)
    except (StrictDataclassError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"Cannot read the configuration of {reference!r}: {reason}") from error


def student_config(student: StudentConfig) -> PretrainedConfig:
    """Configuration of the student's first weights, as :func:`s2w.models.student.materialise_student` makes them.

    Raises:
        ConfigError: as :func:`model_config`, or a setting of ``student`` does not fit the model.
    """
    config = model_config(student.model, student.revision)
    if student.init == "pruned" and student.keep_layers is not None:
        return pruned_config(config, evenly_spaced(config.num_hidden_layers, student.keep_layers))
    return fresh_config(config, student.overrides) if student.init == "fresh" else config


def quantized_bytes(elements: int, block: tuple[int, int]) -> int:
    """Bytes of FP8 weights with a float32 scale for each block."""
    return elements + 4 * math.ceil(elements / (block[0] * block[1]))


def _kind(name: str, dimensions: int) -> str:
    if dimensions < 2:
        return "vectors"
    return next((kind for kind, parts in _KINDS if any(part in name for part in parts)), "mlp")
