"""What a person watches: how actors start, how far the work in progress has come, a line for each step, the summary."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any, TextIO

from s2w.actors.stages import Stage, describe, duration, slowest
from s2w.metric import METRICS, Metric, Value
from s2w.observe.screen import Screen
from s2w.records import Heldout

REMIND_S = 60.0
"""Seconds after which a log file is told again what takes so long."""
BAR = 20
"""Characters of a bar."""


class Progress:
    """Prints one line per step; on a terminal also what the step in progress has done so far.

    Args:
        steps: of each phase, by name.
        quiet: only warnings and the summary.
        verbose: others print much meanwhile: as in a log file, nothing is drawn over.
        stream: None for standard output.
    """

    def __init__(
        self, steps: dict[str, int], *, quiet: bool = False, verbose: bool = False, stream: TextIO | None = None
    ) -> None:
        self.steps, self.quiet = steps, quiet
        self._screen = Screen(stream, live=not (quiet or verbose))
        self._first: tuple[str, int, float] | None = None
        self._lines: dict[Hashable, str] = {}
        self._told: dict[Hashable, tuple[str, float]] = {}
        self._scored_by: dict[str, str] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        """What is drawn over is gone from the screen."""
        self._lines.clear()
        self._screen.show([])

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        if not self.quiet:
            self._screen.say(text)

    def warn(self, text: str) -> None:
        """Like :meth:`say`, for what a person must see even if the rest is not wanted."""
        self._screen.say(text)

    def show(self, key: Hashable, text: str | None) -> None:
        """On a terminal, puts a line that is drawn over under ``key``, or takes it away (None)."""
        if text is None:
            self._lines.pop(key, None)
        else:
            self._lines[key] = text
        self._screen.show(list(self._lines.values()))

    def now(self, text: str | None) -> None:
        """What the run does from now on; shown only on a terminal, until the next thing (None: until then nothing)."""
        self.show("now", text and f"  {text}, since {time.strftime('%H:%M:%S')}")

    def starting(self, what: str, stages: Mapping[int, Stage]) -> None:
        """See :class:`s2w.actors.starting.Watcher`: a line that is drawn over, or one for each new stage of the actor
        that is furthest behind, and a reminder."""
        key, text = (what, *stages), describe(what, stages)
        if self._screen.live:
            self.show(key, f"  {text}")
            return
        last = slowest(stages)
        if last is not None and self._is_news(key, stages[last].name):
            self.say(text)

    def started(self, what: str, stages: Mapping[int, Stage], seconds: float) -> None:
        """See :class:`s2w.actors.starting.Watcher`."""
        key = (what, *stages)
        self._told.pop(key, None)
        self.show(key, None)
        if slowest(stages) is None:
            self.say(f"{describe(what, stages)} after {duration(seconds)}")

    def batch(self, name: str, samples: int) -> Batch:
        """Counts the samples of a batch while it is open: on a terminal. Where several teachers score them, the step's
        line says how many each.

        Args:
            name: ``step 3/20`` or ``held-out at version 3``.
        """
        return Batch(self, name, samples)

    def scored_by(self, name: str, teachers: str) -> None:
        """Who has scored the batch of this name; for its line."""
        self._scored_by[name] = f"  scored by {teachers}"

    def countdown(self, what: str, total: int) -> Countdown:
        """Counts responses while it is open, with tokens/s and the time left: on a terminal, or a line a minute."""
        return Countdown(self, what, total)

    def _is_news(self, key: Hashable, text: str) -> bool:
        """Whether ``text`` has not been told under ``key``, or long ago; then it counts as told."""
        before, when = self._told.get(key, ("", 0.0))
        if before == text and time.monotonic() - when < REMIND_S:
            return False
        self._told[key] = text, time.monotonic()
        return True

    def step(self, line: dict[str, Any]) -> None:
        """The line of one step: every metric that has a column, under a heading."""
        phase, step = line["phase"], line["step"]
        steps, now = self.steps[phase], time.monotonic()
        columns = [metric for name, metric in METRICS.items() if metric.column and name in line]
        if self._first is None or self._first[0] != phase:
            self._first = (phase, step, now)
            self.say(
                "  ".join([f"{'step':>11}", *(f"{metric.column:>{_width(metric)}}" for metric in columns), "   left"])
            )
            left = (steps - step) * line["seconds"]
        else:
            _, first, began = self._first
            left = (steps - step) * (now - began) / (step - first)
        cells = [f"{_text(line[metric.name], metric):>{_width(metric)}}" for metric in columns]
        scored_by = self._scored_by.pop(f"step {step}/{steps}", "")
        self.say("  ".join([f"{f'{step}/{steps}':>11}", *cells, f"{left // 60:>4.0f}:{left % 60:02.0f}"]) + scored_by)

    def heldout(self, result: Heldout) -> None:
        """The lines of one held-out evaluation."""
        name = f"held-out at version {result.version}"
        self.say(
            f"{name}: forward KL {result.forward_kl:.4f}, "
            f"reverse KL {result.reverse_kl:.4f} nats/token over {result.tokens:,} tokens"
            f"{self._scored_by.pop(name, '')}"
            if result.version is not None
            else "held-out, the teacher's own responses:"
        )
        for mode, scores in result.by_mode.items():
            accuracy = f"accuracy {scores['accuracy']:.3f}, " if "accuracy" in scores else ""
            self.say(
                f"  {mode}: {accuracy}mode adherence {scores['mode_adherence']:.3f}, "
                f"truncated {scores['truncated']:.3f}, length {scores['response_length']:.0f} "
                f"over {scores['prompts']:.0f} prompts"
            )

    def summary(self, summary: dict[str, Any]) -> None:
        """The lines at the end of a run; ``summary`` is that of summary.json."""
        self.quiet = False  # Nobody asks for less than this.
        self.say("")
        if off_policy := summary.get("off_policy"):
            self.say(
                f"off-policy held-out loss, nats/token: {off_policy['before']['loss']:.4f} before, "
                f"{off_policy['after']['loss']:.4f} after {off_policy['after']['step']} steps"
            )
        if heldout := summary.get("heldout"):
            before, after = heldout["before"], heldout["after"]
            self.say(f"{'held-out KL, nats/token':<28}{'before':>10}{'after':>10}{'ratio':>9}")
            rows = {"forward_kl": "forward, KL(teacher||student)", "reverse_kl": "reverse, KL(student||teacher)"}
            for name, text in rows.items():
                ratio = after[name] / before[name] if before[name] else float("nan")
                self.say(f"{text:<29}{before[name]:>9.4f}{after[name]:>10.4f}{ratio:>9.3f}")
            for mode, scores in after["by_mode"].items():
                if "accuracy" in scores and "accuracy" in (first := before["by_mode"].get(mode, {})):
                    text = f"accuracy, {mode}"
                    teacher = heldout.get("teacher", {"by_mode": {}})["by_mode"].get(mode, {}).get("accuracy")
                    ceiling = "" if teacher is None else f"{f'teacher {teacher:.3f}':>16}"
                    self.say(f"{text:<29}{first['accuracy']:>9.3f}{scores['accuracy']:>10.3f}{ceiling}")
        rates = summary["tokens_per_second"]
        if rates:
            self.say("tokens per second: " + ", ".join(f"{stage} {rate:,.0f}" for stage, rate in rates.items()))
            swap, error = summary["swap_ms"], summary["probe_error"]
            self.say(f"swap {swap:.0f} ms (median), probe error {error:.1e} nats (largest)")
        self.say(f"wall time {summary['wall_seconds']:.0f} s")


class Batch:
    """How far the samples of a batch have come.

    Args:
        name, samples: see :meth:`Progress.batch`.
    """

    def __init__(self, progress: Progress, name: str, samples: int) -> None:
        self._progress, self._name, self._samples = progress, name, samples
        self._generated = 0
        self._scored: Counter[str] = Counter()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.show(self, None)
        if len(self._scored) > 1:
            self._progress.scored_by(self._name, self._teachers())

    def generated(self, count: int = 1) -> None:
        """So many more samples are generated."""
        self._generated += count
        self._show()

    def scored(self, teacher: str) -> None:
        """A sample has its signal from the teacher of this name."""
        self._scored[teacher] += 1
        self._show()

    def _show(self) -> None:
        scored = self._scored.total()
        text = f"{self._generated}/{self._samples} generated"
        if scored:
            text += f", {scored}/{self._samples} scored"
        if len(self._scored) > 1:
            text += f" ({self._teachers()})"
        done = (self._generated + scored) / (2 * self._samples)
        self._progress.show(self, f"  {self._name} {bar(done)} {text}")

    def _teachers(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self._scored.items()))


class Countdown:
    """Responses that are generated one after the other, until all are there.

    Args:
        what: what is under way, such as "generating".
        total: responses to come.
    """

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress, self._what, self.total = progress, what, total
        self._began = self._said = time.monotonic()
        self._done = self._tokens = 0

    def __enter__(self) -> Countdown:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.show(self, None)

    def add(self, tokens: int) -> None:
        """One more response is there, of so many tokens."""
        self._done += 1
        self._tokens += tokens
        count = f"{self._done:,} of {self.total:,} responses"
        self._progress.show(self, f"  {self._what} {bar(self._done / self.total)} {count}, {self.speed()}")
        if time.monotonic() - self._said >= REMIND_S:
            self.say(count)

    def say(self, text: str) -> None:
        """Prints a line that stays: ``text`` and the speed."""
        self._said = time.monotonic()
        self._progress.say(f"{text}, {self.speed()}")

    def speed(self) -> str:
        """Tokens/s so far and, unless all are there, the time left if the others are as long on average."""
        rate = self._tokens / max(time.monotonic() - self._began, 1e-3)
        text = f"{rate:,.0f} tokens/s"
        if rate and self._done < self.total:
            left = (self.total - self._done) * (self._tokens / self._done) / rate
            text += f", {duration(left)} left"
        return text


def bar(share: float) -> str:
    """A bar of which ``share`` (0 to 1) is full."""
    full = round(share * BAR)
    return f"[{'#' * full}{'.' * (BAR - full)}]"


def _width(metric: Metric) -> int:
    return max(len(metric.column), 6)


def _text(value: Value, metric: Metric) -> str:
    """A number, or several with slashes between them."""
    if isinstance(value, dict):
        return "/".join(format(one, metric.format) for one in value.values())
    return format(value, metric.format)
