"""The lines at the top of a report: was the run good, and what did it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from s2w.report.comparison import KL, Comparison, Metric
from s2w.report.run import Run, series

TRUNCATED, ADHERENT = 0.1, 0.9
"""A larger share of truncated responses, or a smaller one that keep to their mode, is worth a remark."""
NAMES: dict[Metric, str] = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "accuracy": "accuracy",
    "mode_adherence": "mode adherence",
    "truncated": "cut off at the token limit",
    "response_length": "response length",
}


@dataclass(frozen=True, slots=True)
class Remark:
    """One line of the verdict."""

    grade: Literal["better", "worse", "unclear", "warning"]
    text: str


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """One number of the headline."""

    name: str
    value: str
    grade: Literal["better", "worse", "unclear"]


def remarks(run: Run, comparisons: Sequence[Comparison]) -> list[Remark]:
    """What a person should know first, in sentences."""
    lines: list[Remark] = []
    if not run.finished:
        planned = run.config["loop"]["steps"]
        done = run.steps[-1]["step"] if run.steps else 0
        lines.append(Remark("warning", f"The run has not finished: {done} of {planned} on-policy steps are done."))
    if not run.heldout:
        lines.append(Remark("warning", "There is no held-out evaluation yet."))
    for line in comparisons:
        overall = line.metric in KL and line.mode is None
        # A mode may get worse while the mean over all gets better.
        spoilt_mode = line.metric in KL and line.verdict == "worse"
        if overall or spoilt_mode or line.metric == "accuracy":
            lines.append(Remark(line.verdict, _sentence(line)))
    for line in comparisons:
        last = line.after or line.before
        if line.metric == "truncated" and last.value > TRUNCATED:
            lines.append(Remark("warning", f"{last.value:.0%} of the {line.mode} responses hit the token limit."))
        if line.metric == "mode_adherence" and last.value < ADHERENT:
            lines.append(Remark("warning", f"Only {last.value:.0%} of the {line.mode} responses keep to their mode."))
    return lines


def headline(run: Run, comparisons: Sequence[Comparison]) -> list[KeyFigure]:
    """KL and accuracy before and after, and what the run cost: medians over steps, the largest probe error."""
    figures = []
    for line in comparisons:
        if (line.metric == "forward_kl" and line.mode is None) or line.metric == "accuracy":
            name = NAMES[line.metric] + (f", {line.mode}" if line.mode else ", nats/token")
            after = f" → {number(line.after.value, line.metric)}" if line.after else ""
            figures.append(KeyFigure(name, number(line.before.value, line.metric) + after, line.verdict))
    seconds = run.wall_seconds if run.finished else _sum(series([*run.off_policy_steps, *run.steps], "seconds"))
    figures.append(KeyFigure("wall time" if run.finished else "time in steps", duration(seconds or 0.0), "unclear"))
    for stage in ("generate", "score", "learn"):
        if (rate := _median(series(run.steps, "tokens_per_second", stage))) is not None:
            figures.append(KeyFigure(f"tokens/s, {stage}", f"{rate:,.0f}", "unclear"))
    if (pause := _median(series(run.steps, "swap_ms"))) is not None:
        figures.append(KeyFigure("swap", f"{pause:,.0f} ms", "unclear"))
    errors = series(run.steps, "probe_error")
    if np.isfinite(errors).any():
        figures.append(KeyFigure("largest probe error", f"{np.nanmax(errors):.1e} nats", "unclear"))
    return figures


def number(value: float, metric: Metric) -> str:
    """A value as the page shows it."""
    if math.isnan(value):
        return "–"
    if metric == "response_length":
        return f"{value:,.1f}"
    return f"{value:.4f}" if metric in KL else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Such as 3 h 05 min, 12 min 30 s, 8.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _sentence(line: Comparison) -> str:
    name = NAMES[line.metric][0].upper() + NAMES[line.metric][1:] + (f" in {line.mode}" if line.mode else "")
    before = number(line.before.value, line.metric)
    if line.after is None or line.change is None:
        return f"{name} is {before}; there is no later evaluation to compare with."
    after = number(line.after.value, line.metric)
    if line.change.value == 0:
        return f"{name} stayed at {before}."
    if line.verdict == "unclear":
        why = "no interval is known" if math.isnan(line.change.low) else "the interval of the change includes 0"
        return f"{name} went from {before} to {after}: {why}."
    word = "fell" if line.change.value < 0 else "rose"
    relative = f" ({line.change.value / line.before.value:+.0%})" if line.metric in KL else ""
    return f"{name} {word} from {before} to {after}{relative}: the 95 % interval of the change excludes 0."


def _median(values: np.ndarray) -> float | None:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else None


def _sum(values: np.ndarray) -> float:
    return float(np.nansum(values))
