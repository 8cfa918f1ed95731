"""The generated tables of docs/*.md are those of the code, and what documents name exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from test_rooms import ROOMS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("CONTRIBUTING.md", "docs/architecture.md", "docs/cluster.md", "deploy/README.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
TABLES = {
    "objectives.md": ["objectives", "objective_settings", "divergences"],
    "metrics.md": ["metrics"],
    "resume.md": ["resumable"],
    "signals.md": ["support"],
    "data.md": ["columns", "tasks"],
}
PATH = re.compile(r"`((?:s2w|tests|docs|benchmarks|configs|deploy|examples|locks)/[\w./-]+)`")
FILE = re.compile(r"^\| `([\w./]+)` \|", re.MULTILINE)
"""A row of an example's table of files."""
LINK = re.compile(r"\]\((?!https?:)([^)#]+)[^)]*\)")


def test_generated_tables_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    assert spec is not None and spec.loader is not None
    make_tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_tables)
    assert make_tables.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(("document", "names"), TABLES.items())
def test_every_table_stands_in_its_document(document: str, names: list[str]) -> None:
    text = (ROOT / "docs" / document).read_text()
    assert re.findall(r"<!-- generated: (\w+) -->", text) == names
    assert text.count("<!-- end -->") == len(names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_exist(document: Path) -> None:
    text = document.read_text()
    named = [ROOT / path for path in PATH.findall(text) if not re.search("NAME|ROOM", path)]
    named += [document.parent / path for path in FILE.findall(text) + LINK.findall(text)]
    assert named
    assert [str(path) for path in named if not path.exists()] == []


def test_the_rooms_of_the_architecture_are_those_of_the_package() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    assert tuple(re.findall(r"^- \*\*(\w+)\*\*: ", text, re.MULTILINE)) == ROOMS
