"""Before, after, and the teacher: each held-out metric with 95 % intervals, and how much of the gap was closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from s2w.eval.statistics import (
    Estimate,
    bootstrap,
    bootstrap_token_mean,
    bootstrap_token_mean_change,
    gap_closed,
    paired_change,
    wilson,
)
from s2w.records import Heldout, HeldoutResponse, Mode
from s2w.report.run import Run

Metric = Literal[
    "forward_kl", "reverse_kl", "accuracy", "mode_adherence", "truncated", "repetitive", "unusable", "response_length"
]
Kind = Literal["mode", "teacher", "task"]
"""What the held-out prompts are divided by."""
KL: tuple[Metric, ...] = ("forward_kl", "reverse_kl")
SHARES: tuple[Metric, ...] = ("accuracy", "mode_adherence", "truncated", "repetitive")
SEED = 0
"""Seed of the bootstrap: reports of the same run are the same."""
_SHARE_OF: dict[Metric, Callable[[HeldoutResponse], bool | None]] = {
    "accuracy": lambda response: response.correct,
    "mode_adherence": lambda response: response.adherent,
    "truncated": lambda response: response.truncated,
    "repetitive": lambda response: response.repetitive,
    # Truncated or repetitive: nothing that a user could do anything with.
    "unusable": lambda response: response.truncated or bool(response.repetitive),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One line of a table. An estimate without interval has NaN ends."""

    metric: Metric
    kind: Kind | None
    """None: all prompts together."""
    name: str
    """The mode, the teacher or the task; empty for all."""
    prompts: int
    """Those that have the metric before; 0 if it is not known."""
    before: Estimate
    after: Estimate | None
    """None: there was only one evaluation."""
    change: Estimate | None
    """After minus before, paired, over the prompts that were asked both times."""
    teacher: Estimate | None
    """Of the teacher's own responses; None if they were not asked for, and for KL, which is 0."""

    @property
    def verdict(self) -> Literal["better", "worse", "unclear"]:
        """Whether the interval of the change is on one side of 0, and on which; a length is neither."""
        if self.metric == "response_length" or self.change is None:
            return "unclear"
        if not (self.change.low > 0 or self.change.high < 0):
            return "unclear"
        rises_when_better = self.metric in ("accuracy", "mode_adherence")
        return "better" if (self.change.low > 0) == rises_when_better else "worse"


@dataclass(frozen=True, slots=True)
class Gap:
    """What the teacher's accuracy was above the student's before, and how much of that was closed."""

    mode: Mode | None
    """None: all together."""
    prompts: int
    size: Estimate
    """Teacher minus before, paired."""
    closed: Estimate | None
    """1 is all of it; None where the interval of ``size`` does not exclude 0."""


def estimate(responses: Sequence[HeldoutResponse], metric: Metric) -> Estimate | None:
    """A metric of some responses with its interval: bootstrap over responses for KL and length, Wilson's for shares.

    None if they do not have it: no response, no verifier, a file of an older version.
    """
    if metric in KL:
        return bootstrap_token_mean(*_token_means(responses, metric), SEED) if responses else None
    if metric == "response_length":
        lengths = [one.length for one in responses if one.length is not None]
        return bootstrap(lengths, SEED) if lengths else None
    outcomes = [outcome for one in responses if (outcome := _SHARE_OF[metric](one)) is not None]
    return wilson(sum(outcomes), len(outcomes)) if outcomes else None


def estimate_at(
    run: Run, heldout: Heldout, metric: Metric, kind: Kind | None = None, name: str = ""
) -> Estimate | None:
    """A metric of one evaluation, over all prompts or those of a mode, teacher or task.

    Without interval where the run kept no responses; None if it is not known.
    """
    if (known := estimate(_of(run.responses_at(heldout.version), kind, name), metric)) is not None:
        return known
    value = getattr(heldout, metric, None) if kind is None else heldout.by_mode.get(name, {}).get(metric)
    return None if value is None else _bare(value)


def compare(run: Run) -> list[Comparison]:
    """All metrics over all prompts, then by mode if there are several; without held-out evaluations it is empty.

    Runs that kept no responses have no intervals, and shares by mode only.
    """
    if not run.heldout:
        return []
    metrics: tuple[Metric, ...] = ("accuracy", *KL, "mode_adherence", "truncated", "repetitive", "response_length")
    lines = [_compare(run, metric, None, "") for metric in metrics]
    modes = [mode for mode in run.modes if mode in run.heldout[0].by_mode]
    if len(modes) > 1 or not run.responses:
        lines += [_compare(run, metric, "mode", mode) for mode in modes for metric in metrics]
    return [line for line in lines if line is not None]


