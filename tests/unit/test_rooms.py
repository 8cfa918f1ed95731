"""The rooms of the package stand one above the other: a room imports from those below it alone."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import s2w

PACKAGE = Path(s2w.__file__).parent
ROOMS = (
    "errors", "metric", "records", "config", "actors", "models", "weights", "testbed", "data", "eval", "rollout",
    "teacher", "objectives", "learner", "observe", "teacher_data", "off_policy", "controller", "report", "plan",
    "launch", "vllm_plugin", "cli",
)  # fmt: skip
"""From bottom to top; a module of the top level is a room of its own."""


def room(module: str) -> str:
    """The room of a module, ``s2w.ROOM`` or ``s2w.ROOM.MODULE``; empty for the package itself."""
    return [*module.split("."), ""][1]


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Modules of the package that a file imports, anywhere in it, with the line."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write imports in full"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "s2w" else [base]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.partition(".")[0] == "s2w")


@pytest.fixture(scope="module")
def edges() -> dict[tuple[str, str], list[str]]:
    """Where a room imports from another one, by both."""
    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for file in sorted(PACKAGE.rglob("*.py")):
        own = room(".".join(["s2w", *file.relative_to(PACKAGE).with_suffix("").parts]))
        for module, line in imports(file):
            if own not in ("__init__", room(module)) and module != "s2w":  # Its version.
                found[own, room(module)].append(f"{file.relative_to(PACKAGE)}:{line}: {module}")
    return dict(found)


def test_every_room_has_its_place() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(ROOMS)
    assert len(set(ROOMS)) == len(ROOMS)


def test_no_two_rooms_import_each_other(edges: dict[tuple[str, str], list[str]]) -> None:
    tied = [places + edges[below, above] for (above, below), places in edges.items() if (below, above) in edges]
    assert not tied, tied


def test_imports_go_down(edges: dict[tuple[str, str], list[str]]) -> None:
    up = [places for (above, below), places in edges.items() if ROOMS.index(below) > ROOMS.index(above)]
    assert not up, up
