"""The line that a person watches."""

from __future__ import annotations

import sys
import time
from typing import Any

from s2w.records import Heldout, OffPolicyReport, StepReport


class Progress:
    """Prints a line a step; on a terminal also what the step under way has done so far.

    Args:
        steps: of the whole run.
        divergence: name of what the loss measures, as a column head.
    """

    HEAD = "{:>11}  {:>10}  {:>13}  {:>6}  {:>6}  {:>21}  {:>8}  {:>8}  {:>6}  {:>7}"

    def __init__(self, steps: int, divergence: str) -> None:
        self.steps, self.divergence = steps, divergence
        self._first: tuple[int, float] | None = None
        self._live = sys.stdout.isatty()
        self._headed = False

    def say(self, text: str) -> None:
        """A line of its own."""
        print(("\r\x1b[K" if self._live else "") + text, flush=True)

    def under_way(self, written: int, scored: int, samples: int) -> None:
        """What the batch under way has come to; shown on a terminal only."""
        if self._live:
            line = f"\r\x1b[K  {written}/{samples} written, {scored}/{samples} scored"
            print(line, end="", flush=True)

    def step(self, report: StepReport) -> None:
        """The line of one step."""
        if not self._headed:
            self._headed = True
            self.say(
                self.HEAD.format(
                    "step", self.divergence, "entropy s/t", "agree", "length", "tok/s gen/score/learn",
                    "swap", "probe", "step", "left",
                )
            )  # fmt: skip
        now = time.monotonic()
        if self._first is None:
            self._first = (report.step, now)
            left = (self.steps - report.step) * report.seconds
        else:
            done = report.step - self._first[0]
            left = (self.steps - report.step) * (now - self._first[1]) / done
        rates = "/".join(f"{report.tokens_per_second[stage]:,.0f}" for stage in ("generate", "score", "learn"))
        self.say(
            self.HEAD.format(
                f"{report.step}/{self.steps}",
                f"{report.divergence:.4f}",
                f"{report.student_entropy:.2f}/{report.teacher_entropy:.2f}",
                f"{report.agreement:.0%}",
                f"{report.response_length:.0f}",
                rates,
                f"{report.swap_ms:.0f} ms",
                f"{report.probe_error:.0e}",
                f"{report.seconds:.1f} s",
                f"{left // 60:.0f}:{left % 60:02.0f}",
            )
        )

    def off_policy_step(self, report: OffPolicyReport, steps: int) -> None:
        """The line of one of ``steps`` steps of the off-policy phase."""
        self.say(
            f"off-policy {report.step}/{steps}  loss {report.loss:.4f}  entropy {report.student_entropy:.2f}  "
            f"agree {report.agreement:.0%}  epoch {report.epoch:.2f}  rate {report.learning_rate:.1e}  "
            f"{report.tokens_per_second:,.0f} tok/s  {report.seconds:.1f} s"
        )

    def heldout(self, result: Heldout) -> None:
        """The line of one held-out evaluation."""
        self.say(
            f"held-out at version {result.version}: forward KL {result.forward_kl:.4f}, "
            f"reverse KL {result.reverse_kl:.4f} nats a token over {result.tokens:,} tokens"
        )
        for mode, scores in result.by_mode.items():
            accuracy = f"accuracy {scores['accuracy']:.3f}, " if "accuracy" in scores else ""
            self.say(
                f"  {mode}: {accuracy}obedience {scores['obedience']:.3f}, truncated {scores['truncated']:.3f}, "
                f"length {scores['response_length']:.0f} over {scores['prompts']:.0f} prompts"
            )

    def summary(self, summary: dict[str, Any]) -> None:
        """What the run ends with; ``summary`` is that of summary.json."""
        self.say("")
        if off_policy := summary.get("off_policy"):
            self.say(
                f"off-policy held-out loss, nats a token: {off_policy['before']['loss']:.4f} before, "
                f"{off_policy['after']['loss']:.4f} after {off_policy['after']['step']} steps"
            )
        if heldout := summary.get("heldout"):
            before, after = heldout["before"], heldout["after"]
            self.say(f"{'held-out KL, nats a token':<28}{'before':>10}{'after':>10}{'ratio':>9}")
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