def compare_unusable(run: Run) -> Comparison | None:
    """The share of responses that are truncated or repetitive; None where responses were not kept."""
    return _compare(run, "unusable", None, "") if run.heldout else None


def compare_by(run: Run, kind: Kind) -> list[Comparison]:
    """Accuracy, both KL, truncation and length by teacher or by task; empty if there is only one."""
    names = sorted({getattr(one, kind) for one in run.responses})
    if len(names) < 2 or not run.heldout:
        return []
    metrics: tuple[Metric, ...] = ("accuracy", *KL, "truncated", "response_length")
    lines = [_compare(run, metric, kind, name) for name in names for metric in metrics]
    return [line for line in lines if line is not None]


def gap(run: Run, mode: Mode | None = None) -> Gap | None:
    """The gap in accuracy to the teacher, over the verified prompts that both evaluations and the teacher answered."""
    if len(run.heldout) < 2:
        return None
    sides = [run.responses_at(run.heldout[i].version) for i in (0, -1)]
    known = [
        {(one.mode, one.uid): one.correct for one in side if one.correct is not None and mode in (None, one.mode)}
        for side in (*sides, run.teacher_responses)
    ]
    keys = [key for key in known[0] if key in known[1] and key in known[2]]
    if not keys:
        return None
    before, after, teacher = ([side[key] for key in keys] for side in known)
    size = paired_change(before, teacher)
    closed = gap_closed(before, after, teacher, SEED) if size.low > 0 else None
    return Gap(mode, len(keys), size, closed)


def change_between(
    before: Sequence[HeldoutResponse], after: Sequence[HeldoutResponse], metric: Metric
) -> Estimate | None:
    """After minus before, in pairs of the same prompt; None without pairs that have the metric."""
    earlier = {(one.mode, one.uid): one for one in before}
    pairs = [(earlier[key], one) for one in after if (key := (one.mode, one.uid)) in earlier]
    if metric in KL:
        if not pairs:
            return None
        first, second = (_token_means(moment, metric) for moment in zip(*pairs, strict=True))
        return bootstrap_token_mean_change(first, second, SEED)
    if metric == "response_length":
        lengths = [(one.length, other.length) for one, other in pairs]
        differences = [y - x for x, y in lengths if x is not None and y is not None]
        return bootstrap(differences, SEED) if differences else None
    outcomes = [(_SHARE_OF[metric](one), _SHARE_OF[metric](other)) for one, other in pairs]
    known = [(x, y) for x, y in outcomes if x is not None and y is not None]
    return paired_change(*zip(*known, strict=True)) if known else None


def _compare(run: Run, metric: Metric, kind: Kind | None, name: str) -> Comparison | None:
    first, last = run.heldout[0], run.heldout[-1] if len(run.heldout) > 1 else None
    responses = _of(run.responses_at(first.version), kind, name)
    before = estimate_at(run, first, metric, kind, name)
    if before is None or before.value != before.value:
        return None
    count = sum(metric in (*KL, "response_length") or _SHARE_OF[metric](one) is not None for one in responses)
    own = _of(run.teacher_responses, kind, name)
    teacher = None if metric in KL else estimate(own, metric)
    if last is None:
        return Comparison(metric, kind, name, count, before, None, None, teacher)
    after = estimate_at(run, last, metric, kind, name)
    change = change_between(responses, _of(run.responses_at(last.version), kind, name), metric)
    if after is not None and change is None:
        change = _bare(after.value - before.value)
    return Comparison(metric, kind, name, count, before, after, change, teacher)


def _of(responses: Sequence[HeldoutResponse], kind: Kind | None, name: str) -> list[HeldoutResponse]:
    return [one for one in responses if kind is None or getattr(one, kind) == name]


def _token_means(responses: Sequence[HeldoutResponse], metric: Metric) -> tuple[list[float], list[int]]:
    return [getattr(one, metric) for one in responses], [one.tokens for one in responses]


def _bare(value: float) -> Estimate:
    return Estimate(value, float("nan"), float("nan"))
