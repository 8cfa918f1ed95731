"""What a metric is: a name, a unit, and how its values are put together.

A metric is defined once, beside the code that computes it::

    SURPRISE = define("surprise", "nats/token", "Minus log-prob of the sampled token under the teacher.", over="tokens")

Whoever computes it hands out its values under that name. From there they reach metrics.jsonl, TensorBoard, W&B, the
progress line (those with a ``column``) and the report, averaged over ranks and by mode where ``over`` says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Over = Literal["tokens", "samples", "step"]
Value = float | dict[str, Any]
"""Of a metric in one step: a number, or numbers by a name of their own (a stage, a finish reason)."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric."""

    name: str
    unit: str
    """``nats/token``, ``tokens``, ``s``, ``share``, ``1`` where it has none."""
    text: str
    """What it is, one sentence."""
    over: Over = "step"
    """``tokens``: a value a response token, summed over each sample by the learner; the metric is the mean over all
    tokens of the step, and of each mode. ``samples``: a value a sample, its mean likewise. ``step``: one value."""
    column: str = ""
    """Head of its column in the progress line; empty leaves it out."""
    format: str = ".4g"
    """Of the value in that column, as of :func:`format`."""


METRICS: dict[str, Metric] = {}
"""Every metric by name, in the order of definition."""


def define(name: str, unit: str, text: str, *, over: Over = "step", column: str = "", format: str = ".4g") -> Metric:
    """Defines a metric.

    Raises:
        ValueError: there is another one of that name.
    """
    metric = Metric(name, unit, text, over, column, format)
    if METRICS.setdefault(name, metric) != metric:
        raise ValueError(f"the metric {name!r} is defined twice: {METRICS[name]} and {metric}")
    return metric


def definitions() -> list[dict[str, Any]]:
    """All metrics as JSON values, for a reader of a run that knows none of them."""
    return [asdict(metric) for metric in METRICS.values()]
