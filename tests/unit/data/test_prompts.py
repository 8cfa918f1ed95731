"""Prompts: built from tasks and files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf
from tiny_models import make_tokenizer

from s2w.config.schema import Config, DataConfig
from s2w.data.placeholders import context_columns, placeholders
from s2w.data.prompts import TooFewPromptsError, build_prompts
from s2w.data.stream import PromptStream
from s2w.errors import ConfigError
from s2w.models.modes import EMPTY_THINK_BLOCK
from s2w.records import Prompt

TOKENIZER = make_tokenizer()


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(prompt: Prompt) -> int:
    """Number of the file's row that a prompt is from."""
    return int(prompt.uid.rpartition("/")[2])


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_tasks_are_mixed_in_equal_parts_and_modes() -> None:
    data = DataConfig(tasks=["chain_sum", "gcd"], task_options={"chain_sum": {"max_terms": 2}}, train_prompts=9,
                      heldout_prompts=4)  # fmt: skip
    train, heldout = build_prompts(data, TOKENIZER, seed=7)
    assert [prompt.uid for prompt in train[:4]] == [
        "chain_sum/train/0", "gcd/train/0", "chain_sum/train/1", "gcd/train/1",
    ]  # fmt: skip
    assert Counter(prompt.task for prompt in train) == {"chain_sum": 5, "gcd": 4}
    assert Counter((prompt.task, prompt.mode) for prompt in heldout) == {
        (task, mode): 1 for task in data.tasks for mode in ("think", "no_think")
    }
    for prompt in train + heldout:
        text = str(TOKENIZER.decode(prompt.token_ids))
        assert prompt.token_ids.dtype == np.int32
        assert prompt.messages[0]["content"] in text
        assert text.endswith(EMPTY_THINK_BLOCK) == (prompt.mode == "no_think")
        assert prompt.metadata["entry"]["answer"] == prompt.answer
    again, _ = build_prompts(data, TOKENIZER, seed=7)
    assert [(p.uid, p.seed, p.token_ids.tolist()) for p in again] == [
        (p.uid, p.seed, p.token_ids.tolist()) for p in train
    ]
    assert {p.seed for p in build_prompts(data, TOKENIZER, seed=8)[0]}.isdisjoint(p.seed for p in train)


def test_settings_may_come_from_omegaconf() -> None:
    data = OmegaConf.structured(DataConfig(tasks=["gcd"], task_options={"gcd": {"max_numbers": 2}}, train_prompts=2,
                                           heldout_prompts=1))  # fmt: skip
    assert len(build_prompts(data, TOKENIZER, seed=0, modes=["think"])[0]) == 2


def test_columns_that_a_teacher_reads_are_kept(tmp_path: Path) -> None:
    """And no others: rows can be large."""
    rows = [{"prompt": f"{i}+{i}?", "answer": str(2 * i), "hint": f"double {i}", "solution": "add"} for i in range(3)]
    config = Config(data=DataConfig(path=write_jsonl(tmp_path / "p.jsonl", rows), heldout_prompts=1))
    config.teacher.context = "{question} {{Hint}}: {hint} {level}"
    config.teachers = {"other": {"model": "m", "context": "{answer}"}}
    assert context_columns(config) == {"hint", "level"}
    train, _ = build_prompts(config.data, TOKENIZER, seed=0, columns=context_columns(config))
    assert [prompt.metadata for prompt in train] == [{"hint": f"double {row(prompt)}"} for prompt in train]


@pytest.mark.parametrize("template", ["{question", "{question.text}", "{}", "{answer:3}", "{answer!r}"])
def test_a_context_with_more_than_names_in_braces(template: str) -> None:
    with pytest.raises(ConfigError, match=r"^teachers\.t\.context=.*write \{\{ for a brace that is text$"):
        placeholders("teachers.t.context", template)


def test_jsonl_and_parquet_give_the_same_prompts(tmp_path: Path) -> None:
    rows = [
        {
            "messages": user(f"{i}+{i}?"),
            "answer": str(2 * i),
            "task": "math_verify",
            "mode": ("think", "no_think")[i % 2],
        }
        for i in range(6)
    ]
    jsonl = write_jsonl(tmp_path / "sums.jsonl", rows)
    parquet = str(tmp_path / "sums.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    built = [
        build_prompts(DataConfig(path=path, heldout_prompts=2, system_prompt="Add."), TOKENIZER, seed=0)
        for path in (jsonl, parquet)
    ]
    [(train, heldout), (train_2, heldout_2)] = built
    assert {prompt.uid.rpartition("/")[0] for prompt in train} == {"math_verify/train"}
    assert {prompt.uid.rpartition("/")[0] for prompt in heldout} == {"math_verify/heldout"}
    assert (len(train), sorted(map(row, train + heldout))) == (4, list(range(6)))
    for a, b in zip(train + heldout, train_2 + heldout_2, strict=True):
        assert (a.uid, a.messages, a.mode, a.answer, a.seed) == (b.uid, b.messages, b.mode, b.answer, b.seed)
        assert np.array_equal(a.token_ids, b.token_ids)
    assert train[1].messages[0] == {"role": "system", "content": "Add."}
    assert [prompt.mode for prompt in train] == [rows[row(prompt)]["mode"] for prompt in train]


