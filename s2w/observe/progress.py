"""The lines that a person watches."""

from __future__ import annotations

import sys
import time
from typing import Any

from s2w.metric import METRICS, Metric, Value
from s2w.records import Heldout


class Progress:
    """Prints one line per step; on a terminal also what the step in progress has done so far.

    Args:
        steps: of each phase, by name.
    """

    def __init__(self, steps: dict[str, int]) -> None:
        self.steps = steps
        self._first: tuple[str, int, float] | None = None
        self._live = sys.stdout.isatty()

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        print(("\r\x1b[K" if self._live else "") + text, flush=True)

    def under_way(self, generated: int, scored: int, samples: int) -> None:
        """How far the batch in progress has come; shown only on a terminal."""
        if self._live:
            line = f"\r\x1b[K  {generated}/{samples} generated, {scored}/{samples} scored"
            print(line, end="", flush=True)

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
        self.say("  ".join([f"{f'{step}/{steps}':>11}", *cells, f"{left // 60:>4.0f}:{left % 60:02.0f}"]))

    def heldout(self, result: Heldout) -> None:
        """The lines of one held-out evaluation."""
        self.say(
            f"held-out at version {result.version}: forward KL {result.forward_kl:.4f}, "
            f"reverse KL {result.reverse_kl:.4f} nats/token over {result.tokens:,} tokens"
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
                    self.say(f"{text:<29}{first['accuracy']:>9.3f}{scores['accuracy']:>10.3f}")
        rates = summary["tokens_per_second"]
        if rates:
            self.say("tokens per second: " + ", ".join(f"{stage} {rate:,.0f}" for stage, rate in rates.items()))
            swap, error = summary["swap_ms"], summary["probe_error"]
            self.say(f"swap {swap:.0f} ms (median), probe error {error:.1e} nats (largest)")
        self.say(f"wall time {summary['wall_seconds']:.0f} s")


def _width(metric: Metric) -> int:
    return max(len(metric.column), 6)


def _text(value: Value, metric: Metric) -> str:
    """A number, or several with slashes between them."""
    if isinstance(value, dict):
        return "/".join(format(one, metric.format) for one in value.values())
    return format(value, metric.format)
