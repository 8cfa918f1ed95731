"""How long the stages of a step take: operations and bytes over stated rates (``plan``).

docs/plan.md has the formulas and their sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from s2w.config.schema import LearnerConfig, PlanConfig, RolloutConfig, TeacherConfig
from s2w.models.shapes import ModelShape
from s2w.plan.engine_memory import DEFAULT_BATCHED_TOKENS, engine_weights
from s2w.plan.workload import Workload

GIGA, TERA = 1e9, 1e12
PEAKS = {"cuda": (989.0, 1979.0, 3350.0), "cpu": (0.43, 0.43, 20.0)}
"""By device: 10^12 operations per second in the models' dtype and in FP8, 10^9 bytes per second of memory. An H100
SXM's data sheet, without sparsity; a core with AVX512-BF16, measured."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one GPU (CPU: core) does per second, at its peak."""

    flops: float
    fp8_flops: float
    memory: float
    """Bytes."""

    @classmethod
    def of(cls, plan: PlanConfig, device: str) -> Rates:
        """The settings, or the device's own where they are null."""
        tflops, fp8_tflops, memory = PEAKS[device]
        return cls(
            (plan.peak_tflops or tflops) * TERA,
            (plan.peak_fp8_tflops or fp8_tflops) * TERA,
            (plan.memory_gb_per_s or memory) * GIGA,
        )

    def products(self, shape: ModelShape) -> float:
        """Operations per second in a model's own products."""
        return self.fp8_flops if shape.quantization_block else self.flops


def decoding(
    shape: ModelShape,
    engine: TeacherConfig | RolloutConfig,
    plan: PlanConfig,
    rates: Rates,
    work: Workload,
    *,
    engines: int,
    held: int,
    longest: int,
    itemsize: int,
    ahead: int = 0,
) -> float:
    """Seconds in which ``engines`` sample all responses of ``work``.

    Args:
        held: sequences that an engine's KV cache holds at once.
        longest: tokens of the longest response: no step is shorter than that many decoding steps.
        itemsize: bytes of a number in the engine's dtype.
        ahead: batches that are sampled at the same time besides; while one waits for its longest response, the
            engines work on the next.
    """
    share = math.ceil(work.samples / engines)
    batch = max(1, min(share, engine.max_sequences, held))
    steps = math.ceil(share / batch) * work.response_tokens
    context = work.prompt_tokens + work.response_tokens / 2

    def one(batch: int) -> float:
        # A worker of the first pipeline stage reads its weights once for all sequences, then the next does.
        weights = engine_weights(shape, engine, itemsize) * _read_share(shape, batch) * engine.pipeline_parallel
        cache = batch * context * shape.kv_bytes(itemsize) / min(engine.tensor_parallel, shape.kv_heads)
        memory = (weights + cache) / (rates.memory * plan.decode_utilization)
        operations = 2 * (shape.trunk + shape.head_elements) + 4 * len(shape.layers) * shape.query_width * context
        compute = batch * operations / engine.tensor_parallel / (rates.products(shape) * plan.prefill_utilization)
        return max(memory, compute) + plan.decode_overhead_ms / 1000

    together = steps * one(batch)
    whole = together + max(0, longest - steps) * one(1)
    prompts = _trunk_flops(shape, work.prompts / engines * work.prompt_tokens, work.prompt_tokens)
    prefill = prompts / (_world(engine) * rates.products(shape) * plan.prefill_utilization)
    return prefill + max(together, whole / (1 + ahead))


def scoring(
    shape: ModelShape,
    engine: TeacherConfig,
    plan: PlanConfig,
    rates: Rates,
    work: Workload,
    *,
    head: bool,
    itemsize: int,
) -> float:
    """Seconds in which the replicas of a teacher score ``work``; samples of a prompt share its prefix.

    Args:
        head: the teacher computes logits (signals other than ``hidden``).
    """
    tokens = work.rows + work.prompts * work.prompt_tokens
    operations = _trunk_flops(shape, work.rows, work.sequence + work.prompt_tokens)
    operations += _trunk_flops(shape, work.prompts * work.prompt_tokens, work.prompt_tokens)
    if head:
        operations += 2.0 * shape.head_elements * work.rows
    world = _world(engine) * engine.replicas
    compute = operations / (world * rates.products(shape) * plan.prefill_utilization)
    passes = tokens / engine.replicas / (engine.max_batched_tokens or DEFAULT_BATCHED_TOKENS)
    reading = engine_weights(shape, engine, itemsize) / (rates.memory * plan.decode_utilization)
    return max(compute, passes * reading)


