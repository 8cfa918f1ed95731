"""Where a command prints: lines that stay and, on a terminal, a block below them that is drawn over and over."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

REDRAW_S = 0.1
"""Least seconds between two drawings of a block with as many lines."""
_CLEAR = "\r\x1b[J"
"""From the start of the cursor's line to the end of the screen."""


class Screen:
    """The cursor waits where the block begins: what others write meanwhile stays, and the block is drawn below it.

    Args:
        stream: None for standard output.
        live: draw the block; only if the stream is a terminal.
    """

    def __init__(self, stream: TextIO | None = None, live: bool = True) -> None:
        self._stream = stream
        self.live = live and self._out.isatty() and os.environ.get("TERM") != "dumb"
        self._block: list[str] = []
        self._drawn = 0.0

    @property
    def _out(self) -> TextIO:
        return self._stream or sys.stdout

    def say(self, text: str) -> None:
        """Prints a line, or several, that stay."""
        print(f"{_CLEAR if self._block else ''}{text}\n{self._drawing()}", end="", file=self._out, flush=True)

    def show(self, block: Sequence[str]) -> None:
        """Puts these lines in the block's place; does nothing where it is not drawn."""
        if not self.live:
            return
        now = time.monotonic()
        many, self._block = len(self._block), list(block)
        if len(block) != many or now - self._drawn >= REDRAW_S:
            self._drawn = now
            print(f"{_CLEAR}{self._drawing()}", end="", file=self._out, flush=True)

    def _drawing(self) -> str:
        """The block, one line of the terminal for each of its lines, and the way back to its beginning."""
        if not self._block:
            return ""
        columns, rows = os.get_terminal_size(self._out.fileno())
        lines = [line[: max(columns - 1, 1)] for line in self._block[: max(rows - 1, 1)]]
        return "\n".join(lines) + (f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else "") + "\r"
