"""The arithmetic of benchmarks/table21.py; the program itself is the evidence, and takes three quarters of an hour."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def table21() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table21", ROOT / "benchmarks" / "table21.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["table21"] = module  # where its dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def test_a_token_is_multiplied_with_the_experts_it_visits(table21: ModuleType) -> None:
    """The testbed's teacher by hand: 4 layers, width 128, 4 + 2 + 2 heads of 32, 2 of 8 experts of 64, 23 tokens."""
    size = table21.Size.of(ROOT / "s2w" / "testbed" / "checkpoint" / "teacher")
    attention = 128 * 32 * (4 + 2 + 2) + 4 * 32 * 128
    experts = 2 * 3 * 128 * 64 + 128 * 8
    vocabulary = size.parameters - 4 * (attention + experts)
    assert vocabulary % 128 == 0 and vocabulary // 128 in range(20, 30)
    assert size.attention == 4 * 4 * 32
    # 10 tokens in sequences of 6, of which the mean token sees half.
    assert size.forward(10, 6.0) == 10 * (2 * size.parameters + 4 * size.attention * 3)


def test_intervals_hold_what_differs_between_seeds(table21: ModuleType) -> None:
    assert table21.interval([[0.5] * 8] * 3) == [0.5, 0.5, 0.5]
    # Problems agree and seeds differ: the interval runs from one seed to the other.
    assert table21.interval([[0.0] * 8, [1.0] * 8]) == [0.5, 0.0, 1.0]
    # Seeds agree and problems differ: the standard error of 24 problems is 0.1.
    value, low, high = table21.interval([[0.0, 1.0] * 4] * 3)
    assert value == 0.5 and low == pytest.approx(0.5 - 1.96 * 0.102, abs=0.02) and high == pytest.approx(1 - low)


def test_cpu_time_between_the_first_and_the_last_step(table21: ModuleType, tmp_path: Path) -> None:
    """Start-up does not count; the first step, with which it ends, counts as a mean one."""
    clock = table21.CpuClock(tmp_path)
    steps = [0, 0, 1, 1, 2, 3, 4, 4]
    spent = [9.0, 30.0, 40.0, 41.0, 50.0, 60.0, 70.0, 75.0]
    clock.looks = [({"on_policy": n}, {"learn": s}) for n, s in zip(steps, spent, strict=True)]
    # Three steps in 30 s, so four in 40 s; what follows the last step is not a step.
    assert clock.seconds("on_policy") == {"learn": pytest.approx(40.0)}
    assert np.isclose(sum(clock.seconds("off_policy").values()), 0)


def test_what_the_documents_say_of_the_arms_is_in_the_figures() -> None:
    """README.md and docs/table21.md: where distillation is ahead in every seed, and where it is not."""
    arms = json.loads((ROOT / "docs" / "table21.json").read_text())["arms"]

    def by_seed(arm: str, mode: str, score: str) -> np.ndarray:
        return np.array(arms[arm][mode][f"{score}_by_seed"])

    for mode, score in (("think", "pass1"), ("no_think", "pass64")):
        for other in ("grpo", "more_off_policy"):
            assert (by_seed("on_policy", mode, score) > by_seed(other, mode, score)).all()
    level = by_seed("on_policy", "think", "pass64") == by_seed("grpo", "think", "pass64")
    assert level.tolist() == [True, False, True]
    ahead = by_seed("grpo", "no_think", "pass1") > by_seed("on_policy", "no_think", "pass1")
    assert ahead.tolist() == [False, False, True]
    costs = {arm: (arms[arm]["flops"], arms[arm]["core_seconds"]) for arm in ("on_policy", "grpo", "more_off_policy")}
    assert min(costs.values()) == costs["on_policy"] == tuple(map(min, zip(*costs.values(), strict=True)))


def test_the_table_by_seed_is_that_of_the_figures() -> None:
    arms = json.loads((ROOT / "docs" / "table21.json").read_text())["arms"]
    text = (ROOT / "docs" / "table21.md").read_text()
    columns = (("think", "pass1"), ("think", "pass64"), ("no_think", "pass64"))
    for label, arm in (
        ("off-policy", "off_policy"),
        ("+ on-policy distillation", "on_policy"),
        ("+ GRPO", "grpo"),
        ("+ more off-policy", "more_off_policy"),
    ):
        cells = [", ".join(f"{value:.3f}" for value in arms[arm][mode][f"{score}_by_seed"]) for mode, score in columns]
        assert f"| {label} | {' | '.join(cells)} |" in text