@dataclass(frozen=True, slots=True)
class Learning:
    """Seconds of an update."""

    compute: float
    communication: float
    optimizer: float

    @property
    def total(self) -> float:
        """Communication overlaps with the passes, the optimizer with nothing."""
        return max(self.compute, self.communication) + self.optimizer


def learning(
    shape: ModelShape,
    learner: LearnerConfig,
    plan: PlanConfig,
    rates: Rates,
    work: Workload,
    *,
    teacher_width: int,
    itemsize: int,
    one_node: bool,
) -> Learning:
    """An update on ``work``.

    Args:
        teacher_width: hidden size of the teacher whose head the learner multiplies; 0 for none.
        itemsize: bytes of a number in the learner's dtype.
        one_node: all ranks are on one node.
    """
    tokens = work.samples * work.sequence
    passes = 4 if learner.activation_checkpointing else 3
    operations = passes * _trunk_flops(shape, tokens, work.sequence)
    operations += (6.0 * shape.head_elements + 2.0 * shape.vocab_rows * teacher_width) * work.rows
    compute = operations / (learner.ranks * rates.flops * plan.learner_utilization)
    micro_batches = math.ceil(tokens / learner.ranks / max(learner.tokens_per_micro_batch, work.sequence))
    communication = 0.0
    if learner.ranks > 1:
        # Gradients travel in float32 after each micro-batch (stage 0 and 1: twice, a reduction and a distribution);
        # at stage 3 the weights are gathered for each pass over them.
        moved = 4.0 * shape.parameters * (1 if learner.zero_stage >= 2 else 2)
        if learner.zero_stage == 3:
            moved += 2.0 * itemsize * shape.parameters
        link = (plan.node_gb_per_s if one_node else plan.network_gb_per_s) * GIGA * plan.network_utilization
        communication = micro_batches * moved / link
    # Master copy and moments are read and written, gradients read, weights written.
    state = (2 * 4 + 2 * 8 + 4 + itemsize) * shape.parameters / (learner.ranks if learner.zero_stage else 1)
    return Learning(compute, communication, state / (rates.memory * plan.decode_utilization))


def swapping(shape: ModelShape, plan: PlanConfig, *, itemsize: int, device: str, one_node: bool) -> float:
    """Seconds of a hot swap: rank 0 broadcasts all weights to all engines.

    Args:
        itemsize: bytes of a number in the engines' dtype.
        one_node: learner and engines are on one node.
    """
    size = itemsize * shape.parameters
    if device == "cpu":
        return plan.swap_pause_s + size / (PEAKS["cpu"][2] * GIGA)
    rate = plan.node_gb_per_s if one_node else plan.network_gb_per_s
    return plan.swap_pause_s + size / (rate * GIGA * plan.network_utilization)


def _trunk_flops(shape: ModelShape, tokens: float, sequence: float) -> float:
    """Operations of a forward pass over ``tokens`` in sequences of that many, without the head.

    Attention: a token sees half of its sequence on average, in scores and in values.
    """
    return tokens * (2.0 * shape.trunk + 4.0 * len(shape.layers) * shape.query_width * sequence / 2)


def _read_share(shape: ModelShape, batch: int) -> float:
    """Share of the weights that a decoding step reads: of the experts those that some token of the batch is sent to."""
    if not shape.experts:
        return 1.0
    routed = sum(layer.experts for layer in shape.layers)
    seen = 1 - (1 - shape.experts_per_token / shape.experts) ** batch
    return 1 - routed / shape.parameters * (1 - seen)


def _world(engine: TeacherConfig | RolloutConfig) -> int:
    return engine.tensor_parallel * engine.pipeline_parallel
