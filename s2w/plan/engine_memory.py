"""Memory of a vLLM engine by part, for each of its GPUs or, on the CPU, for all of its processes; docs/plan.md has the
rules and their sources."""

from __future__ import annotations

import math
from dataclasses import dataclass

from s2w.config.schema import RolloutConfig, TeacherConfig
from s2w.models.logits import LOGITS_BYTES
from s2w.models.parallel import VOCABULARY_BLOCK
from s2w.models.shapes import Layer, ModelShape, quantized_bytes
from s2w.weights.transfer import BUCKET_BYTES

GIB = 2**30
CONTEXT_BYTES = round(0.75 * GIB)
"""CUDA context, kernels and libraries of a process on a GPU."""
COMMUNICATOR_BYTES = round(0.75 * GIB)
"""NCCL's and vLLM's buffers on a GPU that works together with others."""
GRAPH_BYTES = GIB // 4096
"""CUDA graphs of one layer for one batch size."""
DEFAULT_BATCHED_TOKENS = 2048
"""vLLM's own, of an engine that is given none."""
KV_BLOCK = 16
"""Tokens of a block of vLLM's KV cache on GPUs."""
CPU_ACTOR_BYTES = 530 * 10**6
"""CPU: the actor of an engine: Python, Ray, torch, vLLM's front end."""
CPU_CORE_BYTES = 490 * 10**6
"""CPU: the process of vLLM's engine core where the workers have their own."""
CPU_WORKER_BYTES = 560 * 10**6
"""CPU: a worker process beside weights and KV cache."""
CPU_CORE_AND_WORKER_BYTES = 720 * 10**6
"""CPU: the engine core of a single worker, which is part of it."""


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes of the fullest of an engine's GPUs; on the CPU of the whole engine."""

    parts: dict[str, int]
    """What vLLM accounts for, by part. On a GPU they fill ``share``."""
    beside: dict[str, int]
    """GPU: what comes on top, out of the memory that vLLM leaves free."""
    share: int
    """Bytes that vLLM takes; CPU: the parts."""
    kv_token: int
    """KV cache of one token."""

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + sum(self.beside.values())

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds; negative where the other parts leave it no room."""
        return self.parts["KV cache"] // self.kv_token

    def sequences(self, tokens: int) -> int:
        """Sequences of ``tokens`` that the KV cache holds at once."""
        return max(0, self.kv_tokens // (math.ceil(tokens / KV_BLOCK) * KV_BLOCK))


def engine_memory(
    shape: ModelShape,
    engine: TeacherConfig | RolloutConfig,
    *,
    device: str,
    itemsize: int,
    max_model_len: int,
    gpu_bytes: int = 0,
    swapped: bool = False,
) -> EngineMemory:
    """Memory of an engine with the model ``shape``.

    Args:
        device: cuda or cpu.
        itemsize: bytes of a number in the engine's dtype.
        max_model_len: longest sequence, tokens.
        gpu_bytes: memory of the GPU that the engine reserves; cuda only.
        swapped: the engine receives new weights.
    """
    tensor, scores = engine.tensor_parallel, isinstance(engine, TeacherConfig)
    stages = stage_layers(len(shape.layers), engine.pipeline_parallel)
    world = tensor * engine.pipeline_parallel
    heads = max(1, math.ceil(shape.kv_heads / tensor))
    if device == "cpu":
        weights = sum(_stage_weights(shape, engine, itemsize, stage) for stage in range(len(stages))) * tensor
        several = CPU_CORE_BYTES + CPU_WORKER_BYTES * world
        processes = CPU_ACTOR_BYTES + (several if world > 1 else CPU_CORE_AND_WORKER_BYTES)
        parts = {
            "weights": weights,
            "KV cache": engine.kv_cache_gib * GIB * world,
            "processes": processes,
        }
        per_token = len(shape.layers) * heads * tensor * shape.kv_head_elements * itemsize
        return EngineMemory(parts, {}, sum(parts.values()), per_token)

    fullest = max(range(len(stages)), key=lambda stage: _stage_weights(shape, engine, itemsize, stage))
    batched = max(engine.max_batched_tokens or DEFAULT_BATCHED_TOKENS, engine.max_sequences)
    share = int(engine.gpu_memory_utilization * gpu_bytes)
    parts = {
        "weights": _stage_weights(shape, engine, itemsize, fullest),
        "activations": batched * token_activations(shape, engine, itemsize),
        "logits": 3 * LOGITS_BYTES if scores else engine.max_sequences * shape.vocab_rows * (itemsize + 4 * 4),
        "CUDA graphs": 0 if engine.enforce_eager else GRAPH_BYTES * max(stages) * len(graph_sizes(engine, batched)),
        "context": CONTEXT_BYTES + (COMMUNICATOR_BYTES if world > 1 else 0),
    }
    parts["KV cache"] = share - sum(parts.values())
    beside: dict[str, int] = {}
    if scores:
        # Hidden states of one request at most wait on the device, and are joined there.
        beside["signals"] = 2 * max_model_len * shape.hidden_size * itemsize
    if swapped and engine.gpus == 1:  # Otherwise it maps memory of the learner.
        beside["weight transfer"] = 2 * max(BUCKET_BYTES, shape.head_elements * itemsize) + COMMUNICATOR_BYTES
    return EngineMemory(parts, beside, share, max(stages) * heads * shape.kv_head_elements * itemsize)


def engine_weights(shape: ModelShape, engine: TeacherConfig | RolloutConfig, itemsize: int) -> int:
    """Bytes of the weights on the fullest of the engine's GPUs."""
    return max(_stage_weights(shape, engine, itemsize, stage) for stage in range(engine.pipeline_parallel))


