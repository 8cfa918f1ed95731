"""Which worker runs on which node and GPU: a plan made from nodes and demands alone, before anything starts.

What must be together is placed first, largest first. An engine's workers are on one node; an engine that is larger than
a node takes whole nodes, with the ranks of a tensor-parallel group together. The learner's ranks are on as few nodes as
possible, in order, so that neighbours in the ring share a node. Of the nodes where something fits, the one with
the least room left over takes it. The same nodes and demands give the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from s2w.errors import ConfigError

EPSILON = 1e-6
"""Rounding of sums of shares of a GPU."""
NODE_ID = "ray.io/node-id"
"""Ray's label of a node with its id."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster."""

    name: str
    gpus: int
    cpus: float = math.inf
    node_id: str | None = None
    """Ray's; None for a node that is only described."""
    taken: int = 0
    """Further GPUs, which other jobs have."""

    @property
    def size(self) -> int:
        """All of its GPUs."""
        return self.gpus + self.taken


@dataclass(frozen=True, slots=True)
class Demand:
    """Actors of one kind that a phase starts."""

    name: str
    """``teacher``, ``rollout``, ``learner``."""
    kind: Literal["engine", "ranks"]
    workers: int
    """Processes of one of them: of an engine tensor times pipeline parallel, of the learner its ranks."""
    copies: int = 1
    """How many there are."""
    cpus: float = 0.0
    """CPUs of an engine, or of each rank."""
    gpus: float = 1.0
    """Share of a GPU of each worker; 0 on the CPU."""
    together: int = 1
    """Engines: workers that must be on one node (tensor parallel), where all do not fit one."""
    setting: str = ""
    """The setting that makes an engine smaller, for messages."""

    @property
    def total_gpus(self) -> float:
        return self.workers * self.copies * self.gpus

    @property
    def total_cpus(self) -> float:
        return self.copies * self.cpus * (self.workers if self.kind == "ranks" else 1)


@dataclass(frozen=True, slots=True)
class Worker:
    """A process with its place."""

    node: str
    gpu: int | None
    """Index on the node; None on the CPU."""


@dataclass(frozen=True, slots=True)
class Placed:
    """An engine, or the learner, with a place for each of its workers."""

    demand: Demand
    copy: int
    workers: tuple[Worker, ...]
    """In the order of the ranks."""

    @property
    def name(self) -> str:
        return f"{self.demand.name} {self.copy}" if self.demand.copies > 1 else self.demand.name

    @property
    def nodes(self) -> tuple[str, ...]:
        """Its nodes, in the order of the ranks."""
        return tuple(dict.fromkeys(worker.node for worker in self.workers))


@dataclass(frozen=True, slots=True)
class Placement:
    """A place for everything that a phase starts."""

    nodes: tuple[Node, ...]
    placed: tuple[Placed, ...]

    def of(self, name: str) -> list[Placed]:
        """What was placed of the demand ``name``."""
        return [placed for placed in self.placed if placed.demand.name == name]

    @property
    def gpus(self) -> int:
        """GPUs that something runs on."""
        used = {(worker.node, worker.gpu) for placed in self.placed for worker in placed.workers}
        return sum(gpu is not None for _, gpu in used)


class DoesNotFitError(ConfigError):
    """The cluster has no room for the demands; the message has the numbers, and the table of what is free."""


@dataclass
class _Free:
    """What is left of a node."""

    node: Node
    index: int
    cpus: float
    gpus: list[float] = field(default_factory=list)

    def usable(self, share: float) -> list[int]:
        """GPUs with room for ``share``, the fullest first."""
        found = [gpu for gpu, free in enumerate(self.gpus) if free >= share - EPSILON]
        return sorted(found, key=lambda gpu: (self.gpus[gpu], gpu))

    @property
    def empty(self) -> bool:
        return not self.node.taken and all(free == 1 for free in self.gpus)


