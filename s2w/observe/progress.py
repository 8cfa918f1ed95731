"""The line that a person watches."""

from __future__ import annotations

import sys
import time

from s2w.records import Heldout, StepReport


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

    def under_way(self, step: int, written: int, scored: int, samples: int) -> None:
        """What the step under way has done; shown on a terminal only."""
        if self._live:
            line = f"\r\x1b[K  step {step}: {written}/{samples} written, {scored}/{samples} scored"
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

    def heldout(self, result: Heldout) -> None:
        """The line of one held-out evaluation."""
        self.say(
            f"held-out at version {result.version}: forward KL {result.forward_kl:.4f}, "
            f"reverse KL {result.reverse_kl:.4f} nats a token over {result.tokens:,} tokens"
        )
