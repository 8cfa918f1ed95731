"""What an actor does while it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from s2w.actors import stages
from s2w.actors.stages import UP, Stage, describe, duration, slowest


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """This process is an actor."""
    monkeypatch.setattr(stages, "_file", None)
    monkeypatch.setenv("S2W_STAGE_BOARD", "")
    stages.open_board()
    assert stages._file is not None
    yield stages._file
    os.close(stages._file)


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", f"from s2w.actors import stages\n{program}"], check=True, timeout=60)


def test_a_stage_has_a_beginning_and_a_number(board: int) -> None:
    first = stages.current()
    stages.enter("loading weights", "shard 1 of 3")
    one = stages.current()
    stages.enter("loading weights", "shard 2 of 3")
    two = stages.current()
    stages.enter("compiling")
    assert (first.name, one.detail, two.detail, stages.current().name) == (
        "starting", "shard 1 of 3", "shard 2 of 3", "compiling",
    )  # fmt: skip
    # The stage goes on; only how far it has come is new.
    assert two.number == one.number == first.number + 1 == stages.current().number - 1
    assert 0 <= one.seconds <= two.seconds < 60
    with stages.during("capturing CUDA graphs"):
        assert stages.current().name == "capturing CUDA graphs"
    assert stages.current().name == "compiling"


def test_a_child_process_tells_the_stage_of_its_actor(board: int) -> None:
    run("stages.join_board(); stages.enter('loading weights', 'shard 3 of 118 from /models/größe')")
    assert str(stages.current()) == "loading weights, shard 3 of 118 from /models/größe, 0 s"
    # One that has not joined, such as a tool that vLLM runs, changes nothing.
    run("stages.enter('something else')")
    assert stages.current().name == "loading weights"


def test_a_long_detail_is_cut(board: int) -> None:
    stages.enter("downloading", "€" * 5000)
    assert stages.current().detail == "€" * 100
    stages.enter("x")
    assert (stages.current().name, stages.current().detail) == ("x", "")


def test_without_a_living_actor_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_file", None)
    monkeypatch.setenv("S2W_STAGE_BOARD", "/proc/1234567890/fd/3")
    stages.join_board()
    stages.enter("loading weights")
    assert stages.current().name == ""


def test_the_slowest_actor_is_named_with_its_stage() -> None:
    here = {
        0: Stage("compiling", seconds=300.0, number=5),
        1: Stage(UP, number=7),
        2: Stage("loading weights", "shard 3 of 118", seconds=41.4, number=4),
        3: Stage("loading weights", "shard 9 of 118", seconds=12.0, number=4),
    }
    assert slowest(here) == 2
    assert describe("rollout engine", here) == (
        "rollout engine 2: loading weights, shard 3 of 118, 41 s (of the others 1 compiling, 1 up, 1 loading weights)"
    )
    assert describe("teacher", {7: here[2]}) == "teacher 7: loading weights, shard 3 of 118, 41 s"
    assert slowest({1: here[1]}) is None
    assert describe("teacher", {1: here[1]}) == "teacher 1 is up"
    assert describe("teacher", {0: here[1], 1: here[1]}) == "all 2 teachers are up"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (41.4, "41 s"), (99, "99 s"), (205, "3:25"), (3805, "1:03:25"), (-1, "0 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
