"""Before and after: each held-out metric at the first and the last version, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from s2w.eval.statistics import (
    Estimate,
    bootstrap,
    bootstrap_token_mean,
    bootstrap_token_mean_change,
    wilson,
)
from s2w.records import Heldout, HeldoutResponse, Mode
from s2w.report.run import Run

Metric = Literal["forward_kl", "reverse_kl", "accuracy", "mode_adherence", "truncated", "response_length"]
KL: tuple[Metric, ...] = ("forward_kl", "reverse_kl")
SHARES: tuple[Metric, ...] = ("accuracy", "mode_adherence", "truncated")
SEED = 0
"""Seed of the bootstrap: reports of the same run are the same."""
_SHARE_OF: dict[Metric, Callable[[HeldoutResponse], bool | None]] = {
    "accuracy": lambda response: response.correct,
    "mode_adherence": lambda response: response.adherent,
    "truncated": lambda response: response.truncated,
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One line of the table. An estimate without interval has NaN ends."""

    metric: Metric
    mode: Mode | None
    """None: all together."""
    before: Estimate
    after: Estimate | None
    """None: there was only one evaluation."""
    change: Estimate | None
    """After minus before, paired, over the prompts that were asked both times."""

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """Whether the interval of the change is on one side of 0, and on which."""
        if self.change is None or not (self.change.low > 0 or self.change.high < 0):
            return "unclear"
        rises_when_better = self.metric in ("accuracy", "mode_adherence")
        return "better" if (self.change.low > 0) == rises_when_better else "worse"


def estimate(responses: Sequence[HeldoutResponse], metric: Metric) -> Estimate | None:
    """A metric of some responses with its interval: bootstrap over responses for KL, Wilson's for shares.

    None if they do not have it: no response, no verifier.
    """
    if metric in KL:
        return bootstrap_token_mean(*_token_means(responses, metric), SEED) if responses else None
    outcomes = [outcome for one in responses if (outcome := _SHARE_OF[metric](one)) is not None]
    return wilson(sum(outcomes), len(outcomes)) if outcomes else None


def compare(run: Run) -> list[Comparison]:
    """The table; without held-out evaluations it is empty. Runs that kept no responses have no intervals."""
    if not run.heldout:
        return []
    first, last = run.heldout[0], run.heldout[-1] if len(run.heldout) > 1 else None
    modes: list[Mode] = [mode for mode in run.modes if mode in first.by_mode]
    wanted: list[tuple[Metric, Mode | None]] = [("forward_kl", None), ("reverse_kl", None), ("response_length", None)]
    for mode in modes:
        wanted += [(metric, mode) for metric in (*SHARES, "response_length")]
        if len(modes) > 1:
            wanted += [(metric, mode) for metric in KL]
    return [line for metric, mode in wanted if (line := _compare(run, first, last, metric, mode)) is not None]


def _compare(run: Run, first: Heldout, last: Heldout | None, metric: Metric, mode: Mode | None) -> Comparison | None:
    before = _at(run, first, metric, mode)
    if before is None or before.value != before.value:
        return None
    if last is None:
        return Comparison(metric, mode, before, None, None)
    after = _at(run, last, metric, mode)
    change = _change(run.responses_at(first.version, mode), run.responses_at(last.version, mode), metric)
    if after is not None and change is None:
        change = _bare(after.value - before.value)
    return Comparison(metric, mode, before, after, change)


def _at(run: Run, heldout: Heldout, metric: Metric, mode: Mode | None) -> Estimate | None:
    if metric != "response_length" and (known := estimate(run.responses_at(heldout.version, mode), metric)) is not None:
        return known
    value = getattr(heldout, metric, None) if mode is None else heldout.by_mode.get(mode, {}).get(metric)
    return None if value is None else _bare(value)


def _change(before: Sequence[HeldoutResponse], after: Sequence[HeldoutResponse], metric: Metric) -> Estimate | None:
    """None if responses do not have the metric, there are no pairs, or no pair differs: no spread, no interval."""
    if metric == "response_length":
        return None
    earlier = {(one.mode, one.uid): one for one in before}
    pairs = [(earlier[key], one) for one in after if (key := (one.mode, one.uid)) in earlier]
    if not pairs:
        return None
    if metric in KL:
        first, second = (_token_means(moment, metric) for moment in zip(*pairs, strict=True))
        return bootstrap_token_mean_change(first, second, SEED)
    outcome = _SHARE_OF[metric]
    outcomes = [(outcome(one), outcome(other)) for one, other in pairs]
    differences = [float(y) - float(x) for x, y in outcomes if x is not None and y is not None]
    return bootstrap(differences, SEED) if any(differences) else None


def _token_means(responses: Sequence[HeldoutResponse], metric: Metric) -> tuple[list[float], list[int]]:
    return [getattr(one, metric) for one in responses], [one.tokens for one in responses]


def _bare(value: float) -> Estimate:
    return Estimate(value, float("nan"), float("nan"))
