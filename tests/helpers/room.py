"""Whether a run fits a cluster."""

from __future__ import annotations

from s2w.config.schema import Config
from s2w.launch.demands import phases
from s2w.launch.placement import Node, place


def check_room(config: Config, device: str, nodes: int = 1, *, cpus: int, gpus: int = 0) -> None:
    """Places every phase on ``nodes`` equal nodes.

    Raises:
        DoesNotFitError: one has no place.
    """
    for phase in phases(config):
        place([Node(f"node{i}", gpus, cpus) for i in range(nodes)], phase.demands(config, device))
