"""The nodes of a cluster: those that ``cluster.nodes`` describes, or those of the Ray cluster that answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import ray
from annotated_types import Ge, Gt
from ray._private.state import available_resources_per_node

from s2w.config.options import read_options
from s2w.config.schema import Config
from s2w.errors import ConfigError
from s2w.launch.cluster import connected
from s2w.launch.placement import Node
from s2w.plan.engine_memory import GIB

ACCELERATORS = {
    "A100": 40, "A100-40G": 40, "A100-80G": 79, "H100": 79, "H20": 96, "H200": 141, "B200": 180, "B300": 268,
    "GB200": 185, "L4": 24, "L40": 48, "L40S": 48, "A10G": 24, "V100": 16, "T4": 16,
}  # fmt: skip
"""GiB of memory by the accelerator type that Ray reports; the smaller one where a type has two. (CUDA gives a program
79.18 GiB of an H100 of 80 GB.)"""
STORE_SHARE, STORE_LIMIT = 0.3, 200 * 10**9
"""Ray's object store: this share of a node's memory, at most so many bytes."""


@dataclass
class NodeSettings:
    """An entry of ``cluster.nodes``."""

    count: Annotated[int, Ge(1)] = 1
    name: str = "node"
    """Where count is above 1, a number follows."""
    gpus: Annotated[int, Ge(0)] = 0
    gpu_memory_gib: Annotated[float, Gt(0)] | None = None
    cpus: Annotated[float, Gt(0)] | None = None
    memory_gib: Annotated[float, Gt(0)] | None = None
    shm_gib: Annotated[float, Gt(0)] | None = None
    object_store_gib: Annotated[float, Gt(0)] | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """A node with its memory; None where it is not known."""

    node: Node
    gpu_bytes: int
    """Of each of its GPUs; 0 without any."""
    memory: int | None = None
    """Bytes of the host."""
    shm: int | None = None
    """Bytes of /dev/shm."""
    object_store: int | None = None
    """Bytes of Ray's object store."""


def machines(config: Config) -> tuple[list[Machine], str]:
    """The cluster's nodes, and ``cuda`` or ``cpu``.

    Raises:
        ConfigError: an entry of ``cluster.nodes`` is not understood, no cluster answers, or a GPU's memory is unknown.
    """
    if config.cluster.nodes:
        found = []
        for index, entry in enumerate(config.cluster.nodes):
            settings = read_options(NodeSettings(), entry, f"cluster.nodes[{index}].")
            for copy in range(settings.count):
                found.append(_described(settings, copy, config.plan.gpu_memory_gib, index))
        names = [machine.node.name for machine in found]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"cluster.nodes has two nodes called {twice!r}: give each entry a name of its own")
        gpus = any(machine.node.gpus for machine in found)
        if config.cluster.device == "cuda" and not gpus:
            raise ConfigError("cluster.device=cuda, but cluster.nodes has no GPUs: write gpus: 8")
        return found, "cuda" if gpus and config.cluster.device != "cpu" else "cpu"
    with connected(config.cluster) as (device, _):
        free = available_resources_per_node()
        return [
            _of_ray(node, free.get(node["NodeID"], {}), config.plan.gpu_memory_gib) for node in _living_nodes()
        ], device


def ray_nodes(*, free: bool) -> list[Node]:
    """The nodes of the cluster that this process has joined: with all that they have, or what is ``free``."""
    left = available_resources_per_node()
    return [_node(node, left.get(node["NodeID"], {}) if free else node["Resources"]) for node in _living_nodes()]


def _living_nodes() -> list[dict[str, Any]]:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return sorted(nodes, key=lambda node: (node["NodeManagerAddress"], node["NodeID"]))


def _node(node: dict[str, Any], resources: dict[str, float]) -> Node:
    name = f"{node['NodeManagerAddress']} {node['NodeID'][:6]}"
    gpus = int(resources.get("GPU", 0))
    taken = int(node["Resources"].get("GPU", 0)) - gpus
    return Node(name, gpus, resources.get("CPU", 0.0), node["NodeID"], taken)


def _described(settings: NodeSettings, copy: int, gpu_memory_gib: float | None, index: int) -> Machine:
    gpu_memory = settings.gpu_memory_gib or gpu_memory_gib
    if settings.gpus and gpu_memory is None:
        raise ConfigError(
            f"cluster.nodes[{index}] has GPUs of unknown memory: add gpu_memory_gib: 80, or what they have"
        )
    memory = _bytes(settings.memory_gib)
    store = _bytes(settings.object_store_gib)
    if store is None and memory is not None:
        store = default_object_store(memory)
    return Machine(
        Node(
            f"{settings.name}{copy}" if settings.count > 1 else settings.name, settings.gpus, settings.cpus or math.inf
        ),
        int((gpu_memory or 0) * GIB) if settings.gpus else 0,
        memory,
        _bytes(settings.shm_gib),
        store,
    )


def _of_ray(node: dict[str, Any], free: dict[str, float], gpu_memory_gib: float | None) -> Machine:
    """A node with what no other job has taken."""
    resources, found = node["Resources"], _node(node, free)
    name, gpus = found.name, found.gpus
    memory: float | None = gpu_memory_gib
    if gpus and memory is None:
        types = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
        memory = next((float(ACCELERATORS[name]) for name in types if name in ACCELERATORS), None)
        if memory is None:
            raise ConfigError(
                f"node {name} has GPUs of unknown memory ({', '.join(types) or 'no accelerator type'}): write "
                "plan.gpu_memory_gib=80, or what they have"
            )
    store = int(resources.get("object_store_memory", 0))
    return Machine(
        found,
        int((memory or 0) * GIB) if gpus else 0,
        # Ray's memory is what is left beside the object store.
        int(resources.get("memory", 0)) + store or None,
        None,
        store or None,
    )


def default_object_store(memory: int) -> int:
    """Bytes that Ray gives its object store on a node of ``memory`` bytes, unless it is told otherwise."""
    return min(int(STORE_SHARE * memory), STORE_LIMIT)


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * GIB)
