"""What a run leaves behind."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from s2w.observe.recorder import Recorder
from s2w.observe.timeline import Timeline
from s2w.records import Heldout, HeldoutResponse, HeldoutSample


def heldout(version: int | None) -> Heldout:
    if version is None:
        return Heldout(None, 0.0, 0.0, 100, 10.0)
    return Heldout(version, 2.0 / (version + 1), math.nan if version == 9 else 1.0, 100, 10.0)


def recorder(directory: Path, step: int) -> Recorder:
    return Recorder(
        directory,
        step=step,
        off_policy_step=0,
        config={},
        tensorboard=True,
        wandb=None,
        name="test",
        began=time.time() - 100.0,
    )


def evaluate(recorder: Recorder, version: int | None) -> None:
    recorder.heldout(
        heldout(version),
        [HeldoutResponse(version, "a/0", "think", 10, 2.0, 1.0, None, True, False)],
        [HeldoutSample(version, "a/0", "think", "1 + 1?", "<think>\n2\n</think>", None, True, "stop")],
    )


def test_a_resumed_run_drops_what_it_does_again(tmp_path: Path) -> None:
    first = recorder(tmp_path, 0)
    timeline = Timeline(tmp_path / "timeline.jsonl")
    for version in (0, 4, 8):
        evaluate(first, version)
        timeline.add("learn", 0, [(version, version + 1.0)], version)
    first.close()
    assert [result.version for result in recorder(tmp_path, 4).evaluations()] == [0, 4]
    for name, key in (("heldout_responses", "version"), ("samples", "version"), ("timeline", "step")):
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [line[key] for line in lines] == [0, 4], name
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("torn", ["heldout", "heldout_responses", "samples", "timeline"])
def test_a_torn_line_is_not_read_and_nothing_is_glued_to_it(tmp_path: Path, torn: str) -> None:
    first = recorder(tmp_path, 0)
    timeline = Timeline(tmp_path / "timeline.jsonl")
    for version in (0, 4):
        evaluate(first, version)
        timeline.add("learn", 0, [(version, version + 1.0)], version)
    # A kill in the middle of the last line; what is written after it, in one process or the next, is whole.
    path = tmp_path / f"{torn}.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    timeline.add("learn", 0, [(5.0, 6.0)], 5)
    assert [json.loads(line)["step"] for line in (tmp_path / "timeline.jsonl").read_text().splitlines()] == [
        0, *([4] if torn != "timeline" else []), 5,
    ]  # fmt: skip
    resumed = recorder(tmp_path, 4)
    # An evaluation whose last line is torn is none, so that it is made again.
    evaluated = [0] if torn == "heldout" else [0, 4]
    assert [result.version for result in resumed.evaluations()] == evaluated
    for name in ("heldout_responses", "samples"):
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [line["version"] for line in lines] == ([0] if torn in (name, "heldout") else [0, 4])


@pytest.mark.parametrize("version", [0, 9])
def test_evaluations_read_back(tmp_path: Path, version: int) -> None:
    first = recorder(tmp_path, 10)
    evaluate(first, version)
    [again] = first.evaluations()
    assert repr(again) == repr(heldout(version))
    first.close()
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_teachers_evaluation_stands_apart_and_is_made_once(tmp_path: Path) -> None:
    first = recorder(tmp_path, 0)
    assert first.teacher_evaluation() is None
    evaluate(first, None)
    evaluate(first, 0)
    first.close()
    resumed = recorder(tmp_path, 0)
    assert resumed.teacher_evaluation() == heldout(None)
    assert [result.version for result in resumed.evaluations()] == [0]
    for name in ("heldout", "heldout_responses", "samples"):
        [line] = (tmp_path / "teacher_heldout" / f"{name}.jsonl").read_text().splitlines()
        assert json.loads(line)["version"] is None
    # One that was not written completely is made again, and leaves nothing twice.
    (tmp_path / "teacher_heldout" / "heldout.jsonl").unlink()
    again = recorder(tmp_path, 0)
    assert again.teacher_evaluation() is None
    evaluate(again, None)
    assert len((tmp_path / "teacher_heldout" / "samples.jsonl").read_text().splitlines()) == 1


def test_the_time_of_all_starts(tmp_path: Path) -> None:
    """Each began 100 s before its recorder; the first was killed, 5 s after its last record."""
    evaluate(recorder(tmp_path, 0), 0)
    path = tmp_path / "segments.json"
    [first] = json.loads(path.read_text())
    assert 100 <= first["until"] - first["began"] < 110
    path.write_text(json.dumps([{"began": first["began"] - 5.0, "until": first["until"] - 5.0}]))
    second = recorder(tmp_path, 0)
    assert 200 <= second.wall_seconds < 220
    assert len(json.loads(path.read_text())) == 2 and not list(tmp_path.glob("*.partial"))
