"""The summary of a run's prompts: what it counts, and what it says in two lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tokenizer

from s2w.config.schema import DataConfig
from s2w.data.prompts import build_prompts, read_questions
from s2w.data.summary import DataSummary, summarise_prompts

TOKENIZER = make_tokenizer()
ROWS: list[dict[str, Any]] = [
    {"prompt": "1+1?", "task": "exact_match", "answer": "2", "mode": "think"},
    {"prompt": "1+1?", "task": "exact_match", "answer": "2", "mode": "think"},  # the same
    {"prompt": "1+1?  /no_think", "task": "exact_match", "answer": "2"},  # the same question
    {"prompt": "Pick a number from 10 to 20.", "task": "chain_sum", "answer": "12", "mode": "no_think"},
    {"prompt": "How are you? " + "Tell. " * 50, "mode": "no_think"},
]
HELDOUT: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}], "mode": "think"},
    {"prompt": "Who are you?", "mode": "no_think"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    directory = tmp_path_factory.mktemp("data")
    for name, rows in (("train", ROWS), ("heldout", HELDOUT)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(directory / "train.jsonl"), heldout_path=str(directory / "heldout.jsonl"))


@pytest.fixture(scope="module")
def summary(data: DataConfig) -> DataSummary:
    return summarise_prompts(*build_prompts(data, TOKENIZER, seed=0), TOKENIZER, (60, "data.max_prompt_tokens"))


def test_counts(data: DataConfig, summary: DataSummary) -> None:
    train, heldout = summary.train, summary.heldout
    assert (train.prompts, train.modes) == (5, {"no_think": 3, "think": 2})
    assert train.tasks == {"exact_match": 3, "chain_sum": 1}
    assert train.verifiers == {"exact_match": 3, "the task's scorer": 1} and train.verified == 4
    assert (train.same_prompt, train.same_question, heldout.same_question) == (1, 2, 0)
    assert (heldout.prompts, heldout.tasks, heldout.verified, heldout.modes) == (
        2, {}, 0, {"think": 1, "no_think": 1},
    )  # fmt: skip
    assert summary.heldout_questions_in_train == 1
    lengths = sorted(len(prompt.token_ids) for prompt in build_prompts(data, TOKENIZER, seed=0)[0])
    assert lengths[-1] > 60 > lengths[-2]
    assert train.lengths == {
        "shortest": lengths[0], "median": lengths[2], "90%": lengths[4], "99%": lengths[4], "longest": lengths[4],
    }  # fmt: skip
    assert (train.too_long, heldout.too_long) == (1, 0)


def test_the_first_prompt_of_each_mode_with_its_special_tokens(summary: DataSummary) -> None:
    think, no_think = summary.examples["think"], summary.examples["no_think"]
    assert (think.uid, think.text) == (
        "exact_match/train/0", "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
    )  # fmt: skip
    assert think.special_tokens == {"<|im_start|>": 2, "<|im_end|>": 1}
    assert (no_think.uid, no_think.special_tokens["<think>"]) == ("exact_match/train/2", 1)
    assert "first prompt in mode think, 'exact_match/train/0'" in summary.shown_examples()[0]
    assert "\n| <|im_start|>user\n| 1+1?<|im_end|>\n| <|im_start|>assistant\n| " in summary.shown_examples()[0]


def test_a_long_example_is_shown_by_its_ends(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a" * 10_000, "mode": "think"}) + "\n")
    data = DataConfig(path=str(tmp_path / "p.jsonl"), heldout_prompts=0, max_prompt_tokens=20_000)
    [text] = summarise_prompts(*build_prompts(data, TOKENIZER, seed=0), TOKENIZER).shown_examples()
    assert len(text) < 2_500 and "characters ..." in text and text.endswith("| <|im_start|>assistant\n| ")


def test_two_lines(summary: DataSummary) -> None:
    counts, lengths, warning = summary.lines()
    assert counts == "5 prompts: 3 verified by exact_match, 1 by the task's scorer, 1 not; held-out 2: 0 verified"
    longest = summary.train.lengths["longest"]
    assert lengths == (
        f"3 no_think, 2 think; tokens of a prompt: median {summary.train.lengths['median']}, longest {longest} of at "
        "most 60; 1 is a repetition"
    )
    assert warning.startswith("none of the held-out prompts has a verifier")


def test_nothing_to_verify_is_no_warning(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(4)))
    data = DataConfig(path=str(tmp_path / "p.jsonl"), heldout_prompts=1)
    assert summarise_prompts(*build_prompts(data, TOKENIZER, seed=0), TOKENIZER).lines()[0] == (
        "3 prompts: 0 verified; held-out 1: 0 verified"
    )
    assert summarise_prompts(*build_prompts(data, TOKENIZER, seed=0), TOKENIZER).warnings() == []


def test_without_a_tokenizer(data: DataConfig) -> None:
    """What the rows alone tell."""
    summary = summarise_prompts(*read_questions(data, seed=0))
    assert (summary.unit, summary.limit, summary.examples) == ("characters", None, {})
    assert summary.train.modes == {"no_think": 3, "think": 2}
    assert (summary.train.same_prompt, summary.train.same_question) == (1, 2)
    assert summary.train.lengths["shortest"] == len("1+1?")
    assert "  task chain_sum" in summary.table() and "  task exact_match" not in summary.table()
    assert "characters, median" in summary.table() and "longer than" not in summary.table()
