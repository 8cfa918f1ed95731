"""Turns what the parts report about a step into its :class:`~s2w.records.StepReport`, and keeps the run's totals."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from typing import Any

from s2w.eval.grading import Graded
from s2w.eval.report import mode_scores
from s2w.learner.group import LearnerStep
from s2w.observe.timeline import Stage, Timeline, merge, seconds
from s2w.records import Scored, StepReport
from s2w.weights.probe import ProbeResult
from s2w.weights.publish import SwapReport


class StepReporter:
    """Measures steps; one for a run.

    Args:
        timeline: gets the work of every actor.
    """

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self._began = time.time()
        self._tokens: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._swaps: list[tuple[float, float]] = []

    def begin(self) -> None:
        """A step starts now."""
        self._began = time.time()

    def finish(
        self,
        step: int,
        samples: list[Scored],
        graded: list[Graded],
        update: LearnerStep,
        swapped: tuple[SwapReport, ProbeResult] | None,
        learning: float,
        swapping: float,
    ) -> StepReport:
        """The report of the step that ends now.

        Args:
            step: updates done, this one included.
            samples: the batch that was learned.
            graded: its answers, in the same order.
            swapped: how the swap went; None if it failed.
            learning, swapping: when the update and the swap began, ``time.time()``.
        """
        now = time.time()
        rollouts = [sample.rollout for sample in samples]
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        response = sum(lengths)
        # The others are responses of the teacher (loop.off_policy_fraction).
        written = [rollout for rollout in rollouts if rollout.versions]
        signals = [sample.signal for sample in samples if sample.signal]
        prompt = sum(len(rollout.prompt.token_ids) for rollout in rollouts)
        work = {
            "generate": (
                sum(len(rollout.token_ids) for rollout in written),
                self._worked("generate", [(r.engine, r.started, r.finished) for r in written], step),
            ),
            "score": (
                sum(len(sample.rollout.input_ids) for sample in samples if sample.signal)
                - sum(signal.cached_tokens for signal in signals),
                self._worked("score", [(s.teacher, s.started, s.finished) for s in signals], step),
            ),
            "learn": (prompt + response, self._worked("learn", [(0, learning, learning + update.seconds)], step)),
        }
        pause_ms, probe_error = math.nan, math.nan
        if swapped is not None:
            swap, probe = swapped
            pause_ms, probe_error = swap.pause_ms, probe.mean
            self._worked("swap", [(0, swapping, swapping + swap.total_ms / 1e3)], step)
            self._swaps.append((pause_ms, probe_error))
        for stage, (tokens, spent) in work.items():
            self._tokens[stage] += tokens
            self._seconds[stage] += spent
        ages = [(step - 1 - span.version, span.stop - span.start) for r in rollouts for span in r.versions]
        finish = Counter(rollout.finish_reason for rollout in written)
        return StepReport(
            step=step,
            loss=update.loss,
            divergence=update.means.divergence,
            student_entropy=update.means.student_entropy,
            teacher_entropy=update.means.teacher_entropy,
            agreement=update.means.agreement,
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            skipped=int(bool(update.skipped)),
            prompts=len({rollout.prompt.uid for rollout in rollouts}),
            response_tokens=response,
            response_length=sum(len(rollout.token_ids) for rollout in written) / len(written),
            finish={reason: count / len(written) for reason, count in sorted(finish.items())},
            staleness_mean=sum(age * tokens for age, tokens in ages) / sum(tokens for _, tokens in ages),
            staleness_max=max(age for age, _ in ages),
            tokens_per_second={stage: tokens / spent if spent else 0.0 for stage, (tokens, spent) in work.items()},
            busy=self.timeline.busy(self._began, now),
            signal_bytes_per_token=sum(signal.nbytes for signal in signals) / response,
            signal_seconds={
                "put": sum(sample.signal.put_seconds for sample in samples if sample.signal is not None),
                "fetch": update.fetch_seconds,
                "wait": update.wait_seconds,
            },
            signal_bias=update.signal_bias,
            swap_ms=pause_ms,
            probe_error=probe_error,
            seconds=now - self._began,
            by_mode=_by_mode(samples, graded, update),
        )

    def totals(self) -> dict[str, Any]:
        """``tokens_per_second`` by stage, ``swap_ms`` (median) and ``probe_error`` (largest) over the steps so far."""
        pauses = sorted(pause for pause, _ in self._swaps)
        return {
            "tokens_per_second": {
                stage: self._tokens[stage] / spent for stage, spent in self._seconds.items() if spent
            },
            "swap_ms": pauses[len(pauses) // 2] if pauses else None,
            "probe_error": max((error for _, error in self._swaps), default=None),
        }

    def _worked(self, stage: Stage, intervals: list[tuple[int, float, float]], step: int) -> float:
        """Seconds in which at least one actor of the stage worked for this step."""
        by_actor: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
        for actor, start, stop in intervals:
            by_actor[actor].append((start, stop))
        merged = [
            interval for actor, own in by_actor.items() for interval in self.timeline.add(stage, actor, own, step)
        ]
        return seconds(merge(merged))


def _by_mode(samples: list[Scored], graded: list[Graded], update: LearnerStep) -> dict[str, dict[str, float]]:
    """``StepReport.by_mode``: what the learner saw of each mode, and what its responses are worth."""
    own = [one for sample, one in zip(samples, graded, strict=True) if sample.rollout.versions]
    result: dict[str, dict[str, float]] = {}
    for mode, scores in mode_scores(own).items():
        means = update.by_mode[mode]
        result[mode] = {
            "responses": scores["prompts"],
            "divergence": means.divergence,
            "student_entropy": means.student_entropy,
            "teacher_entropy": means.teacher_entropy,
        }
        for name in ("response_length", "truncated", "obedience", "accuracy"):
            if name in scores:
                result[mode][name] = scores[name]
    return result
