"""What a row may hold, and that its columns mean the same wherever rows are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tokenizer

from s2w.config.schema import DataConfig, EvalConfig
from s2w.data.columns import COLUMNS
from s2w.data.files import read_rows
from s2w.data.prompts import build_prompts
from s2w.data.questions import read_row
from s2w.errors import ConfigError
from s2w.eval.problems import read_problems

TOKENIZER = make_tokenizer()
SCORING = "def mine(response, answer, row):\n    return 1.0\n"
USER, TOLD = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_scoring.py").write_text(SCORING)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_scoring:mine"


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "setting", "task"),
    [
        ({"answer": "4"}, "math_verify", "math_verify"),
        ({"answer": 4}, "exact_match", "exact_match"),
        ({"answer": "4", "task": "exact_match"}, "math_verify", "exact_match"),
        ({"answer": "4", "task": "gcd"}, "math_verify", "gcd"),
        ({"answer": "4"}, "gcd", "gcd"),
        ({"answer": "4", "task": "OWN"}, "math_verify", "OWN"),
        ({"answer": "4"}, "OWN", "OWN"),
        ({}, "OWN", "OWN"),
        ({"task": "OWN"}, "exact_match", "OWN"),
    ],
)
def test_prompts_responses_and_problems_have_the_same_verifier(
    tmp_path: Path, own: str, row: dict[str, Any], setting: str, task: str
) -> None:
    """And give it the same. Without an answer only `s2w eval` refuses a row that nothing checks."""
    row = {"prompt": "2+2?", **row, "response": "4"}
    row = {name: own if value == "OWN" else value for name, value in row.items()}
    setting, task = (own if name == "OWN" else name for name in (setting, task))
    path = written(tmp_path / "rows.jsonl", row)
    [trained], _ = build_prompts(DataConfig(path=path, heldout_prompts=0, verifier=setting), TOKENIZER, seed=0)
    [(where, read)] = read_rows(Path(path))
    given, response = read_row(where, read, verifier=setting)
    [asked] = read_problems(EvalConfig(path=path, verifier=setting))
    assert (trained.task, trained.answer) == (given.task, given.answer) == (asked.task, asked.answer)
    assert trained.metadata == given.metadata == asked.metadata
    assert (trained.task, response) == (task, "4")
    assert trained.place == asked.place == f"{path!r}, line 1"


def test_what_nothing_checks(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {"prompt": "2+2?"}, {"prompt": "3+3?", "answer": "6"})
    first, second = build_prompts(DataConfig(path=path, heldout_prompts=0), TOKENIZER, seed=0)[0]
    assert (first.task, second.task) == ("", "math_verify")
    off = DataConfig(path=path, heldout_prompts=0, verifier=None)
    assert [(one.task, one.answer) for one in build_prompts(off, TOKENIZER, seed=0)[0]] == [("", None), ("", "6")]
    with pytest.raises(ConfigError, match=r"rows\.jsonl', line 1, has no 'answer' \(eval\.answer_column\)"):
        read_problems(EvalConfig(path=path))


@pytest.mark.parametrize(
    ("row", "response"),
    [
        ({"prompt": "2+2?"}, None),
        ({"prompt": "2+2?", "response": "4"}, "4"),
        ({"prompt": "2+2?", "response": ""}, ""),
        ({"messages": [USER], "response": "4"}, "4"),
        ({"messages": [USER, TOLD]}, "5"),
        ({"messages": [USER, TOLD], "response": "4"}, "4"),
        ({"messages": [USER], "prompt": "another"}, None),
        ({"messages": json.dumps([USER, TOLD])}, "5"),
        ({"messages": "", "prompt": [USER]}, None),
        ({"messages": None, "prompt": "2+2?"}, None),
    ],
)
def test_prompt_and_response(tmp_path: Path, row: dict[str, Any], response: str | None) -> None:
    question, found = read_row("here", row)
    assert (question.messages, found) == ((USER,), response)
    # On-policy the student answers, in an evaluation the model: a response that is there is not read.
    path = written(tmp_path / "rows.jsonl", {**row, "answer": "4"})
    [prompt] = build_prompts(DataConfig(path=path, heldout_prompts=0), TOKENIZER, seed=0)[0]
    [problem] = read_problems(EvalConfig(path=path))
    assert prompt.messages == problem.messages == (USER,)


def test_an_empty_cell_is_no_value(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,messages,answer,task,mode,metadata\n2+2?,,,,,\n3+3?,,6,,think,\n")
    first, second = (read_row(where, row)[0] for where, row in read_rows(path))
    assert (first.task, first.answer, first.mode) == ("", None, None)
    assert (second.task, second.answer, second.mode) == ("math_verify", "6", "think")
    assert second.place == f"{str(path)!r}, row 1"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"answer": ["4"]}, r"^here: `answer` is a string or a number, not \['4'\]: write it as text, or into a col"),
        ({"answer": True}, r"^here: `answer` is a string or a number, not True"),
        ({"task": 3}, r"^here: `task` is a string, not 3$"),
        ({"task": "exact_match"}, r"^here: task 'exact_match' compares with an `answer`, and the row has none$"),
        ({"task": "gdc", "answer": "4"}, r"^here: There is no verifier .* 'gdc'; did you mean 'gcd'\?"),
        ({"task": "gcd", "metadata": "{"}, r"^here: `metadata` is text that is not JSON: "),
        ({"task": "gcd", "metadata": [1]}, r"^here: `metadata` is an object, not \[1\]$"),
        ({"messages": "2+2?"}, r"^here: `messages` is text that is not JSON: "),
        ({"response": 4}, r"^here: `response` is a string, not 4$"),
        ({"prompt": ""}, r"^here: the prompt is empty$"),
        ({"mode": "/think"}, r"^here has mode '/think'; a mode is think or no_think$"),
    ],
)  # fmt: skip
def test_what_a_row_may_not_hold(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_row("here", {"prompt": "2+2?", **row})


def test_a_template_and_choices_are_put_into_the_last_message(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be short."}
    path = written(tmp_path / "rows.jsonl", {"messages": [system, USER], "answer": "4", "wrong": "5"})
    [problem] = read_problems(EvalConfig(path=path, template="{question} Go.", choice_columns=["wrong"]))
    assert problem.messages[0] == system
    assert problem.messages[1]["content"].startswith("2+2?\n\nA) ") and problem.messages[1]["content"].endswith(" Go.")
    assert problem.task == "exact_match"


def test_a_verifier_of_ones_own_gets_the_prompts_own_row(tmp_path: Path, own: str) -> None:
    """Whatever it holds; and from a shard of generated responses the one of the prompt that was answered."""
    row = {"prompt": "2+2?", "task": own, "metadata": "notes", "wanted": 4}
    assert read_row("here", row)[0].metadata == {"row": row}
    shard = {"uid": "a", "sample": 0, "task": own, "prompt": [USER], "metadata": json.dumps({"row": row, "hint": "x"})}
    assert read_row("here", shard)[0].metadata == {"row": row, "hint": "x"}


def test_a_column_of_another_meaning_is_not_a_verifier(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {"prompt": "2+2?", "answer": "4", "task": "arithmetic"})
    with pytest.raises(ConfigError, match=r"line 1: There is no verifier and no reasoning-gym task 'arithmetic'"):
        read_problems(EvalConfig(path=path))
    assert read_problems(EvalConfig(path=path, task_column=""))[0].task == "math_verify"


def test_every_column_is_described() -> None:
    assert len({column.name for column in COLUMNS}) == len(COLUMNS)
    assert all(column.type and column.meaning and column.without and column.files for column in COLUMNS)
