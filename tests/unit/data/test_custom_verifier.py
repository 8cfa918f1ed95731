"""A verifier from outside of the package: found by its import path or entry point, refused in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2w.data import verifiers
from s2w.data.verifiers import check_verifier, is_custom, verify
from s2w.errors import ConfigError, VerifierError
from s2w.records import Prompt

MODULE = """
def length(response, answer, row):
    '''Part marks by length.'''
    return min(1, len(response) / row["wanted"])


def answers(response: str, answer: str | None, row: dict) -> bool:
    return response == answer


def two(response, answer):
    return 1.0


def named(response, answer, row, *, strict):
    return 1.0


def fails(response, answer, row):
    return row["missing"]


def out_of_range(response, answer, row):
    return 2


def text(response, answer, row):
    return "1.0"


def nothing(response, answer, row):
    pass


class Scorers:
    @staticmethod
    def right(response, answer, row):
        return 1


NUMBER = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current directory, which is not on the path yet."""
    (tmp_path / "own_task").mkdir()
    (tmp_path / "own_task/scoring.py").write_text(MODULE)
    (tmp_path / "own_task/broken.py").write_text("import json\njson.loads('{')\n")
    (tmp_path / "own_task/quits.py").write_text("raise SystemExit('usage: ...')\n")
    (tmp_path / "own_task/needs.py").write_text("import not_installed_here\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    verifiers.custom_verifier.cache_clear()
    yield "own_task.scoring"
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_task"]:
        del sys.modules[name]
    verifiers.custom_verifier.cache_clear()


def prompt(task: str, answer: str | None = None, **row: Any) -> Prompt:
    return Prompt("own/train/7", (), np.zeros(1, np.int32), "no_think", 0, task, answer, {"row": row})


def test_a_function_by_its_import_path(module: str) -> None:
    check_verifier(f"{module}:length")
    assert is_custom(f"{module}:length") and not is_custom("exact_match") and not is_custom("gcd")
    assert verify(prompt(f"{module}:length", wanted=8), "four") == 0.5
    assert verify(prompt(f"{module}:answers", "four"), "four") == 1.0
    assert verify(prompt(f"{module}:answers"), "four") == 0.0
    assert verify(prompt(f"{module}:Scorers.right"), "") == 1.0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("own_tusk.scoring:length", r"^task 'own_tusk.scoring:length': there is no module 'own_tusk', neither in /"),
        ("own_task.scorings:length", r"there is no module 'own_task.scorings', neither in /.* nor among what is inst"),
        ("own_task.scoring:lenght", r"own_task.scoring has no lenght: did you mean length\?$"),
        ("own_task.scoring:Scorers.left", r"own_task.scoring has no Scorers.left"),
        ("own_task.scoring:NUMBER", r"NUMBER is no function but 3$"),
        ("own_task.scoring:two", r"called with \(response, answer, row\), and two\(response, answer\) does not take"),
        (
            "own_task.scoring:named",
            r"named\(response, answer, row, \*, strict\) does not take them: missing a required",
        ),
        ("own_task.broken:length", r"own_task.broken cannot be imported: JSONDecodeError: Expecting property name"),
        ("own_task.quits:length", r"own_task.quits cannot be imported: SystemExit: usage"),
        ("own_task.needs:length", r"cannot be imported: ModuleNotFoundError: No module named 'not_installed_here'"),
        ("own_task/scoring.py:length", r"write a function of your own as package.module:function$"),
        ("own_task.scoring:", r"write a function of your own as package.module:function$"),
    ],
)
def test_what_is_no_verifier_is_refused_before_the_run(module: str, task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_verifier(task)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fails", r"failed in .*own_task/scoring.py, line \d+: KeyError: 'missing'$"),
        ("out_of_range", r"returned 2: a score is a number from 0 \(wrong\) to 1 \(right\)$"),
        ("text", r"returned '1.0': a score is a number"),
        ("nothing", r"returned None: a score is a number"),
    ],
)
def test_what_a_verifier_does_wrong_names_the_row(module: str, function: str, message: str) -> None:
    task = f"{module}:{function}"
    check_verifier(task)
    with pytest.raises(VerifierError, match=rf"^Prompt 'own/train/7': its verifier {task} {message}"):
        verify(prompt(task, wanted=8), "four")


def test_a_console_command_finds_modules_of_the_current_directory(module: str) -> None:
    """Its sys.path starts with the directory of the command."""
    code = "import sys; sys.path.pop(0); from s2w.data.verifiers import check_verifier; check_verifier(sys.argv[1])"
    root = str(Path(verifiers.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code, f"{module}:length"], check=True, env={**os.environ, "PYTHONPATH": root})


def test_an_entry_point_of_an_installed_package(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = Path("own_package-1.0.dist-info")
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1.0\n")
    points = {"by_length": "length", "two": "two", "exact_match": "length", "gcd": "length"}
    lines = [f"{name} = {module}:{function}" for name, function in points.items()]
    (installed / "entry_points.txt").write_text("\n".join([f"[{verifiers.GROUP}]", *lines, ""]))
    sys.path.insert(0, os.getcwd())
    verifiers._entry_points.cache_clear()
    try:
        check_verifier("by_length")
        assert is_custom("by_length") and not is_custom("exact_match") and not is_custom("gcd")
        assert verify(prompt("by_length", wanted=4), "four") == 1.0
        with pytest.raises(
            ConfigError, match=r"^task 'two' \(entry point own_task.scoring:two\): a verifier is called"
        ):
            check_verifier("two")
        with pytest.raises(ConfigError, match=r"'by_lenght'; did you mean 'by_length'\? A verifier is exact_match, ma"):
            check_verifier("by_lenght")
    finally:
        verifiers._entry_points.cache_clear()


def test_an_unknown_task_is_told_what_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        check_verifier("exact_mach")
    assert str(caught.value).startswith("There is no verifier and no reasoning-gym task 'exact_mach'; did you mean 'ex")
    assert "A verifier is exact_match, math_verify, one of reasoning-gym's" in str(caught.value)
    assert str(caught.value).endswith("has all), or a function of your own as package.module:function")
    with pytest.raises(ConfigError, match=r"reasoning-gym task 'sentiment': a verifier is"):
        check_verifier("sentiment")


def test_a_row_of_a_prompt_file_reaches_the_function(module: str) -> None:
    """The whole row is in the prompt's metadata, as JSON would have it."""
    from s2w.data.questions import read_row

    row = {"prompt": "Say four letters.", "task": f"{module}:length", "wanted": 4}
    question, response = read_row("'own.jsonl', row 0", row)
    assert (question.metadata, response) == ({"row": row}, None)
    assert json.loads(json.dumps(question.metadata)) == question.metadata
    with pytest.raises(ConfigError, match=r"^'own.jsonl', row 0: task 'own_task.scoring:two': a verifier is called"):
        read_row("'own.jsonl', row 0", {**row, "task": f"{module}:two"})
