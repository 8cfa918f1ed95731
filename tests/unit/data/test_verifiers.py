"""Verifiers: scorers that tell right from wrong."""

from __future__ import annotations

import threading

import pytest
from verifiable import prompt

from s2w.data.tasks import generate, score
from s2w.data.verifiers import extract_answer, verify
from s2w.errors import ConfigError


@pytest.mark.parametrize("task", ["chain_sum", "gcd", "countdown", "letter_counting", "base_conversion"])
def test_scorer_tells_right_from_wrong(task: str) -> None:
    train, _ = generate(task, 3, 1, seed=0)
    for entry in train:
        right = prompt(task, entry["answer"], entry=entry, options={})
        assert verify(right, f"So we find:\n<answer>{entry['answer']}</answer>") == 1.0
        assert verify(right, "<answer>none of it</answer>") < 0.5


def test_answer_that_the_scorer_cannot_read_is_wrong() -> None:
    entry = generate("countdown", 1, 1, seed=0)[0][0]
    assert score("countdown", "3 +* (", entry) < 0.5
    assert score("countdown", "", entry) < 0.5


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12", "12"),
        ("<answer> 3 </answer> or <answer>4\n</answer>", "4"),
        (r"thus \boxed{1} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{2} <answer>5</answer>", "5"),
        ("The answer is 42.", "42"),
        ("First answer: 1\n**Final answer:** 2.5", "2.5"),
        (r"an open \boxed{3", r"an open \boxed{3"),
        ("", ""),
    ],
)
def test_extract_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


def test_exact_match() -> None:
    assert verify(prompt("exact_match", "New  York"), "The answer is: New York.") == 1.0
    assert verify(prompt("exact_match", "New York"), "York") == 0.0


@pytest.mark.parametrize(
    ("reference", "text", "score"),
    [
        ("New York", "The answer is New York.", 1.0),
        ("New York", r"\boxed{\text{New York}}", 1.0),
        ("Paris", "<answer>Paris</answer>", 1.0),
        ("Paris", "Lyon", 0.0),
        ("1/2", "<answer>0.5</answer>", 1.0),
        ("1,000", "That makes 1000", 1.0),
        ("4", "We have 3 and 4", 1.0),
        ("A", r"\boxed{B}", 0.0),
        # As expressions these are equal: the same letters, multiplied.
        ("no", r"\boxed{on}", 0.0),
        ("left side", r"\boxed{felt dies}", 0.0),
    ],
)
def test_math_verify_takes_words_for_words(reference: str, text: str, score: float) -> None:
    assert verify(prompt("math_verify", reference), text) == score


def test_math_verify_in_any_thread() -> None:
    results: list[float] = []

    def run() -> None:
        half = prompt("math_verify", r"\frac{1}{2}")
        results.extend(verify(half, text) for text in (r"so \boxed{0.5}", "The answer is $1/2$", "The answer is 2", ""))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == [1.0, 1.0, 0.0, 0.0]


def test_prompt_without_task_or_answer() -> None:
    with pytest.raises(ConfigError, match="it has no task"):
        verify(prompt("", None), "4")
    with pytest.raises(ConfigError, match="exact_match needs its answer"):
        verify(prompt("exact_match", None), "4")
