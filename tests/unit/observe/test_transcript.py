"""Responses on a screen: blocks of text, and columns that a terminal's own rules put together again."""

from __future__ import annotations

import io
import os
import shutil

import pytest

from s2w.models.text_stream import Piece
from s2w.observe.transcript import NARROWEST, Blocks, Columns, cells, make_transcript, wrap

NAMES = ["student a", "teacher b"]


class Screen(io.StringIO):
    """A terminal that keeps its lines."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What can be read on it: a carriage return and an erased line begin a line anew."""
        return [line.rpartition("\r\x1b[K")[2].rstrip() for line in self.getvalue().split("\n")]


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((2 * NARROWEST + 6, 40)))


def test_a_file_gets_plain_blocks_one_after_the_other() -> None:
    out = io.StringIO()
    transcript = make_transcript(out, 2)
    assert transcript.in_turn
    transcript.prompt("1/1: 2 + 3?", NAMES)
    for piece in (Piece("2 and", True), Piece(" 3\nfive", True), Piece("It is", False), Piece(" 5", False)):
        transcript.write(0, piece)
    transcript.end(0, "9 tokens, stop")
    transcript.end(1, "0 tokens, length")
    assert out.getvalue() == (
        "=== 1/1: 2 + 3?\n--- student a\n│ 2 and 3\n│ five\n\nIt is 5\n[9 tokens, stop]\n\n"
        "--- teacher b\n[0 tokens, length]\n\n"
    )


def test_a_wide_terminal_gets_columns_a_narrow_one_or_one_response_blocks(
    wide: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(make_transcript(Screen(), 2), Columns)
    assert isinstance(make_transcript(Screen(), 1), Blocks)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((2 * NARROWEST + 5, 40)))
    assert isinstance(make_transcript(Screen(), 2), Blocks)


def test_columns_grow_at_their_own_pace(wide: None) -> None:
    out = Screen()
    transcript = make_transcript(out, 2)
    transcript.prompt("2 + 3?", NAMES)
    gap = " " * (NARROWEST - 2) + "  │  "
    transcript.write(0, Piece("a1\na2\na", False))
    assert out.lines()[2:] == ["a1" + " " * (NARROWEST - 2) + "  │"]
    transcript.write(1, Piece("b1", False))
    assert out.lines()[2:] == [f"a1{gap}b1"]
    transcript.write(1, Piece("\nb2\nb3\nb4", False))
    assert out.lines()[2:] == [f"a1{gap}b1", f"a2{gap}b2", f"a {gap}b3"]
    transcript.end(1, "stop")
    transcript.write(0, Piece("3", False))
    transcript.end(0, "length")
    assert out.lines()[2:-2] == [
        f"a1{gap}b1", f"a2{gap}b2", f"a3{gap}b3", f"[length]{' ' * (NARROWEST - 8)}  │  b4",
        f"{' ' * NARROWEST}  │  [stop]",
    ]  # fmt: skip


def test_thinking_stands_apart_in_columns(wide: None) -> None:
    out = Screen()
    transcript = make_transcript(out, 2)
    transcript.prompt("", NAMES)
    transcript.write(0, Piece("word " * 20, True))
    transcript.write(0, Piece("5", False))
    transcript.end(1, "stop")
    transcript.end(0, "stop")
    left = [line[:NARROWEST].rstrip() for line in out.lines()]
    per_line = (NARROWEST - 2 + 1) // 5
    assert left[1:3] == ["│ " + ("word " * per_line).rstrip(), "│ " + ("word " * (20 - per_line)).rstrip()]
    assert left[3:6] == ["", "5", "[stop]"]


def test_colours_are_for_terminals_and_control_characters_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for out, shown in ((Screen(), "\x1b[2m│ a\ufffd[2Jb\x1b[0m"), (io.StringIO(), "│ a\x1b[2Jb")):
        transcript = make_transcript(out, 1)
        transcript.prompt("", NAMES[:1])
        transcript.write(0, Piece("a\x1b[2Jb", True))
        assert out.getvalue().endswith(shown)


@pytest.mark.parametrize(
    "text", ["", "one two  three", "  indented code\twith tabs", "x" * 25 + " y", "日本語 ab 日本語日本語"]
)
@pytest.mark.parametrize("width", [4, 9])
def test_wrapped_lines_fit_and_only_the_last_changes(text: str, width: int) -> None:
    lines = wrap(text, width)
    assert all(cells(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    for end in range(len(text)):
        before = wrap(text[:end], width)[:-1]
        assert lines[: len(before)] == before
