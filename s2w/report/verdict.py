"""The top of a report: was the run good, why, and what did it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from s2w.eval.statistics import Estimate
from s2w.report.comparison import KL, Comparison, Gap, Metric, compare_unusable, gap
from s2w.report.run import Run, series

TRUNCATED, ADHERENT = 0.1, 0.9
"""A larger share of truncated or repetitive responses, or a smaller one that keep to their mode, is worth a remark."""
GARBAGE = 0.5
"""A larger share of responses that are truncated or repetitive is no use, whatever else became better."""
TELLING = 0.1
"""A change of accuracy that matters: an interval that holds both 0 and one as large cannot tell."""
NAMES: dict[Metric, str] = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "accuracy": "accuracy",
    "mode_adherence": "mode adherence",
    "truncated": "cut off at the token limit",
    "repetitive": "repetitive",
    "response_length": "response length",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Was the run good?"""

    answer: Literal["yes", "partly", "no", "unclear"]
    text: str
    """The answer with its reason, in one sentence."""


@dataclass(frozen=True, slots=True)
class Remark:
    """One line below the verdict."""

    grade: Literal["better", "worse", "unclear", "warning"]
    text: str


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """One number of the headline."""

    name: str
    value: str


def judge(run: Run, comparisons: Sequence[Comparison]) -> Verdict:
    """Weighs accuracy first, then whether the responses are of any use, then KL."""
    if not run.heldout:
        return Verdict("unclear", "There is no held-out evaluation yet.")
    if len(run.heldout) == 1:
        return Verdict("unclear", "There is one held-out evaluation, and no later one to compare with.")
    whole = {line.metric: line for line in comparisons if line.kind is None}
    accuracies = [line for line in comparisons if line.metric == "accuracy"]
    divergence = _divergence(run, whole)
    closer = f"{_sentence(divergence)}" if divergence else "KL is not known"
    if spoilt := _garbage(run):
        better = any(line.verdict == "better" for line in accuracies)
        return Verdict("partly" if better else "no", f"{closer}, but {spoilt}.")
    accuracy = whole.get("accuracy")
    if accuracy is None and not accuracies:
        return _without_verifier(divergence, closer, bool(concerns(run, comparisons)))
    if accuracy is None:
        return Verdict("unclear", f"{closer}; the run kept no single responses, so no interval of accuracy is known.")
    fallen = [line for line in accuracies if line.verdict == "worse"]
    if accuracy.verdict == "worse" or (fallen and accuracy.verdict != "better"):
        worst = accuracy if accuracy.verdict == "worse" else fallen[0]
        return Verdict("no", f"{_sentence(worst)}, {_although(divergence)}.")
    if accuracy.verdict == "better":
        reasons = [_sentence(line) for line in fallen] + concerns(run, comparisons)
        closed = ""
        if (known := gap(run)) and known.closed:
            lead = "teacher's lead" + (f" (at {accuracy.teacher.value:.3f})" if accuracy.teacher else "")
            closed = f", which closes {_share(known.closed)} of the {lead}"
        rest = f", but {_lower(reasons[0])}" if reasons else ""
        return Verdict("partly" if reasons else "yes", f"{_sentence(accuracy)}{closed}{rest}.")
    change = accuracy.change
    assert change is not None
    interval = f"from {change.low:+.2f} to {change.high:+.2f}"
    if not max(-change.low, change.high) < TELLING:
        number_of = f"{accuracy.prompts} verified held-out prompt{'s' if accuracy.prompts != 1 else ''}"
        return Verdict(
            "unclear",
            f"{closer}, but {number_of} cannot tell whether answers got better: the change of accuracy may be anything "
            f"{interval}.",
        )
    if divergence and divergence.verdict == "better":
        spoilt = "".join(f", and {_lower(text)}" for text in concerns(run, comparisons)[:1])
        return Verdict("partly", f"{closer}, and accuracy stayed where it was: its change is {interval}{spoilt}.")
    return Verdict("no", f"Nothing became better: the change of accuracy is {interval}, {_although(divergence)}.")


