"""Where an actor runs: what the launch of a run hands down to those that create actors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from s2w.config.schema import RolloutConfig


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor runs; by default wherever Ray finds its resources."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Ray options that put it there."""
    spans_nodes: bool = False
    """It is an engine whose workers are on several nodes: Ray starts them, in the placement group of the actor."""


Places = Callable[[int], Place]
"""The place of the actor in a slot of a pool; asked for whenever one is created, so again after a death."""
Reserve = Callable[[str, RolloutConfig], AbstractAsyncContextManager[Places]]
"""Reserves places for a pool of engines that generate, of a name and with settings, as long as the context is open."""


def anywhere(slot: int) -> Place:
    """Wherever Ray finds the resources."""
    return Place()


@asynccontextmanager
async def nothing_reserved(name: str, settings: RolloutConfig) -> AsyncIterator[Places]:
    """Reserves nothing."""
    yield anywhere