def stage_layers(layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage, as vLLM divides them: what is left over goes to the stages before the last."""
    counts = [layers // stages] * stages
    for place in range(2, layers % stages + 2):
        counts[-place] += 1
    return counts


def token_activations(shape: ModelShape, engine: TeacherConfig | RolloutConfig, itemsize: int) -> int:
    """Bytes of a token in a forward pass: the residual stream and the widest step of a layer."""
    tensor = engine.tensor_parallel
    kv_width = shape.kv_heads * shape.kv_head_elements
    steps = [2 * (shape.query_width + kv_width) / tensor, 3 * shape.mlp_width / tensor]
    if shape.experts:
        width = shape.expert_width if engine.expert_parallel else shape.expert_width / tensor
        steps.append(shape.experts_per_token * (3 * width + shape.hidden_size))
    return math.ceil((3 * shape.hidden_size + max(steps)) * itemsize)


def graph_sizes(engine: TeacherConfig | RolloutConfig, batched: int) -> list[int]:
    """Batch sizes for which vLLM captures CUDA graphs (``VllmConfig._set_cudagraph_sizes``)."""
    largest = min(2 * engine.max_sequences, 512, batched)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    return [size for size in sizes if size <= largest]


def _stage_weights(shape: ModelShape, engine: TeacherConfig | RolloutConfig, itemsize: int, stage: int) -> int:
    """Bytes of the weights on one GPU of a pipeline stage."""
    tensor, counts = engine.tensor_parallel, stage_layers(len(shape.layers), engine.pipeline_parallel)
    first = sum(counts[:stage])
    size = sum(_layer(layer, shape, engine, itemsize) for layer in shape.layers[first : first + counts[stage]])
    rows = math.ceil(shape.vocab_rows / VOCABULARY_BLOCK) * VOCABULARY_BLOCK // tensor
    table = rows * shape.hidden_size * itemsize
    last = stage == len(counts) - 1
    if stage == 0:
        size += table
    if last:
        size += shape.other * itemsize
        if shape.head or stage > 0:
            size += table
    return size


def _layer(layer: Layer, shape: ModelShape, engine: TeacherConfig | RolloutConfig, itemsize: int) -> int:
    tensor = engine.tensor_parallel
    experts = 0
    if layer.experts:
        # Whole experts, or a part of each: with a number of them that the ranks do not divide, some have one more.
        each = math.ceil(shape.experts / tensor) / shape.experts if engine.expert_parallel else 1 / tensor
        experts = math.ceil(layer.experts * each)
    split = [layer.attention // tensor, layer.key_value // min(tensor, shape.kv_heads), layer.mlp // tensor, experts]
    whole = (layer.router + layer.vectors) * itemsize
    if shape.quantization_block:
        return whole + sum(quantized_bytes(part, shape.quantization_block) for part in split)
    return whole + sum(split) * itemsize
