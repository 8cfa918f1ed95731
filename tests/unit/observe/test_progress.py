"""The lines that a person watches."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from terminal import Terminal

import s2w.observe.step_report  # noqa: F401 (the metrics of a line)
from s2w.actors.stages import UP, Stage
from s2w.metric import METRICS, define
from s2w.observe import progress as module
from s2w.observe import screen
from s2w.observe.progress import Progress, bar

LINE: dict[str, Any] = {
    "phase": "on_policy",
    "step": 1,
    "loss": 9.75,
    "divergence": 1.23456,
    "agreement": 0.625,
    "tokens_per_second": {"generate": 1234.5, "score": 540.0, "learn": 0.0},
    "probe_error": 1.25e-5,
    "seconds": 30.0,
    "by_mode": {},
}


@pytest.fixture
def progress() -> Progress:
    return Progress({"off_policy": 10, "on_policy": 4})


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_metrics_with_a_column_stand_under_their_heads(progress: Progress, capsys: pytest.CaptureFixture[str]) -> None:
    progress.step(LINE)
    head, first = printed(capsys)
    # In the order of their definitions, and only those that the line has; the loss has no column.
    shown = [one for one in METRICS.values() if one.column and one.name in LINE]
    assert [one.name for one in shown] == sorted(
        ["divergence", "agreement", "tokens_per_second", "probe_error", "seconds"], key=list(METRICS).index
    )
    assert re.split(r" {2,}", head.strip()) == ["step", *(one.column for one in shown), "left"]
    cells = {
        "divergence": "1.2346", "agreement": "62%", "tokens_per_second": "1,234/540/0", "probe_error": "1e-05",
        "seconds": "30.0",
    }  # fmt: skip
    assert re.split(r" {2,}", first.strip()) == ["1/4", *(cells[one.name] for one in shown), "1:30"]
    # Columns are as wide as their heads.
    assert len(head) == len(first)
    for one in shown:
        end = head.index(f"  {one.column}") + 2 + len(one.column)
        assert first[:end].endswith(cells[one.name])


def test_a_head_stands_once_in_a_phase(progress: Progress, capsys: pytest.CaptureFixture[str]) -> None:
    progress.step({**LINE, "phase": "off_policy", "step": 10, "epoch": 2.5})
    head, line = printed(capsys)
    assert "epoch" in head and "2.50" in line and line.split()[0] == "10/10"
    progress.step(LINE)
    assert len(printed(capsys)) == 2
    progress.step({**LINE, "step": 2})
    [line] = printed(capsys)
    assert line.split()[0] == "2/4"


def test_a_new_metric_needs_nothing_but_its_definition(progress: Progress, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        define("surprise", "nats/token", "Minus log-prob of the sampled token.", column="surprise", format=".1f")
        progress.step({**LINE, "surprise": 2.25})
    finally:
        METRICS.pop("surprise", None)
    head, line = printed(capsys)
    assert head.split()[-2] == "surprise" and line.split()[-2] == "2.2"


def test_the_summary_has_the_teacher_beside_before_and_after(
    progress: Progress, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = {
        name: {"forward_kl": kl, "reverse_kl": kl, "by_mode": {"think": {"accuracy": accuracy}}}
        for name, kl, accuracy in (("before", 2.0, 0.25), ("after", 0.5, 0.5))
    }
    rest: dict[str, Any] = {"tokens_per_second": {}, "swap_ms": None, "probe_error": None, "wall_seconds": 90.0}
    progress.summary({"heldout": moments, **rest})
    assert "accuracy, think                  0.250     0.500" in printed(capsys)
    progress.summary({"heldout": {**moments, "teacher": {"by_mode": {"think": {"accuracy": 0.875}}}}, **rest})
    assert "accuracy, think                  0.250     0.500   teacher 0.875" in printed(capsys)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(screen, "REDRAW_S", 0.0)
    terminal = Terminal(columns=110)
    yield terminal
    terminal.close()


LOADING = Stage("loading weights", "shard 3 of 118", 41.0, 4)


def start(progress: Progress) -> None:
    """A teacher and two rollout engines start."""
    progress.say("starting teacher and rollout engines ...")
    progress.starting("teacher", {0: Stage("importing vLLM", seconds=4.0, number=1)})
    progress.starting("rollout engine", {0: LOADING, 1: Stage("compiling", seconds=2.0, number=5)})
    progress.starting("teacher", {0: LOADING})
    progress.starting("teacher", {0: Stage("loading weights", "shard 4 of 118", 42.0, 4)})
    progress.starting("rollout engine", {0: Stage(UP, number=7), 1: Stage("compiling", seconds=3.0, number=5)})


def test_a_terminal_shows_who_does_what(terminal: Terminal) -> None:
    with Progress({}, stream=terminal.stream) as progress:
        start(progress)
        assert terminal.screen() == [
            "starting teacher and rollout engines ...",
            "  teacher 0: loading weights, shard 4 of 118, 42 s",
            "  rollout engine 1: compiling, 3 s (of the others 1 up)",
        ]
        progress.started("rollout engine", {0: Stage(UP), 1: Stage(UP)}, 71.0)
        assert terminal.screen()[1:] == [
            "all 2 rollout engines are up after 71 s",
            "  teacher 0: loading weights, shard 4 of 118, 42 s",
        ]
        # One that fails leaves its line; the error says the rest.
        progress.started("teacher", {0: LOADING}, 600.0)
        assert terminal.screen()[1:] == ["all 2 rollout engines are up after 71 s"]
        progress.now("step 3/20 swapping the weights")
    assert terminal.screen()[1:] == ["all 2 rollout engines are up after 71 s"]


def test_a_log_has_a_line_for_each_stage_and_a_reminder(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    progress = Progress({}, stream=file)
    start(progress)
    told = [
        "starting teacher and rollout engines ...",
        "teacher 0: importing vLLM, 4 s",
        "rollout engine 0: loading weights, shard 3 of 118, 41 s (of the others 1 compiling)",
        "teacher 0: loading weights, shard 3 of 118, 41 s",
        "rollout engine 1: compiling, 3 s (of the others 1 up)",
    ]
    assert file.getvalue().splitlines() == told
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + module.REMIND_S)
    progress.starting("teacher", {0: Stage("loading weights", "shard 90 of 118", 101.0, 4)})
    progress.starting("teacher", {0: Stage("loading weights", "shard 91 of 118", 102.0, 4)})
    progress.started("teacher", {0: Stage(UP)}, 205.0)
    progress.now("step 1/4 updating")
    with progress.batch("step 1/4", 8) as batch:
        batch.generated()
    told += ["teacher 0: loading weights, shard 90 of 118, 1:41", "teacher 0 is up after 3:25"]
    assert file.getvalue().splitlines() == told
    assert "\r" not in file.getvalue() and "\x1b" not in file.getvalue()


def test_a_batch_in_progress(terminal: Terminal) -> None:
    progress = Progress({"on_policy": 20}, stream=terminal.stream)
    with progress.batch("step 3/20", 8) as ahead, progress.batch("step 2/20", 8) as batch:
        for _ in range(8):
            batch.generated()
        for teacher in ("teacher", "solver", "teacher", "teacher"):
            batch.scored(teacher)
        ahead.generated()
        assert terminal.screen() == [
            "  step 2/20 [###############.....] 8/8 generated, 4/8 scored (solver 1, teacher 3)",
            "  step 3/20 [#...................] 1/8 generated",
        ]
    assert terminal.screen() == []
    # A line of a step stays above what is under way.
    progress.now("step 2/20 updating the student on 8 responses")
    progress.step({**LINE, "step": 2})
    assert terminal.screen()[-1].startswith("  step 2/20 updating the student on 8 responses, since ")
    progress.now(None)
    assert terminal.screen()[-1].strip().startswith("2/20") and len(terminal.screen()) == 2
    assert terminal.screen()[-1].endswith("9:00  scored by solver 1, teacher 3")
    progress.step({**LINE, "step": 3})
    assert "scored by" not in terminal.screen()[-1]


def test_a_countdown_on_a_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    progress = Progress({}, stream=terminal.stream)
    with progress.countdown("generating", 80) as countdown:
        monkeypatch.setattr(time, "monotonic", lambda: now + 10)
        for _ in range(20):
            countdown.add(2500)
        [line] = terminal.screen()
        found = re.fullmatch(r"  generating \[(#+)\.+] 20 of 80 responses, ([\d,]+) tokens/s, (\d+) s left", line)
        # 50,000 tokens in 10 s, and 150,000 to come.
        assert found and len(found[1]) == 5 and found[2] == "5,000" and found[3] == "30"
        countdown.say("20 of 80 responses written")
        assert terminal.screen()[0] == "20 of 80 responses written, 5,000 tokens/s, 30 s left"
    assert len(terminal.screen()) == 1


def test_a_countdown_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress({}, stream=file).countdown("generating", 100) as countdown:
        for second in range(1, 101):
            monkeypatch.setattr(time, "monotonic", lambda second=second: now + 2 * second)
            countdown.add(30)
    # One every minute, not one for each response.
    assert file.getvalue().splitlines() == [
        "30 of 100 responses, 15 tokens/s, 2:20 left",
        "60 of 100 responses, 15 tokens/s, 80 s left",
        "90 of 100 responses, 15 tokens/s, 20 s left",
    ]


def test_quiet_and_verbose(terminal: Terminal) -> None:
    file = io.StringIO()
    progress = Progress({"on_policy": 4}, quiet=True, stream=file)
    start(progress)
    progress.started("teacher", {0: Stage(UP)}, 205.0)
    progress.step(LINE)
    with progress.countdown("generating", 1) as countdown:
        countdown.add(3)
        countdown.say("1 of 1 responses written")
    assert file.getvalue() == ""
    progress.warn("step 3: the gradient is not finite, so the update is skipped")
    progress.summary({"tokens_per_second": {}, "wall_seconds": 9.0})
    said = file.getvalue().splitlines()
    assert said == ["step 3: the gradient is not finite, so the update is skipped", "", "wall time 9 s"]
    # On a terminal that libraries write to as well, lines are only added.
    start(Progress({}, verbose=True, stream=terminal.stream))
    assert "\x1b" not in terminal.written()
    assert terminal.screen()[2] == "rollout engine 0: loading weights, shard 3 of 118, 41 s (of the others 1 compiling)"


def test_bars() -> None:
    assert [bar(share) for share in (0, 0.5, 1)] == [f"[{'.' * 20}]", f"[{'#' * 10}{'.' * 10}]", f"[{'#' * 20}]"]
