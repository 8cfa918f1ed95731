"""Which responses of the teacher are dropped, and the table of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from teacher_responses import response

from s2w.config.schema import FilterConfig
from s2w.data.verifier_process import VerifierProcess
from s2w.teacher_data.filters import FILTERS, apply_filters
from s2w.teacher_data.response import Response

LOOP = "wait, no. " * 9
CRAFTED: list[tuple[Response, str | None]] = [
    (response("2"), None),
    (response("2", sample=1), "duplicate"),
    (response("2", question="1+1 = ?"), None),
    (response("<think>one and one</think>2", mode="think"), None),
    (response("2", mode="think"), "format"),
    (response("<think></think>2", mode="think"), "format"),
    (response("<think>one and", mode="think"), "format"),
    (response("<think>one and one</think>2"), "format"),
    (response("two or", finish="length"), "truncated"),
    (response("<think>one and", mode="think", finish="abort"), "truncated"),
    (response("x"), "length"),
    (response("abcdefghij" * 20 + "!"), "length"),
    (response("22", question="1" * 65), "length"),
    (response(LOOP), "loop"),
    (response("答案是二"), "language"),
    (response("答案是二", question="一加一?"), None),
    (response("".join(map(str, range(10, 70))) + "二"), None),
    (response("<think>sure</think>The answer is 2.", mode="think", task="exact_match"), None),
    (response("The answer is 3.", task="exact_match"), "wrong"),
    (response("The answer is 2.", task="exact_match"), None),
]  # fmt: skip


@pytest.fixture(scope="module")
def verifier() -> Iterator[VerifierProcess]:
    with VerifierProcess() as process:
        yield process


def crafted() -> list[Response]:
    # A single "2" is too short for the length filter: pad all one-character answers but "x".
    return [replace(r, token_ids=np.array([*r.token_ids, 0], np.int32)) if r.text == "2" else r for r, _ in CRAFTED]


def test_the_table_of_filters(verifier: VerifierProcess) -> None:
    config = FilterConfig(min_tokens=2, max_tokens=150)
    filtered = apply_filters(crafted(), config, max_tokens=200, max_prompt_tokens=64, opened=False, verifier=verifier)
    reasons = [reason for _, reason in CRAFTED]
    assert [reason for _, reason in filtered.dropped] == [reason for reason in reasons if reason]
    assert [r.text for r in filtered.kept] == [r.text for r, reason in CRAFTED if reason is None]
    table = filtered.table()
    expected = {
        "truncated": 2, "format": 4, "length": 3, "loop": 1, "language": 1, "duplicate": 1, "wrong": 1,
    }  # fmt: skip
    assert table["dropped"] == expected and tuple(table["dropped"]) == FILTERS
    assert table["responses"] == 20 and table["kept"] == 7
    assert table["share"]["format"] == 0.2
    assert table["kept_by_mode"] == {"no_think": 5, "think": 2}
    assert [line.split()[:2] for line in filtered.text().splitlines()][2] == ["-", "format"]


def test_every_filter_can_be_turned_off(verifier: VerifierProcess) -> None:
    off = FilterConfig(
        truncated=False, format=False, min_tokens=0, loop_ngram=0, cjk_share=1.0, duplicates=False, verified=False
    )
    kept = apply_filters(crafted(), off, max_tokens=250, max_prompt_tokens=99, opened=False, verifier=None).kept
    assert len(kept) == len(CRAFTED)
    on = FilterConfig(min_tokens=2, max_tokens=150)
    options = {"max_tokens": 200, "max_prompt_tokens": 64, "opened": False, "verifier": verifier}
    everything = Counter(reason for _, reason in apply_filters(crafted(), on, **options).dropped)  # type: ignore[arg-type]
    for name, setting in {
        "truncated": {"truncated": False}, "format": {"format": False}, "loop": {"loop_ngram": 0},
        "language": {"cjk_share": 1.0}, "duplicate": {"duplicates": False}, "wrong": {"verified": False},
    }.items():  # fmt: skip
        filtered = apply_filters(crafted(), replace(on, **setting), **options)  # type: ignore[arg-type]
        assert everything[name] and not any(reason == name for _, reason in filtered.dropped)
