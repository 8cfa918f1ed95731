"""Advantages of verified rewards."""

from __future__ import annotations

import numpy as np
import pytest

from s2w.eval.grading import Graded
from s2w.objectives.advantages import group_advantages, with_advantages
from s2w.objectives.distillation import Distillation
from s2w.records import Mode, Prompt, Rollout, Scored, VersionSpan


def prompt(uid: str, mode: Mode = "think", seed: int = 0) -> Prompt:
    messages = ({"role": "user", "content": f"question {uid}"},)
    return Prompt(uid, messages, np.zeros(2, np.int32), mode, seed, task="exact_match", answer="1")


def sample(of: Prompt, index: int, *, written: bool = True) -> Scored:
    spans = (VersionSpan(0, 3, 0),) if written else ()
    return Scored(Rollout(of, index, np.zeros(3, np.int32), np.zeros(3, np.float32), spans, "stop", 0, 0.0, 1.0), None)


def grade(of: Prompt, correct: bool) -> Graded:
    return Graded(of.uid, of.task, of.mode, correct, adherent=True, truncated=False, forced=False, tokens=3)


def test_advantages_by_hand() -> None:
    rewards, groups = [1, 0, 0, 1, 1, 1, 0], ["a", "a", "a", "a", "b", "b", "c"]
    got = group_advantages(rewards, groups, normalize=True)
    # a: mean 0.5, deviation 0.5; b: all right; c: alone.
    np.testing.assert_allclose(got, [1, -1, -1, 1, 0, 0, 0])
    np.testing.assert_allclose(group_advantages(rewards, groups, normalize=False), [0.5, -0.5, -0.5, 0.5, 0, 0, 0])


@pytest.mark.parametrize("right", range(1, 8))
def test_normalised_advantages_have_mean_0_and_deviation_1(right: int) -> None:
    got = group_advantages([1.0] * right + [0.0] * (8 - right), [0] * 8, normalize=True)
    assert abs(got.mean()) < 1e-12 and abs(got.std() - 1) < 1e-12


def test_groups_are_uses_of_a_prompt_in_a_mode() -> None:
    """The same prompt in two modes, or twice in a batch (two epochs), is two groups."""
    prompts = [prompt("p"), prompt("p", "no_think"), prompt("p", seed=1)]
    samples = [sample(one, index) for one in prompts for index in range(2)]
    verdicts = [True, False, True, True, False, True]
    graded = [grade(one.rollout.prompt, correct) for one, correct in zip(samples, verdicts, strict=True)]
    credited = with_advantages(samples, graded, normalize=True)
    assert [one.advantage for one in credited] == [1, -1, 0, 0, -1, 1]


def test_teacher_responses_take_no_part() -> None:
    of = prompt("p")
    samples = [sample(of, 0), sample(of, 1), sample(of, 2, written=False)]
    credited = with_advantages(samples, [grade(of, True), grade(of, False), grade(of, True)], normalize=True)
    assert [one.advantage for one in credited] == [1, -1, 0]


def test_no_reward() -> None:
    of = prompt("p")
    credited = Distillation().credit([sample(of, 0), sample(of, 1)], [grade(of, True), grade(of, False)])
    assert [(one.advantage, one.weight) for one in credited] == [(0, 1), (0, 1)]
