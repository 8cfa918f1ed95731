"""Weights of prompts by how often the teacher was right."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from s2w.objectives.reliability import Reliability, prompt_key, reliability
from s2w.records import Mode, Prompt, Rollout, Scored, VersionSpan


def prompt(uid: str, mode: Mode = "think", seed: int = 0) -> Prompt:
    messages = ({"role": "user", "content": f"question {uid}"},)
    return Prompt(uid, messages, np.zeros(2, np.int32), mode, seed, task="exact_match", answer="1")


def sample(of: Prompt, weight: float) -> Scored:
    ids, spans = np.zeros(3, np.int32), (VersionSpan(0, 3, 0),)
    rollout = Rollout(of, 0, ids, np.zeros(3, np.float32), spans, "stop", 0, 0.0, 1.0)
    return Scored(rollout, None, weight=weight)


def test_reliability_weighs_prompts() -> None:
    good, mixed, bad, unknown = (prompt(name) for name in "gmbu")
    shares = reliability([good, good, mixed], [mixed, mixed, bad])
    assert shares[prompt_key(mixed)] == pytest.approx(1 / 3)
    trust = Reliability(shares, 0.25)
    # The weight knows the messages and the mode, not the uid: a file of responses has uids of its own.
    renamed = dataclasses.replace(mixed, uid="elsewhere/3")
    weights = [trust.weight(one) for one in (good, renamed, bad, unknown, prompt("b", "no_think"))]
    assert weights == pytest.approx([1, 0.25 + 0.75 / 3, 0.25, 1, 1])
    # They multiply what the objective has made of a sample.
    applied = trust.apply([sample(good, 1.0), sample(mixed, 0.5), sample(bad, 0.0)])
    assert [one.weight for one in applied] == pytest.approx([1, 0.5 * (0.25 + 0.75 / 3), 0])
