"""Places for workers, planned from nodes and demands."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from s2w.launch.placement import Demand, DoesNotFitError, Node, Placement, place, placement_group_of

TEN = [Node(f"n{i}", 8) for i in range(10)]


def engine(name: str, tensor: int, copies: int = 1, stages: int = 1, gpus: float = 1.0, cpus: float = 0.5) -> Demand:
    return Demand(name, "engine", tensor * stages, copies, cpus, gpus, tensor, name)


def ranks(count: int, gpus: float = 1.0, cpus: float = 0.5) -> Demand:
    return Demand("learner", "ranks", count, 1, cpus, gpus)


def where(placement: Placement, name: str) -> list[list[str]]:
    """Nodes of each of a demand's copies."""
    return [list(placed.nodes) for placed in placement.of(name)]


def check(placement: Placement) -> None:
    """No GPU is given away twice, and none that is not there."""
    sizes = {node.name: node.gpus for node in placement.nodes}
    load: dict[tuple[str, int], float] = defaultdict(float)
    for placed in placement.placed:
        assert len(placed.workers) == placed.demand.workers
        for worker in placed.workers:
            assert worker.gpu is not None and worker.gpu < sizes[worker.node]
            load[worker.node, worker.gpu] += placed.demand.gpus
    assert all(share <= 1 + 1e-6 for share in load.values())


def test_the_cluster_of_the_235b_teacher() -> None:
    """TP8+EP8 x 2 replicas, 32 rollout engines, 16 ranks on 10 nodes of 8."""
    plan = place(TEN, [engine("teacher", 8, 2), engine("rollout", 1, 32), ranks(16)])
    check(plan)
    assert where(plan, "teacher") == [["n0"], ["n1"]]
    (learner,) = plan.of("learner")
    assert learner.nodes == ("n2", "n3")
    assert [worker.node for worker in learner.workers] == ["n2"] * 8 + ["n3"] * 8
    assert [worker.gpu for worker in learner.workers] == [*range(8), *range(8)]
    assert Counter(node for (node,) in where(plan, "rollout")) == {f"n{i}": 8 for i in range(4, 8)}
    assert plan.gpus == 64


def test_stages_of_an_engine_that_is_larger_than_a_node() -> None:
    plan = place(TEN, [engine("rollout", 1, 4), ranks(4), engine("teacher", 8, 2, stages=2)])
    check(plan)
    assert where(plan, "teacher") == [["n0", "n1"], ["n2", "n3"]]
    # A tensor-parallel group is never split, and the ranks are in order.
    (first, _) = plan.of("teacher")
    assert [worker.node for worker in first.workers] == ["n0"] * 8 + ["n1"] * 8
    assert where(plan, "learner") == [["n4"]] and where(plan, "rollout") == [["n4"]] * 4
    deep = place(TEN, [engine("teacher", 4, stages=4)])
    assert where(deep, "teacher") == [["n0", "n1"]]


def test_the_same_demands_have_the_same_places() -> None:
    demands = [engine("rollout", 2, 7), engine("teacher", 4, 3), ranks(6)]
    assert place(TEN, demands) == place(TEN, demands)


def test_a_fragmented_cluster() -> None:
    """What others have left: engines go where least is left over, the learner where it is on the fewest nodes."""
    nodes = [Node("a", 5), Node("b", 3), Node("c", 6), Node("d", 4), Node("e", 1)]
    plan = place(nodes, [engine("teacher", 4), engine("rollout", 1, 4), ranks(8)])
    check(plan)
    # By size the learner is first, on the two nodes with the most room.
    assert where(plan, "learner") == [["c", "b"]]
    assert where(plan, "teacher") == [["d"]]
    assert len({node for (node,) in where(plan, "rollout")}) <= 3
    with pytest.raises(
        DoesNotFitError,
        match=r"^teacher 1 needs 4 GPUs of one node and has no place: free are 3 of 3 GPUs on each of 2 nodes$",
    ):
        place([Node("a", 3), Node("b", 3), Node("c", 4)], [engine("teacher", 4, 2)])


def test_the_learner_gives_way_to_an_engine_that_cannot_be_split() -> None:
    plan = place([Node("a", 6), Node("b", 3)], [ranks(5), engine("teacher", 4)])
    check(plan)
    assert where(plan, "teacher") == [["a"]]
    assert sorted(plan.of("learner")[0].nodes) == ["a", "b"]


def test_nodes_of_different_sizes() -> None:
    nodes = [Node("small0", 2), Node("small1", 2), Node("large", 8), Node("middle", 4)]
    plan = place(nodes, [engine("rollout", 1, 4), engine("teacher", 4), ranks(8)])
    check(plan)
    assert where(plan, "learner") == [["large"]] and where(plan, "teacher") == [["middle"]]
    assert Counter(node for (node,) in where(plan, "rollout")) == {"small0": 2, "small1": 2}
    # Stages only where a whole tensor-parallel group has room.
    spans = place(nodes, [engine("teacher", 4, stages=3)])
    assert where(spans, "teacher") == [["large", "middle"]]


