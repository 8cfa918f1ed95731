"""Procedural tasks and verifiers: splits that do not touch, scorers that tell right from wrong."""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import reasoning_gym

from s2w.data.tasks import derive_seed, generate, score, task_names
from s2w.data.verifier_process import VerifierClosedError, VerifierProcess
from s2w.data.verifiers import check_verifier, extract_answer, verify
from s2w.errors import ConfigError
from s2w.records import Prompt

SMALL_SPACE = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
"""chain_sum with at most 200 different questions."""


def prompt(task: str, answer: str | None, **metadata: Any) -> Prompt:
    return Prompt(f"{task}/train/0", (), np.zeros(1, np.int32), "no_think", 0, task, answer, metadata)


def questions(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["question"] for entry in entries]


def test_neighbouring_seeds_of_reasoning_gym_share_entries() -> None:
    """Why seeds are hashed: entry 1 of seed 5 is entry 0 of seed 6."""
    first, second = (reasoning_gym.create_dataset("chain_sum", seed=seed, size=2) for seed in (5, 6))
    assert first[1]["question"] == second[0]["question"]
    train, _ = generate("chain_sum", 50, 0, seed=5)
    other, _ = generate("chain_sum", 50, 0, seed=6)
    assert not set(questions(train)) & set(questions(other))


def test_splits_are_disjoint_even_where_questions_are_few() -> None:
    train, heldout = generate("chain_sum", 1000, 40, seed=0, options=SMALL_SPACE)
    assert (len(train), len(heldout), len(set(questions(heldout)))) == (1000, 40, 40)
    assert not set(questions(train)) & set(questions(heldout))
    assert len(set(questions(train))) < 1000  # Repeats: the space is that small, so the test above says something.


def test_splits_repeat_and_heldout_stays() -> None:
    train, heldout = generate("base_conversion", 20, 8, seed=3)
    again = generate("base_conversion", 20, 8, seed=3)
    assert (train, heldout) == again
    assert generate("base_conversion", 5, 8, seed=3) == (train[:5], heldout)
    assert questions(generate("base_conversion", 20, 8, seed=4)[0]) != questions(train)


def test_too_few_questions() -> None:
    with pytest.raises(ConfigError, match=r"'chain_sum' has too few different questions.*for 500 held-out"):
        generate("chain_sum", 1, 500, seed=0, options=SMALL_SPACE)
    everything = len(set(questions(generate("chain_sum", 20_000, 0, seed=1, options=SMALL_SPACE)[0])))
    with pytest.raises(ConfigError, match=f"{everything} held-out prompts leave next to none"):
        generate("chain_sum", 10, everything, seed=0, options=SMALL_SPACE)


def test_bad_names_and_options() -> None:
    with pytest.raises(ConfigError, match="no reasoning-gym task 'chain_sums'; did you mean 'chain_sum'"):
        generate("chain_sums", 1, 1, seed=0)
    with pytest.raises(ConfigError, match=r"'chain_sum' does not take these options.*max_term"):
        generate("chain_sum", 1, 1, seed=0, options={"max_term": 3})
    with pytest.raises(ConfigError, match="'chain_sum' does not take these options"):
        generate("chain_sum", 1, 1, seed=0, options={"min_terms": 5, "max_terms": 2})
    with pytest.raises(ConfigError, match="may not set seed"):
        generate("chain_sum", 1, 1, seed=0, options={"seed": 2})
    with pytest.raises(ConfigError, match=r"no reasoning-gym task 'exact_mach'; did you mean"):
        check_verifier("exact_mach")
    assert "composite" not in task_names()


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


def test_derived_seeds_are_stable() -> None:
    """Written down: another value would change every run that is resumed."""
    assert derive_seed("chain_sum", "train", 0, 0) == 1917463402
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_answer_that_never_ends_scores_zero() -> None:
    """In this process the scorer would not come back; the next answer is scored as if nothing had been."""
    entry = generate("countdown", 1, 1, seed=0)[0][0]
    countdown = prompt("countdown", entry["answer"], entry=entry)
    with VerifierProcess(timeout_s=1.0) as verifier:
        assert verifier.verify(countdown, "9**9**9") == 0.0
        assert verifier.verify(countdown, entry["answer"]) == 1.0
        with pytest.raises(ConfigError, match="it has no task"):
            verifier.verify(prompt("", None), "4")


def test_a_closed_verifier_starts_no_other_process() -> None:
    """As when a run ends while a thread still grades."""
    entry = generate("countdown", 1, 1, seed=0)[0][0]
    countdown = prompt("countdown", entry["answer"], entry=entry)
    verifier = VerifierProcess(timeout_s=60.0)
    with ThreadPoolExecutor(1) as threads:
        grading = threads.submit(verifier.verify, countdown, "9**9**9")
        time.sleep(0.5)
        verifier.close()
        with pytest.raises(VerifierClosedError):
            grading.result(10)
    assert multiprocessing.active_children() == []
