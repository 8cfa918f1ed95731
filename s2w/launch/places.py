"""The places of a run in its Ray cluster: planned in what is free, and held by placement groups."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from s2w.actors.place import Place, Places, Reserve
from s2w.actors.vllm import actor_options
from s2w.config.schema import Config, RolloutConfig
from s2w.errors import ConfigError
from s2w.launch.demands import LEARNER, Engine, Phase
from s2w.launch.nodes import ray_nodes
from s2w.launch.placement import (
    DoesNotFitError,
    Group,
    Node,
    Placed,
    Placement,
    place,
    placement_group_of,
    shared_group,
)
from s2w.launch.plan_table import places_of
from s2w.observe.progress import Progress

GIVING_BACK_S = 30
"""How long a run that has ended may take to give its resources back."""


async def find_room(config: Config, phases: Sequence[Phase], device: str) -> list[Placement]:
    """A place for each phase in what is free in the cluster, each as if it were alone.

    Waits for what an earlier run is giving back, where it would fit an empty cluster.

    Raises:
        DoesNotFitError: there is no room; says for what, and what is free.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + GIVING_BACK_S
    while True:
        whole, free = ray_nodes(free=False), ray_nodes(free=True)
        for phase in phases:
            _place(config, phase, device, whole)
        try:
            return [_place(config, phase, device, free) for phase in phases]
        except DoesNotFitError as error:
            if loop.time() > end:
                raise DoesNotFitError(f"{error}: other jobs have the rest of the cluster") from error
        await asyncio.sleep(1)


