"""The line of a step: what the parts report about it, metric by metric; and the run's totals."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2w.eval.grading import Graded
from s2w.eval.scores import mean_metrics, mode_scores
from s2w.learner.group import LearnerStep
from s2w.learner.metrics import GRAD_NORM, LEARNING_RATE, LEFT_OUT, LOSS, SKIPPED
from s2w.metric import define
from s2w.observe import jsonl
from s2w.observe.timeline import Interval, Stage, Timeline, merge, seconds
from s2w.records import Scored
from s2w.weights.probe import ProbeResult
from s2w.weights.publish import SwapReport

PROMPTS = define("prompts", "1", "Prompts of the batch.")
RESPONSE_TOKENS = define("response_tokens", "tokens", "Response tokens of the batch.")
FINISH = define("finish", "share", "Responses by finish reason.")
LENGTH_LIMIT = define("length_limit", "tokens", "Longest response that the objective allows in the next batches.")
STALENESS_MEAN = define("staleness_mean", "versions", "Versions between sampling and training, mean over tokens.")
STALENESS_MAX = define("staleness_max", "versions", "The same of the oldest token.")
RATES = define(
    "tokens_per_second",
    "tokens/s",
    "Tokens per second of a stage's busy time. generate: response tokens; score: prompt and response tokens that the "
    "teacher computed; learn: prompt and response tokens.",
    column="tok/s gen/score/learn",
    format=",.0f",
)
BUSY = define("busy", "share", "Share of the step's wall time in which a stage was at work.")
SIGNAL_BYTES = define("signal_bytes_per_token", "bytes/token", "Size of the teacher's signals.")
SIGNAL_SECONDS = define(
    "signal_seconds",
    "s",
    "The signals' way: put (encoded, checked and stored, over all teachers), fetch (taken out and joined, over all "
    "learner ranks, alongside their work), wait (the longest that a rank was idle for one).",
)
SIGNAL_BIAS = define(
    "signal_bias", "nats/token", "In steps of signal.bias_every: what each cheaper signal would have given; else empty."
)
SWAP_MS = define(
    "swap_ms",
    "ms",
    "From the pause of the engines to their resumption; NaN if the swap failed.",
    column="swap ms",
    format=".0f",
)
PROBE_ERROR = define(
    "probe_error",
    "nats",
    "Mean |log-prob difference| between engine and learner after the swap; NaN if it failed.",
    column="probe",
    format=".0e",
)
EPOCH = define("epoch", "1", "Off-policy: times that each response has been trained on.", column="epoch", format=".2f")
RESPONSES = define("responses", "1", "Responses of an off-policy update, or of a mode.")
SECONDS = define("seconds", "s", "Wall time of the step.", column="step s", format=".1f")

Line = dict[str, Any]
"""A line of metrics.jsonl: ``step``, ``phase``, metrics by name, and ``by_mode``."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When the update and the swap of a step began, ``time.time()``."""

    learning: float
    swapping: float