def test_parts_of_one_gpu() -> None:
    one = [Node("n", 1, cpus=8)]
    plan = place(one, [engine("teacher", 1, gpus=0.45), engine("rollout", 1, gpus=0.2), ranks(1, gpus=0.35)])
    check(plan)
    assert plan.gpus == 1
    with pytest.raises(DoesNotFitError, match=r"asks for 1\.1 GPUs \(teacher 0\.75, learner 0\.35\) and the cluster"):
        place(one, [engine("teacher", 1, gpus=0.75), ranks(1, gpus=0.35)])
    # NCCL refuses two ranks of a group on one GPU.
    with pytest.raises(DoesNotFitError, match=r"^the 2 ranks of learner have no place: free are 1 of 1 GPUs on n$"):
        place(one, [ranks(2, gpus=0.5)])


def test_cpus_alone() -> None:
    nodes = [Node("a", 0, cpus=2), Node("b", 0, cpus=1)]
    plan = place(nodes, [engine("teacher", 2, gpus=0), engine("rollout", 1, 2, gpus=0), ranks(2, gpus=0)])
    assert all(worker.gpu is None for placed in plan.placed for worker in placed.workers)
    assert plan.gpus == 0
    with pytest.raises(DoesNotFitError, match=r"asks for 3\.5 CPUs \(teacher 0\.5, learner 3\) and the cluster has 3$"):
        place(nodes, [engine("teacher", 2, gpus=0), ranks(2, gpus=0, cpus=1.5)])
    with pytest.raises(DoesNotFitError, match=r"^teacher needs 2\.5 CPUs on one node and has no place: free are a 2"):
        place(nodes, [engine("teacher", 1, gpus=0, cpus=2.5)])


@pytest.mark.parametrize(
    ("demands", "sentence"),
    [
        (
            [engine("teacher", 16)],
            "teacher shares each layer among 16 GPUs of one node, and the largest node has 8: write "
            "teacher.tensor_parallel=8 or less, and more teacher.pipeline_parallel",
        ),
        (
            [engine("teacher", 8, 8), engine("rollout", 1, 32)],
            "the run asks for 96 GPUs (teacher 64, rollout 32) and the cluster has 80",
        ),
        (
            [engine("teacher", 5, 11)],
            "teacher 10 needs 5 GPUs of one node and has no place: free are 3 of 8 GPUs on each of 10 nodes",
        ),
        (
            [engine("teacher", 8, stages=2), engine("other", 5, 9)],
            "other 8 needs 5 GPUs of one node and has no place: free are 3 of 8 GPUs on each of 8 nodes",
        ),
    ],
)
def test_refusals_have_the_numbers(demands: list[Demand], sentence: str) -> None:
    with pytest.raises(DoesNotFitError) as refused:
        place(TEN, demands)
    assert str(refused.value) == sentence


def test_an_engine_over_nodes_takes_whole_ones() -> None:
    nodes = [Node("a", 8), Node("b", 8), Node("c", 4)]
    plan = place(nodes, [engine("teacher", 8, stages=2), engine("rollout", 1, 4)])
    assert {node for (node,) in where(plan, "rollout")} == {"c"}
    with pytest.raises(DoesNotFitError, match=r"needs 16 GPUs on empty nodes of 8 or more"):
        place([Node("a", 8), Node("b", 4), Node("c", 4)], [engine("teacher", 8, stages=2)])


def test_placement_groups_of_a_plan() -> None:
    nodes = [Node(f"n{i}", 8, 64, f"id{i}") for i in range(4)]
    plan = place(nodes, [engine("teacher", 8, stages=2, cpus=1), engine("rollout", 2), ranks(2)])
    (teacher,), (rollout,), (learner,) = plan.of("teacher"), plan.of("rollout"), plan.of("learner")
    group = placement_group_of(teacher, nodes)
    assert group.strategy == "PACK" and group.bundles == [{"CPU": 1}, *[{"GPU": 1}] * 16]
    assert group.bundle_label_selector == [{"ray.io/node-id": "id0"}] * 9 + [{"ray.io/node-id": "id1"}] * 8
    group = placement_group_of(rollout, nodes)
    assert (group.strategy, group.bundles) == ("STRICT_PACK", [{"CPU": 0.5, "GPU": 2}])
    assert group.bundle_label_selector == [{"ray.io/node-id": "id2"}]
    described = placement_group_of(learner, [Node(one.name, 8) for one in nodes])
    assert (described.bundles, described.bundle_label_selector) == ([{"CPU": 0.5, "GPU": 1}] * 2, None)
