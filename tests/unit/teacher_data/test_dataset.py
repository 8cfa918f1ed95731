"""The teacher's responses on disk: prompts that it is asked, shards, ready datasets."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from teacher_responses import response, settings
from tiny_models import make_checkpoint

from s2w.errors import ConfigError
from s2w.launch.check import check
from s2w.models.pair import ModelPair
from s2w.teacher_data.dataset import read_dataset
from s2w.teacher_data.generate import teacher_prompts
from s2w.teacher_data.shards import ShardStore, vocabulary_hash


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("models") / "tied", "tied", 0))


@pytest.fixture
def models(checkpoint: str, tmp_path: Path) -> ModelPair:
    return check(settings(checkpoint, tmp_path / "unused"))


def test_shards_give_back_what_they_took(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, {"teacher": "t", "temperature": 0.6})
    written = [response("one", sample=1), response("two", "b"), response("three"), response("four", mode="think")]
    assert store.keys() == set()
    store.add(written[:2])
    store.add(written[2:])
    assert store.keys() == {r.key for r in written}
    prompts = [written[0].prompt, written[3].prompt]
    read = ShardStore(tmp_path, {"teacher": "t", "temperature": 0.6}).read(prompts, 2)
    # In the order of the prompts and samples, not of the files; the prompt "b" was not asked for.
    assert [(r.key, r.text) for r in read] == [(written[i].key, written[i].text) for i in (2, 0, 3)]
    assert all(np.array_equal(r.token_ids, [ord(c) for c in r.text]) for r in read)
    assert [r.text for r in store.read(prompts, 1)] == ["three", "four"]
    table = pq.read_table(tmp_path / "shard-000000.parquet")
    assert json.loads(table.schema.metadata[b"s2w"]) == {"teacher": "t", "temperature": 0.6}
    with pytest.raises(ConfigError, match=r"shard-000000\.parquet was generated with temperature=0\.6, not 1\.0"):
        ShardStore(tmp_path, {"teacher": "t", "temperature": 1.0})


def test_shards_are_a_ready_dataset_too(checkpoint: str, tmp_path: Path, models: ModelPair) -> None:
    # "1" and "2" are also one token, "12": text alone would not give the two back.
    tokenizer = models.student.tokenizer
    ids = np.asarray([*tokenizer("1")["input_ids"], *tokenizer("2")["input_ids"]], np.int32)
    one, two = replace(response("12"), token_ids=ids), response("half an", mode="think", finish="length")
    for vocabulary, tokens in ((vocabulary_hash(tokenizer), ids.tolist()), ("another", None)):
        directory = tmp_path / vocabulary
        ShardStore(directory, {"vocabulary_sha256": vocabulary}).add([one, two])
        found = read_dataset(settings(checkpoint, tmp_path / "run", f"off_policy.path={directory}"), models)
        retokenised = [*tokenizer("12")["input_ids"], tokenizer.eos_token_id]
        assert found[0].token_ids.tolist() == (tokens or retokenised)
        assert retokenised != tokens
        assert [(r.text, r.prompt.mode, r.finish_reason) for r in found] == [
            ("12", "no_think", "stop"), ("half an", "think", "length"),
        ]  # fmt: skip


def test_a_response_is_whole_only_if_it_says_so(checkpoint: str, tmp_path: Path, models: ModelPair) -> None:
    path = tmp_path / "rows.jsonl"
    config = settings(checkpoint, tmp_path / "run", f"off_policy.path={path}")
    rows = [
        {"prompt": "1+1?", "response": "2", "finish_reason": reason} for reason in (None, "stop", "length", "abort")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends = [r.token_ids[-1] in models.teacher.eos_token_ids for r in read_dataset(config, models)]
    assert ends == [True, True, False, False]
    path.write_text(json.dumps(rows[0] | {"finish_reason": "eos"}) + "\n")
    with pytest.raises(ConfigError, match=r"line 1 has finish_reason 'eos': write one of stop, length, abort, error"):
        read_dataset(config, models)


def test_ids_past_the_vocabulary_are_refused(checkpoint: str, tmp_path: Path, models: ModelPair) -> None:
    past = models.vocabulary.vocab_size
    written = replace(response("12"), token_ids=np.asarray([5, past], np.int32))
    ShardStore(tmp_path / "set", {"vocabulary_sha256": vocabulary_hash(models.student.tokenizer)}).add([written])
    config = settings(checkpoint, tmp_path / "run", f"off_policy.path={tmp_path / 'set'}")
    with pytest.raises(ConfigError, match=f"row 0 has response_token_ids from 5 to {past}, and the vocabulary ends at"):
        read_dataset(config, models)


def test_the_teacher_is_asked_in_every_mode(checkpoint: str, tmp_path: Path, models: ModelPair) -> None:
    prompts = teacher_prompts(settings(checkpoint, tmp_path), models.student.tokenizer)
    assert Counter(prompt.mode for prompt in prompts) == {"think": 4, "no_think": 4}
    assert len({prompt.uid for prompt in prompts}) == 4
    # A prompt that says its own mode is asked in that one only.
    rows = [{"prompt": "1+1? /no_think"}, {"prompt": "2+2?", "mode": "think"}, {"prompt": "3+3?"}]
    files = {"path": rows, "heldout_path": [{"prompt": "held"}]}
    for setting, part in files.items():
        (tmp_path / f"{setting}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    overrides = ["data.tasks=[]", *(f"data.{setting}={tmp_path / setting}.jsonl" for setting in files)]
    prompts = teacher_prompts(settings(checkpoint, tmp_path, *overrides), models.student.tokenizer)
    assert Counter((prompt.messages[0]["content"], prompt.mode) for prompt in prompts) == {
        ("1+1? /no_think", "no_think"): 1, ("2+2?", "think"): 1, ("3+3?", "think"): 1, ("3+3?", "no_think"): 1,
    }  # fmt: skip
    only = settings(checkpoint, tmp_path, "data.modes=[no_think]", "off_policy.prompts=3")
    assert [prompt.mode for prompt in teacher_prompts(only, models.student.tokenizer)] == ["no_think"] * 3


THOUGHT = "<think>\none and one\n</think>\n\n2"


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.parquet", "."])
def test_ready_responses(checkpoint: str, tmp_path: Path, models: ModelPair, file: str) -> None:
    user = {"role": "user", "content": "1+1?"}
    rows = [
        {"messages": [user, {"role": "assistant", "content": THOUGHT}], "answer": None},
        {"messages": [user, {"role": "assistant", "content": "<think>\n\n</think>\n\n2"}], "answer": "2"},
    ]
    path = tmp_path / file
    if file == "rows.jsonl":
        rows.append({"prompt": "1+1? /no_think", "response": "2"})  # type: ignore[dict-item]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        pq.write_table(pa.Table.from_pylist(rows[:1]), path / "a.parquet")
        pq.write_table(pa.Table.from_pylist(rows[1:]), path / "b.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path / "dropped.parquet")
    found = read_dataset(settings(checkpoint, tmp_path / "run", f"off_policy.path={path}"), models)
    tokenizer = models.student.tokenizer
    expected = [
        ("think", "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", THOUGHT),
        ("no_think", "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "2"),
        ("no_think", "<|im_start|>user\n1+1? /no_think<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "2"),
    ][: len(rows)]  # fmt: skip
    assert [
        (r.prompt.mode, tokenizer.decode(r.prompt.token_ids.tolist()), tokenizer.decode(r.token_ids.tolist()))
        for r in found
    ] == [(mode, prompt, text + "<|im_end|>") for mode, prompt, text in expected]
    assert [(r.prompt.task, r.prompt.answer) for r in found[:2]] == [("", None), ("math_verify", "2")]
    assert len({r.key for r in found}) == len(rows)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"prompt": "1+1?", "completion": "2"},
            "has no response: write `response`, .* its columns are: prompt, completion",
        ),
        ({"question": "1+1?", "reply": "2"}, "has neither `messages` nor `prompt`; its columns are: question, reply"),
        (
            {"messages": [{"role": "user", "content": "1+1?"}]},
            "has no response: .* or end `messages` with the assistant's",
        ),
        ({"messages": [{"role": "user"}]}, "a message has a role .* and a content string"),
        ({"prompt": "1+1?", "response": "2", "mode": "quick"}, "has mode 'quick'; a mode is think or no_think"),
        ({"prompt": "1+1?", "response": "2", "task": "chain_sun"}, "did you mean 'chain_sum'"),
    ],
)
def test_rows_that_are_no_responses(
    checkpoint: str, tmp_path: Path, models: ModelPair, row: dict[str, object], sentence: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=rf"rows\.jsonl', line 2.*{sentence}"):
        read_dataset(settings(checkpoint, tmp_path / "run", f"off_policy.path={path}"), models)
