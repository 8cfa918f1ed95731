"""Signals that reach a run at a known moment."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import pytest

from s2w.learner.group import LearnerGroup


def stop_during(patch: pytest.MonkeyPatch, method: str, number: int) -> None:
    """SIGTERM reaches this process while the learner's ranks are in their ``number``-th call of ``method``."""
    call, seen = LearnerGroup._call, 0

    async def stopped(self: LearnerGroup, name: str, each_rank: Callable[[Any, int], Any]) -> list[Any]:
        nonlocal seen
        seen += name == method
        if name == method and seen == number:
            # The calls go out before the loop comes to this.
            asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGTERM)
        return await call(self, name, each_rank)

    patch.setattr(LearnerGroup, "_call", stopped)
