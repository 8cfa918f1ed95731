"""Graded responses -> pass@k, mode adherence and length by mode: ``s2w eval``'s report, and a run's held-out scores."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from s2w.eval.grading import Graded
from s2w.eval.statistics import Estimate, bootstrap, pass_at_k
from s2w.records import Mode

ALL = "all"
"""Stands for all tasks together."""


@dataclass(frozen=True, slots=True)
class Scores:
    """One line of the table: a task, or all, in one mode at one thinking budget. Shares are of responses."""

    task: str
    mode: Mode
    thinking_budget: int | None
    problems: int
    responses: int
    pass_at: dict[int, Estimate]
    """pass@k by k; mean over problems, 95 % interval over problems."""
    mode_adherence: float
    truncated: float
    forced: float
    """Think block closed by the thinking budget."""
    response_length: float
    """Tokens, mean over responses."""


@dataclass(frozen=True, slots=True)
class ProblemCount:
    """How often one problem was solved: from these counts any pass@k and any paired test can be recomputed."""

    uid: str
    task: str
    mode: Mode
    thinking_budget: int | None
    samples: int
    correct: int


@dataclass(frozen=True, slots=True)
class EvalReport:
    """What ``s2w eval`` found."""

    model: str
    revision: str | None
    seed: int
    sampling: dict[str, Any]
    """temperature, top_p, top_k, max_tokens."""
    scores: list[Scores]
    problems: list[ProblemCount]

    def to_json(self) -> str:
        """The report as JSON; keys of ``pass_at`` are the k as strings."""
        return json.dumps(asdict(self), indent=2)

    def table(self) -> str:
        """The report as text, one line for each of ``scores``."""
        several = len({scores.task for scores in self.scores}) > 1
        budgets = any(scores.thinking_budget is not None for scores in self.scores)
        columns = [
            *([_Column("task", "<", lambda s: s.task)] if several else []),
            _Column("mode", "<", lambda s: s.mode),
            *([_Column("budget", ">", lambda s: str(s.thinking_budget or "none"))] if budgets else []),
            *([_Column("forced", ">", lambda s: f"{s.forced:.3f}")] if budgets else []),
            _Column("problems", ">", lambda s: str(s.problems)),
            *(_Column(f"pass@{k} [95 %]", ">", functools.partial(_pass_at, k)) for k in self.scores[0].pass_at),
            _Column("adherence", ">", lambda s: f"{s.mode_adherence:.3f}"),
            _Column("truncated", ">", lambda s: f"{s.truncated:.3f}"),
            _Column("tokens", ">", lambda s: f"{s.response_length:.1f}"),
        ]
        rows = [[column.head for column in columns]]
        rows += [[column.text(scores) for column in columns] for scores in self.scores]
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:{column.align}{width}}" for cell, column, width in zip(row, columns, widths, strict=True))
            for row in rows
        )


@dataclass(frozen=True, slots=True)
class _Column:
    """One column of the table."""

    head: str
    align: Literal["<", ">"]
    text: Callable[[Scores], str]


def _pass_at(k: int, scores: Scores) -> str:
    estimate = scores.pass_at[k]
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def make_report(
    graded: Iterable[tuple[int | None, Graded]],
    ks: Sequence[int],
    *,
    model: str,
    revision: str | None,
    seed: int,
    sampling: Mapping[str, Any],
) -> EvalReport:
    """Aggregates graded responses.

    Args:
        graded: each response with the thinking budget that it was sampled under (None: none).
        ks: values of k for pass@k.
        seed: seed of the sampling, and of the bootstrap.

    Raises:
        ValueError: a response has no verifier, or a problem has fewer samples than a k.
    """
    groups: defaultdict[tuple[Mode, int | None], list[Graded]] = defaultdict(list)
    for budget, one in graded:
        groups[one.mode, budget].append(one)
    scores: list[Scores] = []
    problems: list[ProblemCount] = []
    for (mode, budget), members in groups.items():
        by_uid: defaultdict[str, list[Graded]] = defaultdict(list)
        for one in members:
            if one.correct is None:
                raise ValueError(f"the responses to {one.uid} were not verified")
            by_uid[one.uid].append(one)
        counts = [
            ProblemCount(uid, own[0].task, mode, budget, len(own), sum(bool(one.correct) for one in own))
            for uid, own in by_uid.items()
        ]
        problems += counts
        tasks = list(dict.fromkeys(one.task for one in members))
        for task in ([ALL] if len(tasks) > 1 else []) + tasks:
            own = [one for one in members if task in (ALL, one.task)]
            own_counts = [count for count in counts if task in (ALL, count.task)]
            scores.append(
                Scores(
                    task=task,
                    mode=mode,
                    thinking_budget=budget,
                    problems=len(own_counts),
                    responses=len(own),
                    pass_at={
                        k: bootstrap([pass_at_k(count.samples, count.correct, k) for count in own_counts], seed)
                        for k in ks
                    },
                    mode_adherence=_mean(one.adherent for one in own),
                    truncated=_mean(one.truncated for one in own),
                    forced=_mean(one.forced for one in own),
                    response_length=_mean(one.tokens for one in own),
                )
            )
    return EvalReport(model, revision, seed, dict(sampling), scores, problems)


def mode_scores(graded: Sequence[Graded]) -> dict[str, dict[str, float]]:
    """By mode: ``prompts``, and the mean of each of :attr:`Graded.metrics` over the responses that have it.

    One response to each prompt, so accuracy is pass@1. A mode whose prompts have no verifier has no accuracy.
    """
    scores: dict[str, dict[str, float]] = {}
    for mode in sorted({one.mode for one in graded}):
        own = [one for one in graded if one.mode == mode]
        scores[mode] = {"prompts": len(own)} | mean_metrics(own)
    return scores


def mean_metrics(graded: Iterable[Graded]) -> dict[str, float]:
    """The mean of each of :attr:`Graded.metrics` over the responses that have it."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for one in graded:
        for name, value in one.metrics.items():
            values[name].append(value)
    return {name: _mean(given) for name, given in values.items()}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