def place(nodes: Sequence[Node], demands: Iterable[Demand]) -> Placement:
    """A place for each worker of all ``demands``.

    Raises:
        DoesNotFitError: names what has no place, how much it needs, and what is free.
    """
    wanted = [demand for demand in demands if demand.copies]
    _check_totals(nodes, wanted)
    widest = max((node.gpus for node in nodes), default=0)

    def together(demand: Demand) -> float:
        """GPUs that should be on one node."""
        return min(demand.workers, widest) * demand.gpus

    by_size = sorted(wanted, key=lambda demand: (-together(demand), demand.kind == "ranks"))
    # The learner may be split, an engine may not: where it comes first by its size and leaves one no place, it is last.
    engines_first = sorted(by_size, key=lambda demand: demand.kind == "ranks")
    try:
        return _place(nodes, by_size)
    except DoesNotFitError:
        return _place(nodes, engines_first)


@dataclass(frozen=True, slots=True)
class Group:
    """Arguments of ``ray.util.placement_group``."""

    bundles: list[dict[str, float]]
    """Empty where nothing is reserved."""
    strategy: str
    bundle_label_selector: list[dict[str, str]] | None
    """The node of each bundle; None for nodes that are only described."""


def placement_group_of(placed: Placed, nodes: Iterable[Node]) -> Group:
    """The Ray placement group that is this part of a plan.

    One bundle for an engine on one node, whose workers are its children; one for each worker, after one for the actor,
    where it spans nodes; one for each rank.
    """
    demand, spans = placed.demand, len(placed.nodes) > 1
    where = [worker.node for worker in placed.workers]
    if demand.kind == "ranks":
        amounts = [(demand.cpus, demand.gpus)] * len(where)
    elif spans:
        amounts = [(0.0, demand.gpus)] * len(where)
        if demand.cpus:  # Ray refuses an empty bundle.
            amounts, where = [(demand.cpus, 0.0), *amounts], [where[0], *where]
    else:
        amounts, where = [(demand.cpus, demand.gpus * demand.workers)], where[:1]
    return _group(amounts, where, nodes, "PACK" if spans or demand.kind == "ranks" else "STRICT_PACK")


def shared_group(together: Sequence[Placed], nodes: Iterable[Node]) -> Group:
    """The same for parts that have shares of one GPU: one bundle, since Ray gives all of a bundle the same one."""
    cpus, gpus = (sum(getattr(placed.demand, name) for placed in together) for name in ("cpus", "gpus"))
    return _group([(cpus, round(gpus, 4))], [together[0].workers[0].node], nodes, "STRICT_PACK")


def _group(amounts: list[tuple[float, float]], where: list[str], nodes: Iterable[Node], strategy: str) -> Group:
    made = [{name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount} for cpus, gpus in amounts]
    if not all(made):
        return Group([], strategy, None)
    ids = {node.name: node.node_id for node in nodes}
    selectors = [{NODE_ID: node_id} for name in where if (node_id := ids[name]) is not None]
    return Group(made, strategy, selectors or None)


def _check_totals(nodes: Sequence[Node], demands: Sequence[Demand]) -> None:
    """Says how much is missing where even the sums do not fit."""
    for resource, amounts, there in (
        ("GPUs", {d.name: d.total_gpus for d in demands}, float(sum(node.gpus for node in nodes))),
        ("CPUs", {d.name: d.total_cpus for d in demands}, sum(node.cpus for node in nodes)),
    ):
        if (needed := sum(amounts.values())) > there + EPSILON:
            each = ", ".join(f"{name} {amount:g}" for name, amount in amounts.items() if amount)
            raise DoesNotFitError(f"the run asks for {needed:g} {resource} ({each}) and the cluster has {there:g}")


def _place(nodes: Sequence[Node], demands: Sequence[Demand]) -> Placement:
    free = [_Free(node, index, node.cpus, [1.0] * node.gpus) for index, node in enumerate(nodes)]
    placed: list[Placed] = []
    for demand in demands:
        for copy in range(demand.copies):
            workers = _ranks(free, demand) if demand.kind == "ranks" else _engine(free, demand)
            if workers is None:
                raise DoesNotFitError(_sentence(demand, copy, free, nodes))
            placed.append(Placed(demand, copy, tuple(workers)))
    return Placement(tuple(nodes), tuple(placed))


