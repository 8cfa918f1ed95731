"""The task ``column_addition``: the sum of three two-digit numbers.

In the think block the numbers are added one after the other, column by column with the carry, which a small model
learns; without it the sum has to be found in one step, which a small model finds hard. For 27 + 94 + 58::

    <think>
    7+4+0=11 2+9+1=12 121
    1+8+0=09 2+5+0=07 1+0+0=01 179
    </think>

    179

A column reads: digit + digit + carry = two digits, of which the first is the next carry. A line ends with the sum so
far.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from s2w.models.modes import THINK_CLOSE, THINK_OPEN, split_thinking
from s2w.records import Mode

NAME = "column_addition"
Split = Literal["train", "heldout"]
HELDOUT_SHARE = 8
"""One problem in this many is held out."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Three numbers from 10 to 99."""

    terms: tuple[int, int, int]

    @property
    def question(self) -> str:
        """The user's message: ``27+94+58``."""
        return "+".join(map(str, self.terms))

    @property
    def answer(self) -> str:
        return str(sum(self.terms))

    @property
    def split(self) -> Split:
        """By a hash of the sorted terms: the same terms in another order are in the same split."""
        digest = zlib.crc32(repr(sorted(self.terms)).encode())
        return "heldout" if digest % HELDOUT_SHARE == 0 else "train"

    def response(self, mode: Mode) -> str:
        """The gold response to a prompt in ``mode``, without the end-of-sequence token.

        In ``no_think`` mode the chat template has opened the answer with an empty think block.
        """
        if mode == "no_think":
            return self.answer
        lines, total = [], self.terms[0]
        for term in self.terms[1:]:
            lines.append(f"{_columns(total, term)} {total + term}")
            total += term
        return "\n".join((THINK_OPEN, *lines, THINK_CLOSE, "", self.answer))


def draw(rng: random.Random, split: Split) -> Problem:
    """A problem of ``split``, uniformly."""
    while True:
        problem = Problem((rng.randint(10, 99), rng.randint(10, 99), rng.randint(10, 99)))
        if problem.split == split:
            return problem


def score(response: str, mode: Mode, answer: str) -> float:
    """1.0 if what a response says outside its think block is ``answer``, else 0.0.

    Args:
        response: decoded text without special tokens; a think block that never closes scores 0.0.
    """
    return float(split_thinking(response, mode).answer == answer)


def _columns(left: int, right: int) -> str:
    steps, carry = [], 0
    for a, b in zip_longest(reversed(str(left)), reversed(str(right)), fillvalue="0"):
        total = int(a) + int(b) + carry
        steps.append(f"{a}+{b}+{carry}={total:02d}")
        carry = total // 10
    return " ".join(steps)