class StepReporter:
    """Measures steps; one for a run.

    Args:
        timeline: gets the work of every actor.
    """

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self._began = time.time()

    def begin(self) -> None:
        """A step starts now."""
        self._began = time.time()

    def finish(
        self,
        step: int,
        samples: Sequence[Scored],
        graded: Sequence[Graded],
        update: LearnerStep,
        swapped: tuple[SwapReport, ProbeResult] | None,
        times: StepTimes,
        length_limit: int,
    ) -> Line:
        """The line of the on-policy step that ends now.

        Args:
            step: updates done, this one included.
            samples: the batch that was trained on.
            graded: its answers, in the same order.
            swapped: how the swap went; None if it failed.
            length_limit: for the responses of the next batches.
        """
        now = time.time()
        rollouts = [sample.rollout for sample in samples]
        response = sum(len(rollout.token_ids) for rollout in rollouts)
        # The others are responses of the teacher (loop.off_policy_fraction).
        own = [rollout for rollout in rollouts if rollout.versions]
        own_graded = [one for rollout, one in zip(rollouts, graded, strict=True) if rollout.versions]
        signals = [signal for sample in samples for signal in (sample.signal, sample.reference) if signal]
        rates = self._rates(step, samples, update, times)
        pause_ms, probe_error = math.nan, math.nan
        if swapped is not None:
            swap, probe = swapped
            pause_ms, probe_error = swap.pause_ms, probe.mean
            self._worked("swap", [(0, times.swapping, times.swapping + swap.total_ms / 1e3)], step)
        ages = [(step - 1 - span.version, span.stop - span.start) for r in rollouts for span in r.versions]
        finish = Counter(rollout.finish_reason for rollout in own)
        return {
            "step": step,
            **update_metrics(update),
            LEFT_OUT.name: update.left_out,
            PROMPTS.name: len({rollout.prompt.uid for rollout in rollouts}),
            RESPONSE_TOKENS.name: response,
            **mean_metrics(own_graded),
            LENGTH_LIMIT.name: length_limit,
            FINISH.name: {reason: count / len(own) for reason, count in sorted(finish.items())},
            STALENESS_MEAN.name: sum(age * tokens for age, tokens in ages) / sum(tokens for _, tokens in ages),
            STALENESS_MAX.name: max(age for age, _ in ages),
            RATES.name: rates,
            BUSY.name: self.timeline.busy(self._began, now),
            SIGNAL_BYTES.name: sum(signal.nbytes for signal in signals) / response,
            SIGNAL_SECONDS.name: {
                "put": sum(signal.put_seconds for signal in signals),
                "fetch": update.fetch_seconds,
                "wait": update.wait_seconds,
            },
            SIGNAL_BIAS.name: update.signal_bias,
            SWAP_MS.name: pause_ms,
            PROBE_ERROR.name: probe_error,
            SECONDS.name: now - self._began,
            "by_mode": _by_mode(own_graded, update),
            "phase": "on_policy",
        }

    def _rates(self, step: int, samples: Sequence[Scored], update: LearnerStep, times: StepTimes) -> dict[str, float]:
        """Tokens per second, by stage."""
        own = [sample.rollout for sample in samples if sample.rollout.versions]
        scored = [
            (sample.rollout, signal) for sample in samples for signal in (sample.signal, sample.reference) if signal
        ]
        tokens = {
            "generate": sum(len(rollout.token_ids) for rollout in own),
            "score": sum(len(rollout.input_ids) - signal.cached_tokens for rollout, signal in scored),
            "learn": sum(len(sample.rollout.input_ids) for sample in samples),
        }
        work: dict[Stage, list[tuple[int, float, float]]] = {
            "generate": [(rollout.engine, rollout.started, rollout.finished) for rollout in own],
            "score": [(signal.teacher, signal.started, signal.finished) for _, signal in scored],
            "learn": [(0, times.learning, times.learning + update.seconds)],
        }
        spent = {stage: self._worked(stage, intervals, step) for stage, intervals in work.items()}
        return {stage: tokens[stage] / duration if duration else 0.0 for stage, duration in spent.items()}

    def _worked(self, stage: Stage, intervals: list[tuple[int, float, float]], step: int) -> float:
        """Seconds in which at least one actor of the stage worked for this step."""
        by_actor: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
        for actor, start, stop in intervals:
            by_actor[actor].append((start, stop))
        merged = [
            interval for actor, own in by_actor.items() for interval in self.timeline.add(stage, actor, own, step)
        ]
        return seconds(merge(merged))


def totals(steps: Sequence[Line], timeline: Path) -> dict[str, Any]:
    """``tokens_per_second`` by stage, ``swap_ms`` (median) and ``probe_error`` (largest) over steps.

    Args:
        steps: their lines, those of a resumed run from before it was interrupted too.
        timeline: the file with the work of every actor in them.
    """
    work: defaultdict[tuple[str, int], list[Interval]] = defaultdict(list)
    for line in jsonl.read(timeline):
        work[line["stage"], line["step"]].append((line["start"], line["stop"]))
    tokens: Counter[str] = Counter()
    spent: defaultdict[str, float] = defaultdict(float)
    for line in steps:
        for stage, rate in line[RATES.name].items():
            busy = seconds(merge(work[stage, line["step"]]))
            tokens[stage] += rate * busy
            spent[stage] += busy
    pauses, errors = (
        sorted(line[name] for line in steps if not math.isnan(line[name])) for name in (SWAP_MS.name, PROBE_ERROR.name)
    )
    return {
        RATES.name: {stage: tokens[stage] / busy for stage, busy in spent.items() if busy},
        SWAP_MS.name: pauses[len(pauses) // 2] if pauses else None,
        PROBE_ERROR.name: errors[-1] if errors else None,
    }


def off_policy_line(step: int, samples: Sequence[Scored], update: LearnerStep, *, epoch: float, spent: float) -> Line:
    """The line of an off-policy step.

    Args:
        epoch: times that each response has been trained on.
        spent: wall time of the step, seconds.
    """
    tokens = sum(len(sample.rollout.input_ids) for sample in samples)
    return {
        "step": step,
        EPOCH.name: epoch,
        **update_metrics(update),
        RESPONSES.name: len(samples),
        RESPONSE_TOKENS.name: update.tokens,
        RATES.name: {"learn": tokens / update.seconds},
        SECONDS.name: spent,
        "phase": "off_policy",
    }


def update_metrics(update: LearnerStep) -> Line:
    """What an update reports, by metric."""
    return {
        LOSS.name: update.loss,
        **update.metrics,
        GRAD_NORM.name: update.grad_norm,
        LEARNING_RATE.name: update.learning_rate,
        SKIPPED.name: int(bool(update.skipped)),
    }


def _by_mode(own: Sequence[Graded], update: LearnerStep) -> dict[str, dict[str, float]]:
    """By mode, for the responses that the student sampled: the learner's metrics and the grades."""
    result: dict[str, dict[str, float]] = {}
    for mode, scores in mode_scores(own).items():
        responses = {RESPONSES.name: scores.pop("prompts")}
        result[mode] = {**responses, **update.by_mode.get(mode, {}), **scores}
    return result