def concerns(run: Run, comparisons: Sequence[Comparison]) -> list[str]:
    """What spoils the last evaluation by mode, in sentences: truncation, repetition, modes that are not kept to."""
    modes = [line for line in comparisons if line.kind == "mode"] or comparisons
    found = []
    for line in modes:
        last, of = line.after or line.before, f"{line.name} responses" if line.name else "responses"
        own = f" ({line.teacher.value:.0%} of the teacher's own)" if line.teacher else ""
        if line.metric == "truncated" and last.value > TRUNCATED:
            limit = f"rollout.max_tokens={run.config['rollout']['max_tokens']}"
            advice = ", too short for this teacher" if line.teacher and line.teacher.value > TRUNCATED else ""
            found.append(f"{last.value:.0%} of the {of} hit the token limit{own}: {limit}{advice}")
        if line.metric == "repetitive" and last.value > TRUNCATED:
            found.append(f"{last.value:.0%} of the {of} repeat themselves over and over{own}")
        if line.metric == "mode_adherence" and last.value < ADHERENT:
            found.append(f"Only {last.value:.0%} of the {of} keep to their mode{own}")
    return found


def remarks(run: Run, comparisons: Sequence[Comparison]) -> list[Remark]:
    """What a person should know besides the verdict, in sentences."""
    lines: list[Remark] = []
    if not run.finished:
        planned = run.config["loop"]["steps"]
        done = run.steps[-1]["step"] if run.steps else 0
        lines.append(Remark("warning", f"The run has not finished: {done} of {planned} on-policy steps are done."))
    several = any(line.kind == "mode" for line in comparisons)
    for line in comparisons:
        overall = line.metric in KL and line.kind is None
        # A mode may get worse while the mean over all gets better.
        spoilt_mode = line.metric in KL and line.verdict == "worse"
        if overall or spoilt_mode or (line.metric == "accuracy" and (line.kind == "mode" or not several)):
            lines.append(Remark(line.verdict, _sentence(line) + _why(line) + "."))
    if run.heldout and not any(line.metric == "accuracy" for line in comparisons):
        text = "No held-out prompt has a verifier: whether answers are right is not known, only how near they are."
        lines.append(Remark("warning", text))
    if (known := gap(run)) is not None:
        lines.append(_gap_remark(known))
    elif len(run.heldout) > 1 and not run.teacher_responses:
        text = "The teacher's own held-out responses were not measured, so its accuracy, the ceiling, is not known"
        lines.append(Remark("unclear", f"{text} (loop.eval_teacher=true)."))
    lines += [Remark("warning", f"{text}.") for text in concerns(run, comparisons)]
    lines += [Remark("unclear", f"{text}.") for text in _lengths(comparisons)]
    return lines


def headline(run: Run) -> list[KeyFigure]:
    """What the run cost: time, medians over steps, the largest probe error."""
    figures = []
    seconds = run.wall_seconds
    if not run.segments and not run.finished:
        seconds = _sum(series([*run.off_policy_steps, *run.steps], "seconds"))
    starts = f" over {len(run.segments)} starts" if len(run.segments) > 1 else ""
    known = run.finished or run.segments
    figures.append(KeyFigure(f"wall time{starts}" if known else "time in steps", duration(seconds or 0.0)))
    for stage in ("generate", "score", "learn"):
        if (rate := _median(series(run.steps, "tokens_per_second", stage))) is not None:
            figures.append(KeyFigure(f"tokens/s, {stage}", f"{rate:,.0f}"))
    if (pause := _median(series(run.steps, "swap_ms"))) is not None:
        figures.append(KeyFigure("swap", f"{pause:,.0f} ms"))
    errors = series(run.steps, "probe_error")
    if np.isfinite(errors).any():
        figures.append(KeyFigure("largest probe error", f"{np.nanmax(errors):.1e} nats"))
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


def _divergence(run: Run, whole: dict[Metric, Comparison]) -> Comparison | None:
    """The KL in the direction that the run minimises, as far as the name of its divergence says one."""
    reverse = "reverse" in str(run.config["loss"].get("divergence"))
    order: tuple[Metric, ...] = ("reverse_kl", "forward_kl") if reverse else ("forward_kl", "reverse_kl")
    return next((whole[metric] for metric in order if metric in whole), None)