def _engine(free: list[_Free], demand: Demand) -> list[Worker] | None:
    """Places for an engine's workers, taken out of ``free``."""
    fitting = [one for one in free if _room(one, demand.gpus) >= demand.workers and _cpus(one) >= demand.cpus]
    if fitting:
        best = min(fitting, key=lambda one: (_room(one, demand.gpus), _cpus(one), one.index))
        return _take(best, demand.workers, demand.gpus, demand.cpus)
    if not demand.gpus or demand.workers <= max((one.node.size for one in free), default=0):
        return None
    # Larger than any node: whole nodes, each with as many pipeline stages as it holds.
    whole = [one for one in free if one.empty and len(one.gpus) >= demand.together]
    whole.sort(key=lambda one: (-(len(one.gpus) // demand.together), len(one.gpus), one.index))
    left, chosen = demand.workers // demand.together, []
    for one in whole:
        if left > 0:
            stages = min(left, len(one.gpus) // demand.together)
            chosen.append((one, stages * demand.together))
            left -= stages
    if left > 0 or _cpus(chosen[0][0]) < demand.cpus:
        return None
    workers: list[Worker] = []
    for number, (one, count) in enumerate(chosen):
        workers += _take(one, count, 1.0, demand.cpus if number == 0 else 0.0)
        one.gpus = [0.0] * len(one.gpus)  # Nothing else beside it.
    return workers


def _ranks(free: list[_Free], demand: Demand) -> list[Worker] | None:
    """Places for the learner's ranks on as few nodes as possible, taken out of ``free``."""

    def room(one: _Free) -> int:
        by_cpu = _cpus(one) / demand.cpus if demand.cpus else math.inf
        return math.floor(min(by_cpu, _room(one, demand.gpus), demand.workers))

    if sum(map(room, free)) < demand.workers:
        return None
    workers: list[Worker] = []
    while left := demand.workers - len(workers):
        enough = [one for one in free if room(one) >= left]
        # The last ones go where the least room is left over, the others where there is most.
        best = (
            min(enough, key=lambda one: (len(one.usable(demand.gpus)), one.index))
            if enough
            else max(free, key=lambda one: (room(one), -one.index))
        )
        count = min(left, room(best))
        workers += _take(best, count, demand.gpus, demand.cpus * count)
    return workers


def _room(one: _Free, share: float) -> float:
    """Workers with ``share`` of a GPU each that fit the node, one a GPU: NCCL refuses two of one group on the same."""
    return len(one.usable(share)) if share else math.inf


def _cpus(one: _Free) -> float:
    return one.cpus + EPSILON


def _take(one: _Free, count: int, share: float, cpus: float) -> list[Worker]:
    one.cpus -= cpus
    if not share:
        return [Worker(one.node.name, None)] * count
    gpus = sorted(one.usable(share)[:count])
    for gpu in gpus:
        one.gpus[gpu] -= share
    return [Worker(one.node.name, gpu) for gpu in gpus]


def _sentence(demand: Demand, copy: int, free: list[_Free], nodes: Sequence[Node]) -> str:
    widest = max((node.size for node in nodes), default=0)
    what = f"{demand.name} {copy}" if demand.copies > 1 else demand.name
    if demand.kind == "engine" and demand.together > widest > 0:
        return (
            f"{what} shares each layer among {demand.together} GPUs of one node, and the largest node has {widest}: "
            f"write {demand.setting}.tensor_parallel={widest} or less, and more {demand.setting}.pipeline_parallel"
        )
    if demand.kind == "ranks":
        needs = f"the {demand.workers} ranks of {what} have no place"
    elif not demand.gpus:
        needs = f"{what} needs {demand.cpus:g} CPUs on one node and has no place"
    elif demand.workers <= widest:
        needs = f"{what} needs {demand.workers} GPUs of one node and has no place"
    else:
        needs = f"{what} needs {demand.workers} GPUs on empty nodes of {demand.together} or more and has no place"
    return f"{needs}: free are {_free_text(free, bool(demand.gpus))}"


def _free_text(free: list[_Free], gpus: bool) -> str:
    """What the nodes have left, those that have the same counted."""
    if not gpus:
        return ", ".join(f"{one.node.name} {one.cpus:g} CPUs" for one in free)
    kinds: dict[tuple[float, int], list[str]] = {}
    for one in free:
        if left := sum(one.gpus):
            kinds.setdefault((left, one.node.size), []).append(one.node.name)
    texts = [
        f"{left:g} of {there} GPUs on {names[0] if len(names) == 1 else f'each of {len(names)} nodes'}"
        for (left, there), names in sorted(kinds.items(), reverse=True)
    ]
    return ", ".join(texts) or "no GPUs"
