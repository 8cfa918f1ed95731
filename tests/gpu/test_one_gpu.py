"""Teacher, rollout engine and learner on one GPU: weights pass by CUDA IPC."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu_runs import check_swaps, make_published, train

from s2w.config.compose import compose
from s2w.launch.plan import make_plan

SHARED = ["teacher.gpus=0.3", "rollout.gpus=0.3", "learner.gpus=0.4"]
TESTBED = [
    "experiment=testbed", "teacher.tensor_parallel=1", "teacher.expert_parallel=false", "rollout.dtype=auto",
    "learner.dtype=auto", "off_policy.steps=0", "learner.threads=null", *SHARED,
]  # fmt: skip
GIB = 2**30


@pytest.mark.gpus(1)
@pytest.mark.parametrize(
    ("signal", "preflight"), [("hidden", "divergence"), ("topk", "log_probs"), ("ids", "none"), ("sampled", "none")]
)
def test_each_signal(signal: str, preflight: str, tmp_path: Path) -> None:
    """Weights swapped by CUDA IPC are the learner's (the probe), the teacher's signals are its model's (preflight)."""
    extra = [] if signal == "hidden" else [f"signal={{kind: {signal}, top_k: 8}}"]
    extra += ["rollout.top_k=8"] if signal == "ids" else []
    extra += ["loss.divergence=reverse_kl"] if signal == "sampled" else []
    run = train(tmp_path / "run", *TESTBED, *extra, f"run.preflight={preflight}", "loop.steps=4")
    check_swaps(run, f"{signal}, preflight={preflight}")


@pytest.mark.gpus(1)
def test_the_testbed_learns(tmp_path: Path) -> None:
    """Both phases: the held-out divergence falls."""
    run = train(
        tmp_path / "run",
        *TESTBED,
        "off_policy.steps=100",
        "loop.steps=20",
        "loop.max_staleness=1",
        "loop.eval_every=10",
    )
    before, after = (run.summary["heldout"][moment]["reverse_kl"] for moment in ("before", "after"))
    print(f"held-out reverse KL {before:.4f} before and {after:.4f} after 20 on-policy steps")
    print(json.dumps(run.summary))
    assert after < 0.8 * before


@pytest.mark.gpus(1)
def test_real_shapes_take_what_the_plan_says(tmp_path: Path) -> None:
    """experiment=one_gpu with random weights of the shapes of Qwen3-4B and Qwen3-0.6B."""
    teacher = make_published(tmp_path / "teacher", "Qwen/Qwen3-4B")
    student = make_published(tmp_path / "student", "Qwen/Qwen3-0.6B")
    overrides = [
        "experiment=one_gpu", f"teacher.model={teacher}", f"student.model={student}", "data.tasks=[chain_sum]",
        "off_policy.steps=0", "rollout.max_tokens=1024", "data.max_prompt_tokens=512", "loop.steps=5",
        "loop.eval_every=0", "loop.checkpoint_every=0", "loop.prompts_per_step=32", "data.heldout_prompts=8",
        "plan.prompt_tokens=300", "plan.response_tokens=1024", "cluster.log_to_driver=true",
    ]  # fmt: skip
    run = train(tmp_path / "run", *overrides)
    phase = make_plan(compose(overrides)).phases[-1]
    planned = {name: sum(parts.values()) for name, parts in phase.parts.items()}
    for line in run.lines:
        print(json.dumps(line))
    for name, parts in phase.parts.items():
        print(
            f"{name}: planned {planned[name] / GIB:.2f} GiB, held {run.gpu_bytes[name] / GIB:.2f} GiB",
            {part: round(size / GIB, 2) for part, size in parts.items()},
        )
    print("planned seconds of a step:", phase.sized and phase.seconds)
    assert run.gpu_bytes == pytest.approx(planned, rel=0.15)