def _place(config: Config, phase: Phase, device: str, nodes: Sequence[Node]) -> Placement:
    try:
        return place(nodes, phase.demands(config, device))
    except DoesNotFitError as error:
        raise DoesNotFitError(f"{phase.name}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Held:
    """The part of a placement group that an engine, or the learner, has."""

    group: PlacementGroup
    bundles: tuple[int, ...]
    """Of the actor; of the learner one for each rank."""
    nodes: frozenset[str]
    """Ids of the nodes that it is pinned to."""


class ReservedPhase:
    """The places of a phase, as long as it is up."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._placed = {(placed.demand.name, placed.copy): placed for placed in placement.placed}
        self._held: dict[tuple[str, int], _Held] = {}
        self._groups: list[PlacementGroup] = []
        """All that are held."""
        for together in _sharing(placement):
            self._hold(together)

    async def ready(self, timeout_s: float) -> None:
        """Waits until the cluster has given all places.

        Raises:
            TimeoutError: it has not within ``timeout_s`` seconds.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        for group in self._groups:
            if not await asyncio.to_thread(group.wait, max(1, round(end - loop.time()))):
                free = ray.available_resources()
                left = f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"
                raise TimeoutError(
                    f"the cluster has not given {group.bundle_specs} within {timeout_s:g} s; free are {left}: look for "
                    "other jobs (ray status)"
                )

    def places(self, name: str) -> Places:
        """Of the pool ``name``. A place whose node is gone is replaced by one that is anywhere in the cluster."""

        def find(slot: int) -> Place:
            placed = self._placed[name, slot]
            held = self._held.get((name, slot))
            if held is not None and held.nodes - {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
                if held.group in self._groups:  # Others may have shared it.
                    self._groups.remove(held.group)
                    remove_placement_group(held.group)
                held = self._hold([placed], pinned=False)
            return _place_in(placed, held)

        return find

    def ranks(self) -> list[Place]:
        """Of the learner's ranks; empty without a learner."""
        placed = self._placed.get((LEARNER, 0))
        if placed is None:
            return []
        held = self._held.get((LEARNER, 0))
        return [_place_in(placed, held, rank) for rank in range(len(placed.workers))]

    def release(self) -> None:
        """Gives the places back; actors that are still there end."""
        for group in self._groups:
            remove_placement_group(group)
        self._groups.clear()

    def _hold(self, together: Sequence[Placed], *, pinned: bool = True) -> _Held | None:
        """Makes the placement group of parts that share one; none for those that reserve nothing."""
        asked = self._group(together)
        if not asked.bundles:
            return None
        selectors: Any = asked.bundle_label_selector if pinned else None
        group = placement_group(asked.bundles, asked.strategy, bundle_label_selector=selectors)
        self._groups.append(group)
        for placed in together:
            ranks = placed.demand.kind == "ranks" and len(together) == 1
            bundles = tuple(range(len(placed.workers))) if ranks else (0,)
            nodes = frozenset(self._node_ids(placed)) if pinned else frozenset[str]()
            held = self._held[placed.demand.name, placed.copy] = _Held(group, bundles, nodes)
        return held

    def _group(self, together: Sequence[Placed]) -> Group:
        nodes = self.placement.nodes
        return placement_group_of(together[0], nodes) if len(together) == 1 else shared_group(together, nodes)

    def _node_ids(self, placed: Placed) -> Iterator[str]:
        for node in self.placement.nodes:
            if node.name in placed.nodes and node.node_id is not None:
                yield node.node_id


def _sharing(placement: Placement) -> Iterator[list[Placed]]:
    """Parts by their placement groups: those with shares of the same GPU have one, since Ray chooses the GPU."""
    shared: dict[tuple[str, int | None], list[Placed]] = {}
    for placed in placement.placed:
        if 0 < placed.demand.gpus < 1:
            worker = placed.workers[0]
            shared.setdefault((worker.node, worker.gpu), []).append(placed)
        else:
            yield [placed]
    yield from shared.values()


def _place_in(placed: Placed, held: _Held | None, rank: int = 0) -> Place:
    if held is None:
        return Place()
    strategy = PlacementGroupSchedulingStrategy(held.group, placement_group_bundle_index=held.bundles[rank])
    spans = placed.demand.kind == "engine" and len(placed.nodes) > 1
    # The workers of an engine that spans nodes have the GPUs.
    return Place({"scheduling_strategy": strategy} | ({"num_gpus": 0} if spans else {}), spans)


@asynccontextmanager
async def reserved(config: Config, phase: Phase, device: str) -> AsyncIterator[ReservedPhase]:
    """Places for a phase while it is up.

    Raises:
        DoesNotFitError: as :func:`find_room`.
        TimeoutError: as :meth:`ReservedPhase.ready`.
    """
    [placement] = await find_room(config, [phase], device)
    phase_places = ReservedPhase(placement)
    try:
        await phase_places.ready(config.cluster.start_timeout_s)
        yield phase_places
    finally:
        phase_places.release()


def reserve_engines(config: Config, device: str) -> Reserve:
    """Reserves places for engines that generate beside nothing else."""

    @asynccontextmanager
    async def reserve(name: str, settings: RolloutConfig) -> AsyncIterator[Places]:
        phase = Phase(name, (Engine(name, settings, "teacher", settings.engines),), learner=False)
        async with reserved(config, phase, device) as places:
            yield places.places(name)

    return reserve


class Nothing:
    """An actor that only has a place."""

    def node(self) -> str:
        """Id of its node."""
        return str(ray.get_runtime_context().get_node_id())


async def rehearse(config: Config, phases: Sequence[Phase], device: str, progress: Progress) -> None:
    """Places empty actors as each phase would its own, and says where they are (``cluster.dry_run``).

    Raises:
        ConfigError: the cluster put one on another node than planned.
        DoesNotFitError, TimeoutError: as :func:`reserved`.
    """
    for phase in phases:
        async with reserved(config, phase, device) as places:
            actors = list(_empty_actors(config, phase, device, places))
            where: list[str] = []
            try:
                where = await asyncio.gather(*(actor.node.remote() for _, _, actor in actors))
            finally:
                for _, _, actor in actors:
                    ray.kill(actor)
            names = {node.node_id: node.name for node in places.placement.nodes}
            for (who, planned, _), node_id in zip(actors, where, strict=True):
                if names[node_id] != planned:
                    raise ConfigError(f"{phase.name}: {who} is on node {names[node_id]}, planned was {planned}")
            progress.say(f"{phase.name}: all in place")
            for line in places_of(places.placement):
                progress.say(line)


def _empty_actors(config: Config, phase: Phase, device: str, places: ReservedPhase) -> Iterator[tuple[str, str, Any]]:
    """Actors with the resources and places of a phase's: name, planned node, handle."""
    empty = ray.remote(Nothing)
    for engine in phase.engines:
        settings = engine.settings
        world = settings.tensor_parallel * settings.pipeline_parallel
        options = actor_options(device, settings.cpus, world, settings.gpus)
        wanted = {name: options[name] for name in ("num_cpus", "num_gpus")}
        find = places.places(engine.name)
        for placed in places.placement.of(engine.name):
            actor = empty.options(**wanted | dict(find(placed.copy).options)).remote()
            yield placed.name, placed.workers[0].node, actor
    for rank, at in enumerate(places.ranks()):
        [placed] = places.placement.of(LEARNER)
        gpus = config.learner.gpus if device == "cuda" else 0
        actor = empty.options(num_cpus=config.learner.cpus, num_gpus=gpus, **at.options).remote()
        yield f"learner rank {rank}", placed.workers[rank].node, actor
