"""The report made of graded responses."""

from __future__ import annotations

import json

import pytest
from tiny_models import make_tokenizer

from s2w.eval.grading import Graded
from s2w.eval.scores import make_report, mode_scores
from s2w.eval.statistics import bootstrap, pass_at_k
from s2w.records import Mode

TOKENIZER = make_tokenizer()


def graded(uid: str, task: str, mode: Mode, correct: list[bool], forced: bool = False) -> list[Graded]:
    return [Graded(uid, task, mode, right, right, not right, forced, 10 + i) for i, right in enumerate(correct)]


GRADES: list[tuple[int | None, Graded]] = [
    *((8, one) for one in graded("a/0", "a", "think", [True, True, False, False], forced=True)),
    *((8, one) for one in graded("a/1", "a", "think", [False, False, False, False])),
    *((8, one) for one in graded("b/0", "b", "think", [True, True, True, True])),
    *((None, one) for one in graded("a/0", "a", "no_think", [True, False, False, False])),
]
KS = [1, 2, 4]


def test_report() -> None:
    report = make_report(GRADES, KS, model="m", revision=None, seed=0, sampling={"temperature": 1.0})
    lines = {(one.task, one.mode, one.thinking_budget): one for one in report.scores}
    assert list(lines) == [
        ("all", "think", 8),
        ("a", "think", 8),
        ("b", "think", 8),
        ("a", "no_think", None),
    ]
    whole = lines["all", "think", 8]
    assert (whole.problems, whole.responses) == (3, 12)
    for k in KS:
        values = [pass_at_k(4, correct, k) for correct in (2, 0, 4)]
        assert whole.pass_at[k] == bootstrap(values, seed=0)
    assert whole.pass_at[1].value == pytest.approx(0.5)
    assert whole.mode_adherence == pytest.approx(6 / 12) and whole.truncated == pytest.approx(6 / 12)
    assert whole.forced == pytest.approx(4 / 12) and whole.response_length == pytest.approx(11.5)
    assert lines["a", "think", 8].pass_at[4].value == pytest.approx(0.5)

    again = json.loads(report.to_json())
    assert again["scores"][0]["pass_at"]["4"]["value"] == whole.pass_at[4].value
    fields = ("uid", "mode", "thinking_budget", "samples", "correct")
    assert [tuple(one[field] for field in fields) for one in again["problems"]] == [
        ("a/0", "think", 8, 4, 2),
        ("a/1", "think", 8, 4, 0),
        ("b/0", "think", 8, 4, 4),
        ("a/0", "no_think", None, 4, 1),
    ]

    table = report.table().splitlines()
    assert len({len(line) for line in table}) == 1  # Columns line up.
    head, first = table[0].split("  "), table[1].split()
    assert "pass@4 [95 %]" in [cell.strip() for cell in head]
    assert first[:5] == ["all", "think", "8", "0.333", "3"]


def test_a_table_of_one_task_without_budgets_has_neither_column() -> None:
    report = make_report(GRADES[-4:], [1], model="m", revision=None, seed=0, sampling={})
    assert report.table().splitlines()[0].split()[:2] == ["mode", "problems"]


def test_unverified_responses_make_no_report() -> None:
    one = Graded("a/0", "", "think", None, True, False, False, 1)
    with pytest.raises(ValueError, match="a/0 were not verified"):
        make_report([(None, one)], [1], model="m", revision=None, seed=0, sampling={})


def test_scores_of_a_run_by_mode() -> None:
    unverified = Graded("c/0", "", "think", None, False, False, False, 30)
    scores = mode_scores([*graded("a/0", "a", "think", [True]), unverified, *graded("b", "b", "no_think", [False])])
    assert scores == {
        "no_think": {"prompts": 1, "mode_adherence": 0, "truncated": 1, "response_length": 10, "accuracy": 0},
        "think": {"prompts": 2, "mode_adherence": 0.5, "truncated": 0, "response_length": 20, "accuracy": 1},
    }
    assert "accuracy" not in mode_scores([unverified])["think"]