def test_prompt_column_soft_switch_and_own_system_message(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "4+4? /no_think"},
        {"prompt": [{"role": "system", "content": "Own."}, *user("5+5?")], "answer": 10},
    ]
    data = DataConfig(
        path=write_jsonl(tmp_path / "p.jsonl", rows),
        heldout_path=write_jsonl(tmp_path / "h.jsonl", [{"prompt": "6+6?"}]),
        system_prompt="Add.",
    )
    train, heldout = build_prompts(data, TOKENIZER, seed=0, modes=["think"])
    assert [prompt.mode for prompt in train] == ["no_think", "think"]
    assert [prompt.messages[0]["content"] for prompt in train + heldout] == ["Add.", "Own.", "Add."]
    assert (train[0].uid, train[0].task, train[0].answer) == ("p/train/0", "", None)
    assert (train[1].uid, train[1].task, train[1].answer) == ("math_verify/train/1", "math_verify", "10")
    assert heldout[0].uid == "h/heldout/0"


def split(path: str, seed: int, heldout: int = 4) -> tuple[list[int], list[int]]:
    train, held = build_prompts(DataConfig(path=path, heldout_prompts=heldout), TOKENIZER, seed=seed)
    return [row(prompt) for prompt in train], [row(prompt) for prompt in held]


def test_the_seed_draws_the_heldout_prompts_of_a_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"{i}+{i}?"} for i in range(20)])
    train, heldout = split(path, seed=3)
    assert (len(heldout), sorted(train + heldout), train) == (4, list(range(20)), sorted(train))
    assert split(path, seed=3) == (train, heldout) != split(path, seed=4)
    assert len({tuple(split(path, seed)[1]) for seed in range(5)}) == 5
    # More of them are the same ones and others.
    assert set(heldout) < set(split(path, seed=3, heldout=8)[1])


def test_a_resumed_run_has_the_same_split(tmp_path: Path) -> None:
    """The uids of the training prompts tell which rows are held out, and the stream's state knows them."""
    data = DataConfig(
        path=write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"{i}+{i}?"} for i in range(20)]), heldout_prompts=4
    )
    first, again, other = (build_prompts(data, TOKENIZER, seed)[0] for seed in (3, 3, 4))
    state = PromptStream(first, 4, seed=3).state_dict()
    assert PromptStream(again, 4, 3, state).next_batch()[0].uid == PromptStream(first, 4, 3).next_batch()[0].uid
    with pytest.raises(ConfigError, match="its fingerprint was"):
        PromptStream(other, 4, 3, state)


def test_repetitions_of_a_prompt_stay_on_one_side(tmp_path: Path) -> None:
    """In whatever mode, and however they ask for it."""
    texts = ("{}+{}?", "{}+{}? /think", "/no_think {}+{}?", "{}+{}?  ")
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text.format(i, i)} for text in texts for i in range(5)])
    for seed in range(5):
        heldout = split(path, seed)[1]
        assert len(heldout) == 4 and len({number % 5 for number in heldout}) == 1
    # One more than a prompt has repetitions takes a second prompt.
    assert len(split(path, seed=0, heldout=5)[1]) == 8
    with pytest.raises(TooFewPromptsError, match=r"has 20 prompts \(5 different ones\), too few to hold out 17"):
        split(path, seed=0, heldout=17)
    # Other earlier turns, or another system message, are another prompt.
    told = [{"messages": [{"role": "system", "content": str(i)}, *user("2+2?")]} for i in range(4)]
    assert len(split(write_jsonl(tmp_path / "told.jsonl", told), seed=0, heldout=1)[1]) == 1


