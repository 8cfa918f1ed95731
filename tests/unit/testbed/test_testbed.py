"""The testbed: its task, tokenizer, teacher and student."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import s2w.testbed
from s2w.config.schema import DataConfig
from s2w.data.prompts import build_prompts
from s2w.data.tasks import generate, score
from s2w.data.verifiers import verify
from s2w.models.modes import split_thinking
from s2w.records import Mode
from s2w.testbed import task
from s2w.testbed.student import student_config
from s2w.testbed.teacher import IGNORED, collate, encode, teacher_config, train
from s2w.testbed.tokenizer import CHARACTERS, make_tokenizer

CHECKPOINTS = Path(s2w.testbed.__file__).parent / "checkpoint"
MODES: tuple[Mode, ...] = ("think", "no_think")
LONGEST_RESPONSE = 64
"""Tokens, with the end-of-sequence token."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def problems(count: int, split: task.Split, seed: int = 0) -> list[task.Problem]:
    rng = random.Random(seed)
    return [task.draw(rng, split) for _ in range(count)]


def test_gold_steps_are_true_and_end_in_the_sum() -> None:
    for problem in problems(300, "train"):
        thoughts, answer = problem.response("think").split("</think>\n\n")
        total = problem.terms[0]
        for term, line in zip(problem.terms[1:], thoughts.splitlines()[1:], strict=True):
            carry, digits = 0, ""
            for step in line.split()[:-1]:
                a, b, c, tens, ones = map(int, re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d)(\d)", step).groups())  # type: ignore
                assert c == carry and a + b + c == 10 * tens + ones
                carry, digits = tens, f"{ones}{digits}"
            total += term
            assert int(line.split()[-1]) == total == int(f"{carry}{digits}")
        assert answer == str(sum(problem.terms)) == problem.response("no_think")


@pytest.mark.parametrize("mode", MODES)
def test_score_takes_gold_and_refuses_a_wrong_sum(mode: Mode) -> None:
    for problem in problems(100, "heldout"):
        gold = problem.response(mode)
        assert task.score(gold, mode, problem.answer) == 1.0
        assert task.score(gold, mode, str(sum(problem.terms) + 1)) == 0.0
        assert task.score(gold + "0", mode, problem.answer) == 0.0
        assert task.score(gold[:-1], mode, problem.answer) == 0.0


def test_score_needs_the_end_of_the_think_block() -> None:
    assert task.score("<think>\n168", "think", "168") == 0.0
    assert task.score("<think>\n168\n</think>\n\n", "think", "168") == 0.0
    assert task.score("<think>\n1\n</think>\n\n168", "think", "168") == 1.0


def test_is_a_task_of_the_data_loader() -> None:
    train_entries, heldout = generate(task.NAME, train=40, heldout=20, seed=0)
    for split, entries in (("train", train_entries), ("heldout", heldout)):
        for entry in entries:
            problem = task.Problem(tuple(entry["metadata"]["terms"]))
            assert (problem.question, problem.answer) == (entry["question"], entry["answer"])
            assert problem.split == split
            assert score(task.NAME, problem.answer, entry) == 1.0
            assert score(task.NAME, problem.answer + "0", entry) == score(task.NAME, "", entry) == 0.0


def test_prompts_of_a_run_are_those_that_the_teacher_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    data = DataConfig(tasks=[task.NAME], train_prompts=8, heldout_prompts=4)
    train_prompts, _ = build_prompts(data, tokenizer, seed=0)
    assert {prompt.mode for prompt in train_prompts} == set(MODES)
    for prompt in train_prompts:
        problem = task.Problem(tuple(prompt.metadata["entry"]["metadata"]["terms"]))
        assert prompt.token_ids.tolist() == encode(tokenizer, problem, prompt.mode)[0]
        answer = split_thinking(problem.response(prompt.mode), prompt.mode).answer
        assert verify(prompt, answer) == 1.0


def test_splits_are_disjoint_up_to_the_order_of_the_terms() -> None:
    train_set = {tuple(sorted(p.terms)) for p in problems(4000, "train")}
    heldout = {tuple(sorted(p.terms)) for p in problems(4000, "heldout")}
    assert not train_set & heldout
    assert len(train_set) > 3500 and len(heldout) > 3000


def test_heldout_share() -> None:
    every = [task.Problem((a, b, c)) for a in range(10, 100, 3) for b in range(a, 100, 3) for c in range(b, 100, 3)]
    share = sum(p.split == "heldout" for p in every) / len(every)
    assert abs(share - 1 / task.HELDOUT_SHARE) < 0.02  # 4960 problems: four standard errors


