"""Where the prompts of ``s2w sample`` come from: the command line, a file, standard input, or lines that are typed."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

from s2w.data.columns import as_messages, check_prompt
from s2w.data.files import read_rows
from s2w.data.questions import Question, read_row
from s2w.errors import ConfigError

CHUNK = 1 << 16
"""Bytes read at once; a terminal gives at most one line."""


def known_questions(texts: Sequence[str], file: Path | None) -> list[Question] | None:
    """The prompts that are known before anything starts; None if they are typed at a terminal.

    Args:
        texts: those of the command line.
        file: rows as ``s2w train`` reads them; responses in them are left out.

    Raises:
        ConfigError: two sources or none, a row that is not a prompt, an empty prompt.
    """
    if texts and file is not None:
        raise ConfigError(f"give --prompt or the file {str(file)!r}, not both")
    if file is not None:
        read = [read_row(where, row)[0] for where, row in read_rows(file.expanduser())]
        return [replace(one, uid=f"{file.stem}/{i}") for i, one in enumerate(read)]
    if texts:
        return [question("--prompt", i, text) for i, text in enumerate(texts)]
    if sys.stdin.isatty():
        return None
    lines = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not lines:
        raise ConfigError("there are no prompts: give --prompt TEXT, a file, or a line a prompt on standard input")
    return [question("standard input", i, line) for i, line in enumerate(lines)]


def question(source: str, index: int, text: str) -> Question:
    """A prompt that is only a text.

    Raises:
        ConfigError: it is empty.
    """
    messages = as_messages(source, text)
    check_prompt(source, messages)
    return Question(f"{source}/{index}", messages)


async def typed_questions(invitation: str = "> ") -> AsyncIterator[Question]:
    """A question for each line typed at the terminal, until its end (Ctrl-D); each line is a chat of its own."""
    loop, lines = asyncio.get_running_loop(), asyncio.Queue[str | None]()
    descriptor, rest = sys.stdin.fileno(), b""

    # A thread that waits in a read would hold up the end of the process.
    def read() -> None:
        nonlocal rest
        data = os.read(descriptor, CHUNK)
        *complete, rest = (rest + data).split(b"\n")
        for line in complete:
            lines.put_nowait(line.decode(errors="replace"))
        if not data:
            loop.remove_reader(descriptor)
            lines.put_nowait(None)

    loop.add_reader(descriptor, read)
    try:
        count = 0
        while True:
            print(invitation, end="", file=sys.stderr, flush=True)
            line = await lines.get()
            if line is None:
                print(file=sys.stderr)
                return
            if line.strip():
                yield question("typed", count, line)
                count += 1
    finally:
        loop.remove_reader(descriptor)
