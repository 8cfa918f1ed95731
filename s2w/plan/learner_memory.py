"""Memory of a learner rank by part; :class:`s2w.learner.worker.LearnerRank` names the same parts, docs/plan.md has the
sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s2w.config.schema import LearnerConfig
from s2w.learner.deepspeed_settings import BUCKET_ELEMENTS
from s2w.models.shapes import Layer, ModelShape
from s2w.plan.engine_memory import COMMUNICATOR_BYTES, CONTEXT_BYTES

CPU_RANK_BYTES = 480 * 10**6
"""CPU: Python, Ray, torch, DeepSpeed."""
STAGE3_LIVE = 10**9
"""Parameters that DeepSpeed keeps gathered at ZeRO stage 3 (stage3_max_live_parameters)."""
GPU_LIMIT = 0.95
"""Share of a GPU that tensors may fill; the rest is lost between blocks of torch's allocator."""


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """The largest micro-batch of a rank."""

    tokens: int
    """Padding included."""
    sequence: int
    """Tokens of its longest sample, prompt and response."""
    rows: int
    """Response tokens."""
    chunk_rows: int
    """Rows of a [rows, vocabulary] buffer of the loss."""


def rank_memory(
    shape: ModelShape,
    learner: LearnerConfig,
    batch: LargestBatch,
    *,
    device: str,
    itemsize: int,
    heads: Sequence[int],
    signal_row: int,
    engine_itemsize: int,
) -> dict[str, int]:
    """Bytes by part, at the peak of a step of rank 0.

    Args:
        device: cuda or cpu.
        itemsize: bytes of a number in the dtype of the matrix products.
        heads: widths of the teachers whose heads the rank holds.
        signal_row: bytes of a response token's signal.
        engine_itemsize: bytes of a number in the engines' dtype: of the swap's segment (CPU, or a shared GPU).
    """
    count, ranks, stage = shape.parameters, learner.ranks, learner.zero_stage
    mixed = itemsize < 4
    sharded = {name: ranks if stage >= first else 1 for name, first in SHARDED_FROM.items()}
    parts = {
        "weights": itemsize * count // sharded["weights"],
        "master copy": 4 * count // sharded["optimizer"] if stage else 0,
        "moments": 8 * count // sharded["optimizer"],
        "gradients": (4 if mixed or stage else itemsize) * count // sharded["gradients"],
    }
    if stage == 0:
        parts["flat copy of gradients"] = itemsize * count
    if stage == 3:
        parts["gathered weights"] = itemsize * min(count, max(STAGE3_LIVE, shape.largest_parameter))
    parts |= {
        "teacher heads": sum(itemsize * shape.vocab_rows * width for width in heads),
        "process": CPU_RANK_BYTES
        if device == "cpu"
        else CONTEXT_BYTES + (COMMUNICATOR_BYTES if ranks > 1 else 0) + COMMUNICATOR_BYTES,
    }
    if device == "cpu" or learner.gpus < 1:
        parts["swap segment"] = engine_itemsize * count
    if device == "cuda":
        parts["signals"] = batch.rows * signal_row
    # The two moments at which a rank holds the most: in the loss, and when the last gradients leave.
    loss = _in_loss(shape, learner, batch, device, itemsize, bool(heads))
    reduction = _in_reduction(shape, device, itemsize, stage)
    return parts | max(loss, reduction, key=lambda moment: sum(moment.values()))


SHARDED_FROM = {"optimizer": 1, "gradients": 2, "weights": 3}
"""ZeRO stage from which a rank has only its share (arXiv 1910.02054)."""


def layer_activations(shape: ModelShape, layer: Layer, itemsize: int) -> int:
    """Bytes that autograd keeps of one token for the backward pass of a layer, in transformers' implementation.

    Two norms, each with its input in float32; queries, keys and values, and queries and keys before such norms of their
    own; attention without its matrix of scores; an MLP's gate, up, activation and product, or those of the experts of
    a token and what is sent to them.
    """
    size, width = itemsize, shape.hidden_size
    kv_width = shape.kv_heads * shape.kv_head_elements // 2
    norms = 2 * (4 + 2 * size) * width
    attention = (2 * size + (4 + 2 * size if shape.query_norms else 0)) * (shape.query_width + kv_width)
    if layer.experts:
        routed = shape.experts_per_token * size * (2 * width + 5 * shape.expert_width)
        return norms + attention + routed + (4 * size * shape.mlp_width if layer.mlp else 0)
    return norms + attention + 4 * size * shape.mlp_width


def _in_loss(
    shape: ModelShape, learner: LearnerConfig, batch: LargestBatch, device: str, itemsize: int, teacher: bool
) -> dict[str, int]:
    tokens, rows = batch.tokens, batch.rows
    layers = [tokens * layer_activations(shape, layer, itemsize) for layer in shape.layers]
    if learner.activation_checkpointing:
        # A layer's input each; one layer is computed again, and has its gradients.
        activations = len(layers) * tokens * shape.hidden_size * itemsize + 2 * max(layers)
    else:
        activations = sum(layers) + max(layers)
    if learner.attention == "eager":
        scores = shape.query_width // (shape.kv_head_elements // 2) * batch.sequence**2 * (tokens // batch.sequence)
        activations += scores * (4 + itemsize) * (1 if learner.activation_checkpointing else len(layers))
    products = 1 + teacher
    # CPU: products in the model's dtype, the gradient in the student's own buffer. GPU: float32 products, the gradient
    # in float32 out of the fused step, and its copy in the model's dtype.
    element = itemsize * products if device == "cpu" else 4 * products + 4 + itemsize
    return {
        "activations": activations,
        "loss": min(batch.chunk_rows, rows) * shape.vocab_rows * element + 3 * rows * shape.hidden_size * itemsize,
        "head gradient": (4 + itemsize) * shape.head_elements,
    }


def _in_reduction(shape: ModelShape, device: str, itemsize: int, stage: int) -> dict[str, int]:
    # Two buckets where communication overlaps with the backward pass.
    buckets = 2 if device == "cuda" and stage >= 2 else 1
    return {
        "head gradient": itemsize * shape.head_elements * (1 if shape.head else 2),
        "reduction": (4 + itemsize) * shape.largest_parameter + 8 * buckets * BUCKET_ELEMENTS[device],
    }
