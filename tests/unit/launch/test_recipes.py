"""The recipes of the Qwen3 report: each fits the cluster that it names, and leaves none of its GPUs without work."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2w.config.compose import compose, config_directory
from s2w.launch.plan import make_plan

RECIPES = sorted(path.stem for path in (config_directory() / "experiment").glob("qwen3_*.yaml"))
STUDENTS = ("0_6b", "1_7b", "4b", "8b", "14b", "30b_a3b")


def test_every_student_has_both_teachers() -> None:
    assert sorted(f"qwen3_{student}_from_{teacher}" for student in STUDENTS for teacher in ("32b", "235b")) == RECIPES


@pytest.mark.parametrize("name", [*RECIPES, "one_gpu"])
def test_it_fits_the_cluster_it_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = compose([f"experiment={name}", f"data.path={tmp_path}/none.jsonl"])
    plan = make_plan(config)
    assert plan.problems == ()
    assert [phase.name for phase in plan.phases] == ["generate", "off-policy", "on-policy"]
    there = sum(machine.node.gpus for machine in plan.machines)
    for phase in (plan.phases[0], plan.phases[-1]):
        assert phase.placement is not None and phase.placement.gpus == there
    assert config.run.name == name
    rollout = next(sized for sized in plan.phases[-1].sized.engines if sized.engine.name == "rollout")
    # A cache that holds several of the longest responses, or generation is one response after the other.
    assert rollout.memory.sequences(rollout.max_model_len) >= 4
