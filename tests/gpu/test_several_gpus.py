"""Learner and engines on GPUs of their own: weights pass by NCCL. Each test says what it has shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_runs import check_swaps, train

TESTBED = [
    "experiment=testbed", "rollout.dtype=auto", "learner.dtype=auto", "off_policy.steps=0", "loop.steps=4",
    "loop.max_staleness=1",
]  # fmt: skip
ONE_GPU_TEACHER = ["teacher.tensor_parallel=1", "teacher.expert_parallel=false"]


@pytest.mark.gpus(3)
def test_a_swap_over_nccl(tmp_path: Path) -> None:
    """One engine, one rank; the teacher is there for the held-out divergence alone."""
    run = train(tmp_path / "run", *TESTBED, *ONE_GPU_TEACHER, "loss.objective=grpo", "loop.samples_per_prompt=4")
    check_swaps(run, "one engine and one rank over NCCL")


@pytest.mark.gpus(4)
def test_a_teacher_of_two_gpus(tmp_path: Path) -> None:
    """Tensor and expert parallel, its preflight, and the student's swap beside it."""
    run = train(tmp_path / "run", *TESTBED, "run.preflight=log_probs")
    check_swaps(run, "a teacher with tensor_parallel=2 and expert_parallel")


@pytest.mark.gpus(8)
def test_pools_and_sharded_weights(tmp_path: Path) -> None:
    """Two teachers, two engines of two GPUs, two ranks with sharded weights."""
    run = train(
        tmp_path / "run", *TESTBED, *ONE_GPU_TEACHER, "teacher.replicas=2", "rollout.engines=2",
        "rollout.tensor_parallel=2", "learner.ranks=2", "learner.zero_stage=3",
    )  # fmt: skip
    check_swaps(run, "two engines of two GPUs, ZeRO stage 3 on two ranks")
