"""The lines that a person watches."""

from __future__ import annotations

import re
from typing import Any

import pytest

import s2w.observe.step_report  # noqa: F401 (the metrics of a line)
from s2w.metric import METRICS, define
from s2w.observe.progress import Progress

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