def test_draw_depends_on_the_seed_alone() -> None:
    assert problems(50, "train", seed=3) == problems(50, "train", seed=3) != problems(50, "train", seed=4)
    assert problems(1, "train", seed=3)[0].terms == (40, 85, 79)  # on every machine


def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= 64
    for problem in problems(200, "train"):
        for text in (problem.question, problem.response("think"), problem.response("no_think")):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        _, response = encode(tokenizer, problem, "think")
        assert len(response) <= LONGEST_RESPONSE and response[-1] == tokenizer.eos_token_id
    ids = tokenizer("<think>\n\n</think>\n\n12<|im_end|>")["input_ids"]
    assert len(ids) == 7
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\n\n</think>\n\n12"
    assert len(tokenizer(CHARACTERS)["input_ids"]) == len(CHARACTERS)


def test_tokenizer_refuses_other_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="UNK"):
        tokenizer("12 plus 34")


def test_chat_template_follows_qwen3(tokenizer: PreTrainedTokenizerFast) -> None:
    def render(messages: list[dict[str, str]], **kwargs: Any) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs))

    first = {"role": "user", "content": "12+34+56"}
    opened = "<|im_start|>user\n12+34+56<|im_end|>\n<|im_start|>assistant\n"
    assert render([first]) == render([first], enable_thinking=True) == opened
    assert render([first], enable_thinking=False) == opened + "<think>\n\n</think>\n\n"
    answer = {"role": "assistant", "content": "<think>\n1+2=3\n</think>\n\n102"}
    assert render([first, answer, first]) == opened + "102<|im_end|>\n" + opened


@pytest.mark.parametrize("mode", MODES)
def test_labels_cover_the_response_alone(tokenizer: PreTrainedTokenizerFast, mode: Mode) -> None:
    samples = [encode(tokenizer, problem, mode) for problem in problems(20, "train")]
    batch = collate(samples, tokenizer.pad_token_id)
    for row, (prompt, response) in enumerate(samples):
        length = len(prompt) + len(response)
        assert batch["input_ids"][row, :length].tolist() == prompt + response
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        labels = batch["labels"][row]
        assert labels[labels != IGNORED].tolist() == response
        assert labels[len(prompt) : length].tolist() == response


def test_training_lowers_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = collate([encode(tokenizer, p, "think") for p in problems(16, "heldout")], tokenizer.pad_token_id)
    before, after = (train(tokenizer, steps=steps)(**batch).loss.item() for steps in (0, 6))
    assert after < before - 0.1  # from log(23) = 3.1 nats of a random model


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_checkpoint_is_what_the_code_describes(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    written = AutoConfig.from_pretrained(CHECKPOINTS / name)
    described = {"teacher": teacher_config, "student": student_config}[name](tokenizer)
    ignored = {"dtype", "_name_or_path", "transformers_version"}
    assert {k: v for k, v in written.to_dict().items() if k not in ignored} == {
        k: v for k, v in described.to_dict().items() if k not in ignored
    }
    saved = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    assert saved.get_vocab() == tokenizer.get_vocab()
    assert saved.chat_template == tokenizer.chat_template
    assert (saved.eos_token_id, saved.pad_token_id) == (written.eos_token_id, written.pad_token_id)
    text = problems(1, "train")[0].response("think")
    assert saved(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_sizes(tokenizer: PreTrainedTokenizerFast) -> None:
    assert sum(path.stat().st_size for path in (CHECKPOINTS / "teacher").iterdir()) <= 8 * 2**20
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(student_config(tokenizer))
    assert 90_000 < student.num_parameters() < 130_000


def test_teacher_thinks_right(tokenizer: PreTrainedTokenizerFast) -> None:
    """Sampled at temperature 1 on held-out problems; pass@1 is 0.955, three standard errors above the bound."""
    teacher: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "teacher", dtype=torch.float32)
    asked = problems(128, "heldout", seed=1)
    prompts = torch.tensor([encode(tokenizer, problem, "think")[0] for problem in asked])
    torch.manual_seed(0)
    output = teacher.generate(prompts, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=LONGEST_RESPONSE)
    texts = tokenizer.batch_decode(output[:, prompts.shape[1] :], skip_special_tokens=True)
    correct = sum(task.score(text, "think", problem.answer) for text, problem in zip(texts, asked, strict=True))
    assert correct / len(asked) > 0.9
