"""Responses of a teacher, made of characters, and the settings of a run that trains on such."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from changed_settings import changed

from s2w.config.compose import compose
from s2w.config.schema import Config
from s2w.records import Mode, Prompt
from s2w.teacher_data.response import Response


def response(
    text: str, question: str = "1+1?", mode: Mode = "no_think", sample: int = 0, finish: str = "stop", task: str = ""
) -> Response:
    """One character, one token."""
    ids = np.array([ord(c) for c in text], np.int32)
    prompt_ids = np.array([ord(c) for c in question], np.int32)
    messages = ({"role": "user", "content": question},)
    prompt = Prompt(f"q/{question}", messages, prompt_ids, mode, 0, task, "2" if task else None)
    return Response(prompt, sample, ids, text, finish)


def settings(checkpoint: str, run: Path, *overrides: str) -> Config:
    return changed(_base(), f"teacher.model={checkpoint}", f"student.model={checkpoint}", f"run.dir={run}", *overrides)


@functools.cache
def _base() -> Config:
    return compose(
        [
            "teacher.model=x", "student.model=x", "data.tasks=[chain_sum]", "data.train_prompts=4",
            "data.heldout_prompts=2", "cluster.device=cpu", "off_policy.steps=1",
        ]
    )  # fmt: skip
