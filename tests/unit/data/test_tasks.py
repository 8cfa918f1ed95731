"""Procedural tasks: splits that do not touch."""

from __future__ import annotations

from typing import Any

import pytest
import reasoning_gym

from s2w.data.tasks import derive_seed, generate, task_names
from s2w.data.verifiers import check_verifier
from s2w.errors import ConfigError

SMALL_SPACE = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
"""chain_sum with at most 200 different questions."""


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


def test_derived_seeds_are_stable() -> None:
    """Written down: another value would change every run that is resumed."""
    assert derive_seed("chain_sum", "train", 0, 0) == 1917463402
    assert derive_seed(1, 23) != derive_seed(12, 3)
