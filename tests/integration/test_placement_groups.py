"""The places of a run in a Ray cluster of ten nodes with eight GPUs each, of which none exists."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from s2w.config.compose import compose
from s2w.config.schema import Config
from s2w.errors import ConfigError
from s2w.launch.demands import LEARNER, ON_POLICY, phase_of, phases
from s2w.launch.nodes import machines, ray_nodes
from s2w.launch.placement import DoesNotFitError, place
from s2w.launch.places import ReservedPhase, reserved

NODES = 10
NODE: dict[str, Any] = {"num_cpus": 8, "num_gpus": 8, "object_store_memory": 80 * 2**20}
LARGE = [
    "teacher=qwen3_235b_a22b", "student=qwen3_8b", "rollout.engines=32", "rollout.cpus=0.1", "learner.ranks=16",
    "learner.cpus=0.1", "plan.gpu_memory_gib=79",
]  # fmt: skip
"""Two teachers of eight GPUs with expert parallelism, 32 rollout engines, 16 ranks: 64 of 80 GPUs."""
SPANNING = [*LARGE, "teacher.replicas=1", "teacher.pipeline_parallel=2", "rollout.engines=4", "learner.ranks=8"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        for _ in range(NODES - 1):
            made.add_node(**NODE)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


@contextmanager
def joined(cluster: Cluster) -> Iterator[None]:
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@asynccontextmanager
async def on_policy(config: Config) -> AsyncIterator[ReservedPhase]:
    async with reserved(config, phase_of(config, ON_POLICY), "cuda") as places:
        yield places


def actual_nodes(places: ReservedPhase, name: str, copy: int) -> list[str]:
    """Ids of the nodes where Ray has put the bundles of a part."""
    where = placement_group_table(places._held[name, copy].group)["bundles_to_node_id"]
    return [where[index] for index in sorted(where)]


@pytest.mark.parametrize("settings", [LARGE, SPANNING], ids=["235B twice", "235B over two nodes"])
def test_the_groups_of_a_phase_are_where_the_plan_says(cluster: Cluster, settings: list[str]) -> None:
    async def check() -> None:
        async with on_policy(config) as places:
            ids = {node.name: node.node_id for node in places.placement.nodes}
            for placed in places.placement.placed:
                expected = [ids[worker.node] for worker in placed.workers]
                if placed.demand.kind == "engine":
                    # One bundle for the workers of a node; where they span nodes one each, after the actor's.
                    spans = len(placed.nodes) > 1
                    expected = expected[:1] + (expected if spans else [])
                    found = places.places(placed.demand.name)(placed.copy)
                    assert found.spans_nodes is spans and ("num_gpus" in found.options) is spans
                assert actual_nodes(places, placed.demand.name, placed.copy) == expected, placed.name
            assert len(places.ranks()) == config.learner.ranks

    config = compose([*settings, f"cluster.address='{cluster.address}'"])
    with joined(cluster):
        asyncio.run(check())
        # All is given back, and the same again has room.
        asyncio.run(check())


def test_parts_that_share_a_gpu_are_in_one_bundle(cluster: Cluster) -> None:
    async def check() -> None:
        async with on_policy(config) as places:
            groups = {places._held[name, 0].group.id for name in ("teacher", "rollout", LEARNER)}
            assert len(groups) == 1
            [bundle] = places._held[LEARNER, 0].group.bundle_specs
            assert bundle == {"CPU": 1.5, "GPU": 1.0}

    config = compose(["experiment=one_gpu", "data.tasks=[chain_sum]", "plan.gpu_memory_gib=79"])
    with joined(cluster):
        asyncio.run(check())


def test_a_dry_run_says_where_everything_would_be(cluster: Cluster) -> None:
    one_gpu = [
        "experiment=testbed", "teacher.tensor_parallel=1", "teacher.expert_parallel=false", "teacher.gpus=0.3",
        "rollout.gpus=0.3", "learner.gpus=0.4", "cluster.device=cuda", "off_policy.steps=0",
    ]  # fmt: skip
    command = [sys.executable, "-m", "s2w.cli", "train", *one_gpu, f"cluster.address={cluster.address}"]
    said = subprocess.run([*command, "cluster.dry_run=true"], check=True, capture_output=True, text=True).stdout
    last = said.splitlines()[-2:]
    assert last[0] == "on-policy: all in place"
    assert last[1].endswith("learner rank 0 (GPU 0), teacher (GPU 0), rollout (GPU 0)")


def test_a_place_whose_node_is_gone_is_found_anew(cluster: Cluster) -> None:
    async def check() -> None:
        async with on_policy(config) as places:
            # Not the one on the node of this process.
            here, find = ray.get_runtime_context().get_node_id(), places.places("teacher")
            lost = next(copy for copy in (0, 1) if actual_nodes(places, "teacher", copy) != [here])
            [node_id] = actual_nodes(places, "teacher", lost)

            def group_of(copy: int) -> Any:
                return find(copy).options["scheduling_strategy"].placement_group

            before, other = group_of(lost), group_of(1 - lost)
            assert group_of(lost) == before
            [node] = [node for node in cluster.list_all_nodes() if node.node_id == node_id]
            cluster.remove_node(node)
            while node_id in {node.node_id for node in ray_nodes(free=False)}:
                await asyncio.sleep(0.2)
            assert group_of(lost) != before
            await places.ready(60)
            assert actual_nodes(places, "teacher", lost) != [node_id]
            # The other one stays where it is.
            assert group_of(1 - lost) == other

    config = compose([*LARGE, "rollout.engines=8", f"cluster.address='{cluster.address}'"])
    with joined(cluster):
        asyncio.run(check())
        # It comes back, and the plan counts on it.
        cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        assert len(ray_nodes(free=False)) == NODES
        config = compose([*LARGE, f"cluster.address='{cluster.address}'"])
        assert place(ray_nodes(free=False), phase_of(config, ON_POLICY).demands(config, "cuda"))


def test_what_another_job_has_taken_is_not_there(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2w.launch.places.GIVING_BACK_S", 2)
    config = compose([*LARGE, f"cluster.address='{cluster.address}'"])

    async def check() -> None:
        async with on_policy(config):
            pytest.fail("there is no room")

    with joined(cluster):
        group = placement_group([{"GPU": 3}] * NODES, "STRICT_SPREAD", lifetime="detached")
        ray.get(group.ready(), timeout=60)
        # Fifty are free, in pieces of five: none holds an engine of eight.
        with pytest.raises(DoesNotFitError, match=r"^on-policy: .* asks for 64 GPUs .* other jobs have the rest"):
            asyncio.run(check())
    found, device = machines(config)
    assert device == "cuda" and [machine.node.gpus for machine in found] == [5] * NODES
    assert all(machine.object_store == 80 * 2**20 for machine in found)
    few = compose([*LARGE, "rollout.engines=4", "learner.ranks=8", f"cluster.address='{cluster.address}'"])
    with pytest.raises(DoesNotFitError, match=r"teacher 0 needs 8 GPUs of one node and has no place: free are"):
        place([machine.node for machine in found], phases(few)[0].demands(few, device))
    unknown = compose([*LARGE[:-1], f"cluster.address='{cluster.address}'"])
    with pytest.raises(ConfigError, match=r"has GPUs of unknown memory \(no accelerator type\): write plan\.gpu_mem"):
        machines(unknown)
    with joined(cluster):
        remove_placement_group(group)