def _garbage(run: Run) -> str | None:
    """Says so if most responses are of no use, and the teacher's own are not."""
    line = compare_unusable(run)
    if line is None or line.after is None or not line.after.low > GARBAGE:
        return None
    if line.teacher is None:
        return f"{line.after.value:.0%} of the student's responses are cut off or repeat themselves"
    if line.teacher.high >= line.after.low:
        return None
    return (
        f"{line.after.value:.0%} of the student's responses are cut off or repeat themselves "
        f"({line.teacher.value:.0%} of the teacher's own)"
    )


def _without_verifier(divergence: Comparison | None, closer: str, spoilt: bool) -> Verdict:
    nothing = "no held-out prompt has a verifier, so nothing is known about its answers"
    if divergence is None or divergence.verdict == "unclear":
        return Verdict("unclear", f"{closer}, and {nothing}.")
    if divergence.verdict == "worse":
        return Verdict("no", f"{closer}, and {nothing}.")
    return Verdict("partly" if spoilt else "unclear", f"{closer}: the student is nearer to its teacher, but {nothing}.")


def _although(divergence: Comparison | None) -> str:
    """The KL behind another sentence."""
    if divergence is None:
        return "and KL is not known"
    return f"{'although' if divergence.verdict == 'better' else 'and'} {_lower(_sentence(divergence))}"


def _sentence(line: Comparison) -> str:
    """What became of a metric, without a full stop."""
    name = NAMES[line.metric][0].upper() + NAMES[line.metric][1:] + (f" in {line.name}" if line.name else "")
    before = number(line.before.value, line.metric)
    if line.after is None or line.change is None:
        return f"{name} is {before}; there is no later evaluation to compare with"
    after = number(line.after.value, line.metric)
    if line.change.value == 0:
        return f"{name} stayed at {before}"
    word = "went" if line.verdict == "unclear" else "fell" if line.change.value < 0 else "rose"
    relative = f" ({line.change.value / line.before.value:+.0%})" if line.metric in KL and line.before.value else ""
    return f"{name} {word} from {before} to {after}{relative}"


def _why(line: Comparison) -> str:
    """What the interval says, behind the sentence."""
    if line.change is None or line.change.value == 0:
        return ""
    if math.isnan(line.change.low):
        return ": no interval is known"
    if line.verdict == "unclear":
        return f": the 95 % interval of the change, {_interval(line.change, line.metric)}, includes 0"
    return f": the 95 % interval of the change, {_interval(line.change, line.metric)}, excludes 0"


def _interval(estimate: Estimate, metric: Metric) -> str:
    low, high = (("+" if end > 0 else "") + number(end, metric) for end in (estimate.low, estimate.high))
    return f"{low} to {high}"


def _gap_remark(known: Gap) -> Remark:
    if known.closed is None:
        text = (
            f"The teacher's accuracy is {known.size.value:+.3f} from the student's before, over {known.prompts} "
            f"prompts (95 % interval {_interval(known.size, 'accuracy')}): no gap that could be said to be closed."
        )
        return Remark("unclear", text)
    text = f"The student has closed {_share(known.closed)} of the teacher's lead in accuracy."
    return Remark("better" if known.closed.low > 0 else "worse" if known.closed.high < 0 else "unclear", text)


def _share(closed: Estimate) -> str:
    return f"{closed.value:.0%} [{closed.low:.0%} to {closed.high:.0%}]"


def _lengths(comparisons: Sequence[Comparison]) -> list[str]:
    """By mode, how long responses are now beside the teacher's, where they are far from it."""
    modes = [line for line in comparisons if line.kind == "mode"] or comparisons
    found = []
    for line in modes:
        if line.metric == "response_length" and line.after and line.teacher and line.teacher.value:
            ratio = line.after.value / line.teacher.value
            if ratio > 1.5 or ratio < 1 / 1.5:
                of = f"{line.name} responses" if line.name else "Responses"
                found.append(f"{of[0].upper()}{of[1:]} are {ratio:.1f} times as long as the teacher's own")
    return found


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _median(values: np.ndarray) -> float | None:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else None


def _sum(values: np.ndarray) -> float:
    return float(np.nansum(values))
