"""The places of a plan are those that Ray gives: a cluster of four nodes with eight GPUs each, of which none exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from s2w.config.compose import compose
from s2w.errors import ConfigError
from s2w.launch.demands import phases
from s2w.launch.nodes import machines
from s2w.launch.placement import DoesNotFitError, place, placement_group_of

NODE: dict[str, Any] = {"num_cpus": 8, "num_gpus": 8, "object_store_memory": 80 * 2**20}
RUN = [
    "teacher=qwen3_235b_a22b",
    "teacher.replicas=1",
    "teacher.pipeline_parallel=2",
    "student=qwen3_8b",
    "rollout.engines=4",
    "learner.ranks=8",
    "learner.cpus=0.5",
    "plan.gpu_memory_gib=80",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    made = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        for _ in range(3):
            made.add_node(**NODE)
        made.wait_for_nodes()
        yield made.address
    finally:
        made.shutdown()


def test_the_groups_of_a_plan_are_where_it_says(cluster: str) -> None:
    config = compose([*RUN, f"cluster.address='{cluster}'"])
    found, device = machines(config)
    assert device == "cuda" and [machine.node.gpus for machine in found] == [8] * 4
    assert all(machine.object_store == 80 * 2**20 for machine in found)
    nodes = [machine.node for machine in found]
    (phase,) = phases(config)
    plan = place(nodes, phase.demands(config, device))
    ids = {node.name: node.node_id for node in nodes}
    ray.init(address=cluster, log_to_driver=False)
    try:
        # Not in the order of the plan: each bundle names its node.
        groups = []
        for placed in reversed(plan.placed):
            asked = placement_group_of(placed, nodes)
            group = placement_group(
                asked.bundles, asked.strategy, bundle_label_selector=asked.bundle_label_selector or []
            )
            groups.append((placed, group))
        ray.get([group.ready() for _, group in groups], timeout=60)
        for placed, group in groups:
            where = placement_group_table(group)["bundles_to_node_id"]
            actual = [where[index] for index in sorted(where)]
            expected = [ids[worker.node] for worker in placed.workers]
            if placed.demand.kind == "engine":
                expected = expected[:1] + (expected if len(placed.nodes) > 1 else [])
            assert actual == expected, placed.name
        for _, group in groups[1:]:
            remove_placement_group(group)
    finally:
        ray.shutdown()


def test_what_another_job_has_taken_is_not_there(cluster: str) -> None:
    ray.init(address=cluster, log_to_driver=False)
    group = placement_group([{"GPU": 3}] * 4, "STRICT_SPREAD", lifetime="detached")
    ray.get(group.ready(), timeout=60)
    ray.shutdown()
    config = compose([*RUN, f"cluster.address='{cluster}'"])
    found, device = machines(config)
    assert [machine.node.gpus for machine in found] == [5] * 4
    with pytest.raises(DoesNotFitError, match=r"asks for 28 GPUs .* and the cluster has 20"):
        place([machine.node for machine in found], phases(config)[0].demands(config, device))
    unknown = compose([*RUN[:-1], f"cluster.address='{cluster}'"])
    with pytest.raises(ConfigError, match=r"has GPUs of unknown memory \(no accelerator type\): write plan\.gpu_mem"):
        machines(unknown)
