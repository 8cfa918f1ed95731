"""Responses on the screen while they come: one after the other, or in columns on a wide terminal."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TextIO

from s2w.models.text_stream import Piece

BOLD, DIM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"
BAR = "│ "
"""At the start of each line of thinking."""
GAP = "  │  "
"""Between columns."""
NARROWEST = 56
"""Characters of a column that is still easy to read: code and formulas rarely have longer lines."""


class Transcript(Protocol):
    """Shows the responses to one prompt after the other."""

    in_turn: bool
    """The responses to a prompt are written one after the other; otherwise as they come."""

    def prompt(self, text: str, names: Sequence[str]) -> None:
        """A new prompt, empty where it stands on the screen already, and who answers it."""

    def write(self, index: int, piece: Piece) -> None:
        """More of the response of ``names[index]``."""

    def end(self, index: int, summary: str) -> None:
        """This response is complete."""


def make_transcript(out: TextIO, responses: int) -> Transcript:
    """Columns where ``out`` is a terminal with room for them, else blocks of text.

    Args:
        responses: to each prompt, that come at the same time.
    """
    style = Style(out)
    width = (shutil.get_terminal_size().columns - 1 - len(GAP) * (responses - 1)) // responses
    if style.terminal and responses > 1 and width >= NARROWEST:
        return Columns(out, style, width)
    return Blocks(out, style)


class Style:
    """Bold and dim text, on a terminal that may show them (https://no-color.org)."""

    def __init__(self, out: TextIO) -> None:
        self.terminal = out.isatty()
        self.coloured = self.terminal and not os.environ.get("NO_COLOR")

    def bold(self, text: str) -> str:
        return f"{BOLD}{text}{PLAIN}" if self.coloured else text

    def dim(self, text: str) -> str:
        return f"{DIM}{text}{PLAIN}" if self.coloured else text

    def safe(self, text: str) -> str:
        """On a terminal, without what a response could make it do."""
        if not self.terminal:
            return text
        return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


class Blocks:
    """Each response under its own heading, the second when the first is complete."""

    in_turn = True

    def __init__(self, out: TextIO, style: Style) -> None:
        self._out, self._style = out, style
        self._names: Sequence[str] = ()
        self._open: int | None = None
        self._thinking: bool | None = None
        """Of the piece before; None at the start of a response."""

    def prompt(self, text: str, names: Sequence[str]) -> None:
        self._names = names
        if text:
            self._print(self._style.bold(f"=== {self._style.safe(text)}") + "\n")

    def write(self, index: int, piece: Piece) -> None:
        self._begin(index)
        text = self._style.safe(piece.text)
        if piece.thinking:
            bar = BAR if self._thinking is not True else ""
            text = bar + text.replace("\n", f"\n{BAR}")
        if self._thinking not in (None, piece.thinking):
            self._print("\n\n")
        self._thinking = piece.thinking
        self._print(self._style.dim(text) if piece.thinking else text)

    def end(self, index: int, summary: str) -> None:
        self._begin(index)
        self._print(("" if self._thinking is None else "\n") + self._style.dim(f"[{summary}]") + "\n\n")
        self._open = self._thinking = None

    def _begin(self, index: int) -> None:
        """The heading of a response that has none yet."""
        if self._open is None:
            self._open = index
            self._print(self._style.bold(f"--- {self._names[index]}") + "\n")

    def _print(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class Columns:
    """The responses beside each other; a row appears when each column has its line of it.

    Nothing above the last row is written again, so that the terminal can be scrolled.

    Args:
        width: of a column, in cells.
    """

    in_turn = False

    def __init__(self, out: TextIO, style: Style, width: int) -> None:
        self._out, self._style, self._width = out, style, width
        self._columns: list[_Column] = []

    def prompt(self, text: str, names: Sequence[str]) -> None:
        self._columns = [_Column(self._width) for _ in names]
        if text:
            self._out.write(self._style.bold(f"=== {self._style.safe(text)}") + "\n")
        heads = [pad(_shortened(name, self._width), self._width) for name in names]
        self._out.write(self._style.bold(GAP.join(heads).rstrip()) + "\n")
        self._out.flush()

    def write(self, index: int, piece: Piece) -> None:
        safe = self._style.safe(piece.text).expandtabs(4)
        self._columns[index].write(Piece(safe, piece.thinking))
        self._show()

    def end(self, index: int, summary: str) -> None:
        self._columns[index].end(f"[{summary}]")
        self._show()
        if all(column.ended for column in self._columns):
            self._out.write("\n")
            self._out.flush()

    def _show(self) -> None:
        columns = self._columns
        rows = []
        while any(column.lines for column in columns) and all(column.lines or column.ended for column in columns):
            rows.append([column.lines.popleft() if column.lines else _Line() for column in columns])
        text = "\r\x1b[K" + "".join(f"{self._row(row)}\n" for row in rows)
        # The row in progress, for which some column has no line yet.
        if not all(column.ended for column in columns):
            text += self._row([column.lines[0] if column.lines else column.partial for column in columns])
        self._out.write(text)
        self._out.flush()

    def _row(self, row: Sequence[_Line]) -> str:
        padded = [(pad(line.text, self._width), line.dim) for line in row]
        return GAP.join(self._style.dim(text) if dim else text for text, dim in padded).rstrip()


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a column."""

    text: str = ""
    dim: bool = False


class _Column:
    """A response, wrapped."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._rest = ""
        """The last line so far, which may still change."""
        self._thinking: bool | None = None
        self.lines: deque[_Line] = deque()
        """Complete, and not shown yet."""
        self.ended = False

    @property
    def partial(self) -> _Line:
        """The last line so far."""
        return self._line(self._rest) if self._rest else _Line()

    def write(self, piece: Piece) -> None:
        if self._thinking not in (None, piece.thinking):
            self.lines += [self._line(self._rest), _Line()]
            self._rest = ""
        self._thinking = piece.thinking
        width = self._width - (len(BAR) if piece.thinking else 0)
        *finished, last = (self._rest + piece.text).split("\n")
        for text in finished:
            self.lines += map(self._line, wrap(text, width))
        *complete, self._rest = wrap(last, width)
        self.lines += map(self._line, complete)

    def end(self, summary: str) -> None:
        if self._thinking is not None:
            self.lines.append(self._line(self._rest))
        self.lines += [_Line(text, dim=True) for text in wrap(summary, self._width)]
        self._rest, self.ended = "", True

    def _line(self, text: str) -> _Line:
        return _Line(f"{BAR}{text}", dim=True) if self._thinking else _Line(text, dim=False)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` cells, at least one line; text that follows changes none but the last.

    A word that is longer than a line is cut.
    """
    lines, line, used = [], "", 0
    for chunk in re.findall(r"\s+|\S+", text):
        size = cells(chunk)
        if used and used + size > width:
            lines.append(line)
            line, used = "", 0
            if chunk.isspace():
                continue
        for character in chunk:
            one = cells(character)
            if used + one > width:
                lines.append(line)
                line, used = "", 0
            line, used = line + character, used + one
    return [*lines, line]


def cells(text: str) -> int:
    """Columns of a terminal that the text takes: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(
        0
        if unicodedata.combining(c) or unicodedata.category(c) == "Cf"
        else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def pad(text: str, width: int) -> str:
    """The text, filled with blanks to so many cells."""
    return text + " " * (width - cells(text))


def _shortened(text: str, width: int) -> str:
    """The end of a text, which of a path says most, on one line."""
    return text if len(text) <= width else f"...{text[3 - width :]}"
