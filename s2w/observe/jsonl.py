"""Files with one JSON value per line that survive their writer being killed at any moment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def append(path: Path, lines: Iterable[Line]) -> None:
    """Appends the lines in one write; a torn last line of an earlier write is cut off first."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with path.open("ab+", buffering=0) as file:
        if end := file.seek(0, 2):
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.truncate(len(_complete(path)))
        file.write(text.encode())


def read(path: Path) -> list[Line]:
    """All lines, without a torn last one; none if there is no such file."""
    return [json.loads(line) for line in _complete(path).splitlines()] if path.exists() else []


def keep(path: Path, wanted: Callable[[Line], bool]) -> None:
    """Drops all other lines, and a torn last one: at every moment the file is the old one or the new one."""
    if path.exists():
        partial = path.with_suffix(".partial")
        partial.write_bytes(b"".join(x for x in _complete(path).splitlines(keepends=True) if wanted(json.loads(x))))
        partial.replace(path)


def _complete(path: Path) -> bytes:
    """The file up to the end of its last whole line."""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]
