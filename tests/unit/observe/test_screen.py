"""A block that is drawn over, on a real terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from terminal import Terminal

from s2w.observe import screen
from s2w.observe.screen import Screen


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(screen, "REDRAW_S", 0.0)
    terminal = Terminal(rows=6, columns=30)
    yield terminal
    terminal.close()


def test_the_block_stays_below_the_lines(terminal: Terminal) -> None:
    shown = Screen(terminal.stream)
    shown.say("first")
    shown.show(["teacher: loading", "learner: compiling"])
    assert terminal.screen() == ["first", "teacher: loading", "learner: compiling"]
    shown.show(["teacher: up", "learner: compiling"])
    shown.say("second\nthird")
    assert terminal.screen() == ["first", "second", "third", "teacher: up", "learner: compiling"]
    shown.show(["learner: compiling"])
    assert terminal.screen() == ["first", "second", "third", "learner: compiling"]
    shown.show([])
    shown.say("last")
    assert terminal.screen() == ["first", "second", "third", "last"]


def test_what_others_write_stays(terminal: Terminal) -> None:
    shown = Screen(terminal.stream)
    shown.show(["one", "two"])
    print("a warning of a library", file=terminal.stream)
    shown.show(["three", "four"])
    assert terminal.screen() == ["a warning of a library", "three", "four"]


def test_long_lines_and_long_blocks_are_cut(terminal: Terminal) -> None:
    shown = Screen(terminal.stream)
    shown.show(["x" * 100] * 20)
    assert terminal.screen() == ["x" * 29] * 5


def test_drawings_follow_each_other_slowly(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "REDRAW_S", 60.0)
    shown = Screen(terminal.stream)
    shown.show(["1 of 9"])
    for count in range(2, 9):
        shown.show([f"{count} of 9"])
    assert terminal.screen() == ["1 of 9"]
    # What stays is printed at once, with the block as it is now.
    shown.say("a line")
    assert terminal.screen() == ["a line", "8 of 9"]


def test_a_file_gets_only_lines() -> None:
    file = io.StringIO()
    shown = Screen(file)
    shown.show(["teacher: loading"])
    shown.say("first")
    shown.show([])
    assert file.getvalue() == "first\n" and not shown.live


def test_a_dumb_terminal_is_a_file(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = Screen(terminal.stream)
    shown.show(["teacher: loading"])
    shown.say("first")
    assert terminal.written() == "first\r\n"
