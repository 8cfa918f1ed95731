"""Seconds by arithmetic, against the same arithmetic by hand."""

from __future__ import annotations

import pytest

from s2w.config.compose import compose
from s2w.config.schema import LearnerConfig, PlanConfig, RolloutConfig, TeacherConfig
from s2w.models.shapes import ModelShape, model_config, shape_of
from s2w.plan.duration import Rates, decoding, learning, scoring, swapping
from s2w.plan.workload import Workload, candidate_row_bytes, on_policy_step, signal_row_bytes

PLAN = PlanConfig(prefill_utilization=0.5, decode_utilization=0.5, learner_utilization=0.25, decode_overhead_ms=0.0)
RATES = Rates(flops=1e15, fp8_flops=2e15, memory=3e12)
WORK = Workload(prompts=64, samples=64, prompt_tokens=1000, response_tokens=1000)


@pytest.fixture(scope="module")
def dense() -> ModelShape:
    return shape_of(model_config("Qwen/Qwen3-8B"))


@pytest.fixture(scope="module")
def experts() -> ModelShape:
    return shape_of(model_config("Qwen/Qwen3-30B-A3B"))


def attention(shape: ModelShape, seen: float) -> float:
    """Operations of a token's attention that sees so many."""
    return 4.0 * len(shape.layers) * shape.query_width * seen


def test_scoring_is_a_prefill_in_which_samples_share_their_prompt(dense: ModelShape) -> None:
    teacher = TeacherConfig(model="m", tensor_parallel=2, replicas=2, max_batched_tokens=100_000)
    many = Workload(prompts=4, samples=64, prompt_tokens=1000, response_tokens=1000)
    seconds = scoring(dense, teacher, PLAN, RATES, many, head=False, itemsize=2)
    prompts = 4000 * (2 * dense.trunk + attention(dense, 500))
    responses = 64_000 * (2 * dense.trunk + attention(dense, 1500))
    assert seconds == pytest.approx((prompts + responses) / (4 * 0.5e15))
    head = scoring(dense, teacher, PLAN, RATES, many, head=True, itemsize=2)
    assert head - seconds == pytest.approx(2 * 151_936 * 4096 * 64_000 / (4 * 0.5e15))
    # Small chunks: the weights are read for each.
    small = TeacherConfig(model="m", max_batched_tokens=64)
    slow = scoring(dense, small, PLAN, RATES, many, head=False, itemsize=2)
    assert slow == pytest.approx(68_000 / 64 * 2 * dense.parameters / 1.5e12)


def test_decoding_reads_weights_and_cache_at_every_step(dense: ModelShape) -> None:
    seconds = decoding(dense, RolloutConfig(), PLAN, RATES, WORK, engines=8, held=64, longest=1000, itemsize=2)
    read = 2 * dense.parameters + 8 * 1500 * dense.kv_bytes(2)
    prefill = 8 * 1000 * (2 * dense.trunk + attention(dense, 500)) / 0.5e15
    assert seconds == pytest.approx(1000 * read / 1.5e12 + prefill)
    # Half of them fit the cache: twice as many steps.
    halves = decoding(dense, RolloutConfig(), PLAN, RATES, WORK, engines=8, held=4, longest=1000, itemsize=2)
    assert halves - prefill == pytest.approx(2000 * (2 * dense.parameters + 4 * 1500 * dense.kv_bytes(2)) / 1.5e12)
    # One long response holds all up.
    tail = decoding(dense, RolloutConfig(), PLAN, RATES, WORK, engines=8, held=64, longest=3000, itemsize=2)
    alone = 2000 * (2 * dense.parameters + 1500 * dense.kv_bytes(2)) / 1.5e12
    assert tail - seconds == pytest.approx(alone)
    # But not the next batch.
    ahead = decoding(dense, RolloutConfig(), PLAN, RATES, WORK, engines=8, held=64, longest=3000, itemsize=2, ahead=1)
    assert ahead - prefill == pytest.approx((tail - prefill) / 2)


def test_a_small_batch_reads_few_experts(experts: ModelShape) -> None:
    def step(batch: int) -> float:
        work = Workload(prompts=batch, samples=batch, prompt_tokens=1, response_tokens=1)
        return decoding(
            experts, RolloutConfig(), PLAN, RATES, work, engines=1, held=64, longest=1, itemsize=2
        ) * 1.5e12 / 2  # fmt: skip

    assert step(1) == pytest.approx(experts.active, rel=0.01)
    assert experts.parameters * 0.9 < step(64) < experts.parameters * 1.05


def test_an_update(dense: ModelShape) -> None:
    learner = LearnerConfig(ranks=4, tokens_per_micro_batch=16_000, zero_stage=3)
    found = learning(dense, learner, PLAN, RATES, WORK, teacher_width=4096, itemsize=2, one_node=False)
    passes = 3 * 128_000 * (2 * dense.trunk + attention(dense, 1000))
    head = 64_000 * (6 * 151_936 * 4096 + 2 * 151_936 * 4096)
    assert found.compute == pytest.approx((passes + head) / (4 * 0.25e15))
    # Two micro-batches of a rank: float32 gradients, and the weights for two passes.
    assert found.communication == pytest.approx(2 * (4 + 2 * 2) * dense.parameters / (50e9 * 0.6))
    assert found.optimizer == pytest.approx((8 + 16 + 4 + 2) * dense.parameters / 4 / 1.5e12)
    assert found.total == max(found.compute, found.communication) + found.optimizer
    alone = learning(
        dense, LearnerConfig(activation_checkpointing=True), PLAN, RATES, WORK,
        teacher_width=0, itemsize=2, one_node=True,
    )  # fmt: skip
    assert alone.communication == 0
    assert alone.compute == pytest.approx((passes * 4 / 3 + 64_000 * 6 * 151_936 * 4096) / 0.25e15)


def test_a_swap_is_one_broadcast(dense: ModelShape) -> None:
    between = swapping(dense, PLAN, itemsize=2, device="cuda", one_node=False)
    assert between == pytest.approx(0.5 + 2 * dense.parameters / (50e9 * 0.6))
    assert swapping(dense, PLAN, itemsize=2, device="cuda", one_node=True) < between


def test_bytes_of_a_step() -> None:
    config = compose(["experiment=smollm2", "loop.samples_per_prompt=4", "plan.response_tokens=50"])
    work = on_policy_step(config)
    assert (work.prompts, work.samples, work.rows, work.sequence) == (16, 64, 3200, 306)
    assert signal_row_bytes(config, 4096, "bfloat16") == 8192
    assert signal_row_bytes(config, 4096, "float32", sampled=True) == 16_388
    config.signal.dtype = "float8"
    assert signal_row_bytes(config, 4096, "bfloat16") == 4100
    config.signal.kind, config.signal.dtype = "ids", "auto"
    assert signal_row_bytes(config, 4096, "bfloat16") == 8 * 64 + 4 and candidate_row_bytes(config) == 256
