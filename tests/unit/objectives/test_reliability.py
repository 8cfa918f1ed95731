"""Weights of prompts by how often the teacher was right."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from s2w.objectives.credit import Credit, prompt_key, reliability

from s2w.records import Mode, Prompt
from s2w.teacher_data.response import Response


def prompt(uid: str, mode: Mode = "think", seed: int = 0) -> Prompt:
    messages = ({"role": "user", "content": f"question {uid}"},)
    return Prompt(uid, messages, np.zeros(2, np.int32), mode, seed, task="exact_match", answer="1")


def response(of: Prompt, index: int) -> Response:
    return Response(of, index, np.zeros(3, np.int32), "1", "stop")


def test_reliability_weighs_prompts() -> None:
    good, mixed, bad, unknown = (prompt(name) for name in "gmbu")
    right = [response(good, 0), response(good, 1), response(mixed, 0)]
    wrong = [response(mixed, 1), response(mixed, 2), response(bad, 0)]
    shares = reliability(right, wrong)
    assert shares[prompt_key(mixed)] == pytest.approx(1 / 3)
    credit = Credit(None, shares, 0.25)
    # The weight knows the messages and the mode, not the uid: a file of responses has uids of its own.
    renamed = dataclasses.replace(mixed, uid="elsewhere/3")
    weights = [credit.weight(one) for one in (good, renamed, bad, unknown, prompt("b", "no_think"))]
    assert weights == pytest.approx([1, 0.25 + 0.75 / 3, 0.25, 1, 1])
