"""What a metric is: a name, a unit, and how its values are aggregated.

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
"""Value of a metric in one step: a number, or several by name (a stage, a finish reason)."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric."""

    name: str
    unit: str
    """``nats/token``, ``tokens``, ``s``, ``share``, ``1`` where it has none."""
    text: str
    """What it is, one sentence."""
    over: Over = "step"
    """``tokens``: one value per response token, summed over each sample by the learner; the metric is the mean over all
    tokens of the step, and of each mode. ``samples``: one value per sample, averaged likewise. ``step``: one value."""
    column: str = ""
    """Heading of its column in the progress line; empty leaves it out."""
    format: str = ".4g"
    """Format of the value in that column, as for :func:`format`."""


METRICS: dict[str, Metric] = {}
"""Every metric by name, in the order of definition."""


def define(name: str, unit: str, text: str, *, over: Over = "step", column: str = "", format: str = ".4g") -> Metric:
    """Defines a metric.

    Raises:
        ValueError: there is another one by that name.
    """
    metric = Metric(name, unit, text, over, column, format)
    if METRICS.setdefault(name, metric) != metric:
        raise ValueError(f"the metric {name!r} is defined twice: {METRICS[name]} and {metric}")
    return metric


def definitions() -> list[dict[str, Any]]:
    """All metrics as JSON values, for a reader of the run that knows none of them."""
    return [asdict(metric) for metric in METRICS.values()]
