"""What ``s2w plan`` finds, as objects and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s2w.launch.nodes import Machine
from s2w.launch.placement import Node, Placement
from s2w.launch.sizing import HostMemory, SizedPhase
from s2w.plan.engine_memory import GIB

REPORT_GPU_HOURS = 1800
"""Qwen3 Technical Report, table 21: on-policy distillation of Qwen3-8B."""


@dataclass(frozen=True, slots=True)
class PlannedPhase:
    """A phase with its place, its memory and its time."""

    sized: SizedPhase
    placement: Placement | None
    hosts: dict[str, HostMemory]
    stages: dict[str, float]
    """Seconds of each stage of a step, and of the ``step``; of the phase ``generate`` of all of it."""
    steps: int

    @property
    def name(self) -> str:
        return self.sized.phase.name

    @property
    def seconds(self) -> float:
        return self.steps * self.stages["step"]

    @property
    def gpu_hours(self) -> float:
        """Of the GPUs that the phase uses."""
        return self.seconds * (self.placement.gpus if self.placement else 0) / 3600

    @property
    def parts(self) -> dict[str, dict[str, int]]:
        """Bytes by actor and part: of an engine's fullest GPU, of the learner's rank 0."""
        found = {sized.engine.name: sized.memory.parts | sized.memory.beside for sized in self.sized.engines}
        if self.sized.learner is not None:
            found["learner"] = self.sized.learner.parts
        return found

    @property
    def bottleneck(self) -> str:
        """The stage that the step waits for longest."""
        return max((stage for stage in self.stages if stage != "step"), key=self.stages.__getitem__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``s2w plan`` found."""

    device: str
    machines: tuple[Machine, ...]
    phases: tuple[PlannedPhase, ...]
    problems: tuple[str, ...]
    """Why the run does not fit, a sentence each."""
    advice: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def gpu_hours(self) -> float:
        return sum(phase.gpu_hours for phase in self.phases)

    @property
    def cluster_hours(self) -> float:
        """GPU hours if the whole cluster is held from the first phase to the last."""
        return sum(phase.seconds for phase in self.phases) * sum(m.node.gpus for m in self.machines) / 3600

    def as_json(self) -> dict[str, Any]:
        """JSON values; docs/plan.md describes them."""
        main = self.phases[-1]
        store = {name: host.object_store / GIB for name, host in main.hosts.items()}
        parts = {name: parts for phase in self.phases for name, parts in phase.parts.items()}
        memory = {
            name: {part: size / GIB for part, size in found.items()} | {"total": sum(found.values()) / GIB}
            for name, found in parts.items()
        }
        return {
            "fits": not self.problems,
            "problems": list(self.problems),
            "advice": list(self.advice),
            "device": self.device,
            "nodes": [_node_json(machine.node, self.phases) for machine in self.machines],
            "gpu_memory_gib": memory if self.device == "cuda" else {},
            "process_memory_gib": memory if self.device == "cpu" else {},
            "kv_sequences": {
                sized.engine.name: sized.memory.sequences(sized.max_model_len)
                for phase in self.phases
                for sized in phase.sized.engines
            },
            "signal_bytes_per_step": main.sized.signal_bytes,
            "object_store_gib": {
                "step": main.sized.store_row * main.sized.work.rows / GIB,
                "at_once": main.sized.store_bytes / GIB,
                "nodes": store,
            },
            "host_memory_gib": {name: host.total / GIB for name, host in main.hosts.items()},
            "shm_gib": {name: host.shm / GIB for name, host in main.hosts.items()},
            "step_seconds": main.stages,
            "bottleneck": main.bottleneck,
            "phases": {
                phase.name: {
                    "steps": phase.steps,
                    "seconds": phase.seconds,
                    "gpus": phase.placement.gpus if phase.placement else 0,
                    "gpu_hours": phase.gpu_hours,
                    "stages": phase.stages,
                }
                for phase in self.phases
            },
            "gpu_hours": self.gpu_hours,
            "gpu_hours_of_cluster": self.cluster_hours,
            "report_gpu_hours": REPORT_GPU_HOURS,
            "assumptions": list(self.assumptions),
        }


def _node_json(node: Node, planned: Sequence[PlannedPhase]) -> dict[str, Any]:
    workers = {
        phase.name: [
            {"actor": placed.name, "rank": rank, "gpu": worker.gpu}
            for placed in (phase.placement.placed if phase.placement else ())
            for rank, worker in enumerate(placed.workers)
            if worker.node == node.name
        ]
        for phase in planned
    }
    return {"name": node.name, "gpus": node.gpus, "workers": workers}
