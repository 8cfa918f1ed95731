"""Prompts whose answers can be verified."""

from __future__ import annotations

from typing import Any

import numpy as np

from s2w.records import Prompt


def prompt(task: str, answer: str | None, **metadata: Any) -> Prompt:
    return Prompt(f"{task}/train/0", (), np.zeros(1, np.int32), "no_think", 0, task, answer, metadata)
