"""Grading of responses, with the verifier's process."""

from __future__ import annotations

from typing import Any

import numpy as np
from tiny_models import make_tokenizer

from s2w.eval.grading import Grader
from s2w.records import Mode, Prompt, Rollout, VersionSpan

TOKENIZER = make_tokenizer()
COUNTDOWN = {"question": "", "answer": "12", "metadata": {"numbers": [9, 9, 9], "target": 12}}
THOUGHT = "<think>\nlong\n</think>\n\nThe answer is 4."


def rollout(
    text: str,
    mode: Mode,
    task: str = "exact_match",
    finish: str = "stop",
    forced: tuple[tuple[int, int], ...] = (),
    answer: str | None = "4",
    metadata: dict[str, Any] | None = None,
) -> Rollout:
    ids = np.asarray([*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id], np.int32)
    prompt = Prompt(f"{task}/0", (), np.arange(3, dtype=np.int32), mode, 0, task, answer, metadata or {})
    zeros = np.zeros(len(ids), np.float32)
    return Rollout(prompt, 0, ids, zeros, (VersionSpan(0, len(ids), 0),), finish, 0, 0.0, 1.0, forced=forced)


def test_grades() -> None:
    cases = [
        (rollout(THOUGHT, "think"), True, True),
        (rollout("The answer is 4.", "no_think"), True, True),
        (rollout("The answer is 4.", "think"), True, False),
        (rollout(THOUGHT, "no_think"), True, False),
        (rollout("The answer is 5.", "no_think"), False, True),
        (rollout("<think>\nThe answer is 4", "think", finish="length"), False, False),
        (rollout("anything", "no_think", task="", answer=None), None, True),
        # Evaluating this never ends; the next answer is graded all the same.
        (rollout("9**9**9**9", "no_think", task="countdown", metadata={"entry": COUNTDOWN}), False, True),
        (rollout("4", "no_think"), True, True),
    ]
    with Grader(TOKENIZER) as grader:
        graded = grader.grade(one for one, _, _ in cases)
    for (one, correct, adherent), grade in zip(cases, graded, strict=True):
        assert (grade.correct, grade.adherent) == (correct, adherent), one
        assert grade.tokens == len(one.token_ids)
    assert [grade.truncated for grade in graded].index(True) == 5
    assert sum(grade.truncated for grade in graded) == 1