def test_heldout_prompts_that_are_trained_on_are_left_out(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    heldout = write_jsonl(tmp_path / "heldout.jsonl", [{"prompt": "b"}, {"prompt": "c"}])
    _, kept = build_prompts(DataConfig(path=train, heldout_path=heldout), TOKENIZER, seed=0)
    assert [prompt.messages[0]["content"] for prompt in kept] == ["c"]
    with pytest.raises(ConfigError, match="Every held-out prompt"):
        build_prompts(DataConfig(path=train, heldout_path=train), TOKENIZER, seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no prompts"),
        ('{"question": "a", "answer": "b"}\n', r"neither `messages` nor `prompt`; its columns are: question, answer"),
        ("not json\n", "line 1, is not JSON"),
        ("[1]\n", "line 1, is not a JSON object"),
        ('{"prompt": "a", "mode": "fast"}\n', "has mode 'fast'; a mode is think or no_think"),
        ('{"prompt": "a /no_think", "mode": "think"}\n', "has mode 'think', but its messages say /no_think"),
        ('{"prompt": "a", "task": "gdc"}\n', "no reasoning-gym task 'gdc'; did you mean 'gcd'"),
        (
            '{"messages": [{"from": "human", "value": "a"}]}\n',
            "a message has a role .* and a content string",
        ),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "the last message of a prompt is the user's"),
        ('{"messages": []}\n', "a string or a list of messages"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        build_prompts(DataConfig(path=str(path), heldout_prompts=0), TOKENIZER, seed=0)
    assert "\n" not in str(error.value)


def test_bad_sources(tmp_path: Path) -> None:
    def build(**fields: Any) -> None:
        build_prompts(DataConfig(**fields), TOKENIZER, seed=0)

    with pytest.raises(ConfigError, match=r"Set one of data\.tasks and data\.path$"):
        build()
    with pytest.raises(ConfigError, match="not both"):
        build(tasks=["gcd"], path="x.jsonl")
    with pytest.raises(ConfigError, match="There is no prompt file"):
        build(path=str(tmp_path / "x.jsonl"))
    (tmp_path / "x.txt").touch()
    with pytest.raises(ConfigError, match=r"must end in \.jsonl, \.parquet or \.csv"):
        build(path=str(tmp_path / "x.txt"))
    with pytest.raises(ConfigError, match=r"names 'lcm', which is not in data\.tasks"):
        build(tasks=["gcd"], task_options={"lcm": {}})
    with pytest.raises(ConfigError, match="names 'gcd' twice"):
        build(tasks=["gcd", "gcd"])
    with pytest.raises(ConfigError, match="has 1 prompts, too few to hold out 64"):
        build(path=write_jsonl(tmp_path / "one.jsonl", [{"prompt": "a"}]))


def test_prompt_that_is_too_long(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b " * 300}])
    data = DataConfig(path=path, heldout_prompts=0)
    length = build_prompts(data, TOKENIZER, seed=0)[0][1].token_ids.size
    data.max_prompt_tokens = length
    build_prompts(data, TOKENIZER, seed=0, context_length=length + 1)
    with pytest.raises(
        ConfigError, match=f"'p/train/1' has {length} tokens, more than {length - 1} .the models' context"
    ):
        build_prompts(data, TOKENIZER, seed=0, context_length=length)
    data.max_prompt_tokens = length - 1
    with pytest.raises(
        ConfigError, match=f"'p/train/1' has {length} tokens, more than {length - 1} .data.max_prompt_tok"
    ):
        build_prompts(data, TOKENIZER, seed=0)


def test_tasks_may_have_modes_of_their_own() -> None:
    data = DataConfig(tasks=["chain_sum", "gcd"], train_prompts=8, heldout_prompts=4)
    data.task_modes = {"gcd": ["no_think"]}
    train, _ = build_prompts(data, TOKENIZER, seed=0)
    assert Counter((p.task, p.mode) for p in train) == {
        ("chain_sum", "think"): 2, ("chain_sum", "no_think"): 2, ("gcd", "no_think"): 4,
    }  # fmt: skip
    # Asked for one mode, as the off-policy phase does, a task keeps to its own.
    assert {p.mode for p in build_prompts(data, TOKENIZER, 0, ["think"])[0] if p.task == "gcd"} == {"no_think"}


@pytest.mark.parametrize(
    ("modes", "sentence"),
    [
        ({"chain_sun": ["think"]}, "names 'chain_sun', which no prompt has: did you mean chain_sum?"),
        ({"chain_sum": ["thinking"]}, "write a list of think and no_think"),
        ({"chain_sum": []}, "write a list of think and no_think"),
    ],
)
def test_bad_task_modes(modes: dict[str, list[str]], sentence: str) -> None:
    data = DataConfig(tasks=["chain_sum"], task_modes=modes, train_prompts=4, heldout_prompts=2)
    with pytest.raises(ConfigError, match=sentence):
        build_prompts(data, TOKENIZER, seed=0)
