"""The off-policy phase without engines: filters, shards, ready datasets, batches, cross-entropy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import make_checkpoint
from torch.nn.functional import cross_entropy

from s2w.config.compose import compose
from s2w.config.schema import Config, FilterConfig
from s2w.data.verifier_process import VerifierProcess
from s2w.errors import ConfigError
from s2w.launch.check import Facts, check
from s2w.models.head import Head
from s2w.objectives.divergences import make_divergence
from s2w.objectives.kernel import SparseRows, divergence_loss
from s2w.off_policy import learner_settings
from s2w.records import Mode, Prompt
from s2w.teacher_data.batches import ResponseStream, split
from s2w.teacher_data.dataset import read_dataset
from s2w.teacher_data.filters import FILTERS, apply_filters, has_loop
from s2w.teacher_data.generate import teacher_prompts
from s2w.teacher_data.response import Response
from s2w.teacher_data.shards import ShardStore, vocabulary_hash


def response(
    text: str, question: str = "1+1?", mode: Mode = "no_think", sample: int = 0, finish: str = "stop", task: str = ""
) -> Response:
    """One character, one token."""
    ids = np.array([ord(c) for c in text], np.int32)
    prompt_ids = np.array([ord(c) for c in question], np.int32)
    messages = ({"role": "user", "content": question},)
    prompt = Prompt(f"q/{question}", messages, prompt_ids, mode, 0, task, "2" if task else None)
    return Response(prompt, sample, ids, text, finish)


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


def test_loops_are_found_whatever_their_period() -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 1000, 400).astype(np.int32)
    assert not has_loop(noise, 128, 64)
    for period in (1, 3, 17, 100):
        block = np.arange(period, dtype=np.int32)
        repeated = np.tile(block, -(-400 // period))[: max(64, 4 * period)]
        looped = np.concatenate([noise, repeated, noise])
        assert has_loop(looped, 128, 64), period
        # One token less is no loop: the noise around it continues it nowhere.
        edge = np.array([5000], np.int32)
        shorter = np.concatenate([noise, edge, repeated[:-1], edge, noise])
        assert not has_loop(shorter, 128, 64), period
        assert not has_loop(looped, period - 1, 64) or period == 1


# ---------------------------------------------------------------- files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("models") / "tied", "tied", 0))


def settings(checkpoint: str, run: Path, *overrides: str) -> Config:
    return compose(
        [
            f"teacher.model={checkpoint}", f"student.model={checkpoint}", "data.tasks=[chain_sum]", f"run.dir={run}",
            "data.train_prompts=4", "data.heldout_prompts=2", "cluster.device=cpu", "off_policy.steps=1", *overrides,
        ]
    )  # fmt: skip


@pytest.fixture
def facts(checkpoint: str, tmp_path: Path) -> Facts:
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


def test_shards_are_a_ready_dataset_too(checkpoint: str, tmp_path: Path, facts: Facts) -> None:
    # "1" and "2" are also one token, "12": text alone would not give the two back.
    tokenizer = facts.student.tokenizer
    ids = np.asarray([*tokenizer("1")["input_ids"], *tokenizer("2")["input_ids"]], np.int32)
    one, two = replace(response("12"), token_ids=ids), response("half an", mode="think", finish="length")
    for vocabulary, tokens in ((vocabulary_hash(tokenizer), ids.tolist()), ("another", None)):
        directory = tmp_path / vocabulary
        ShardStore(directory, {"vocabulary_sha256": vocabulary}).add([one, two])
        found = read_dataset(settings(checkpoint, tmp_path / "run", f"off_policy.path={directory}"), facts)
        retokenised = [*tokenizer("12")["input_ids"], tokenizer.eos_token_id]
        assert found[0].token_ids.tolist() == (tokens or retokenised)
        assert retokenised != tokens
        assert [(r.text, r.prompt.mode, r.finish_reason) for r in found] == [
            ("12", "no_think", "stop"), ("half an", "think", "length"),
        ]  # fmt: skip


def test_a_response_is_whole_only_if_it_says_so(checkpoint: str, tmp_path: Path, facts: Facts) -> None:
    path = tmp_path / "rows.jsonl"
    config = settings(checkpoint, tmp_path / "run", f"off_policy.path={path}")
    rows = [
        {"prompt": "1+1?", "response": "2", "finish_reason": reason} for reason in (None, "stop", "length", "abort")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends = [r.token_ids[-1] in facts.teacher.eos_token_ids for r in read_dataset(config, facts)]
    assert ends == [True, True, False, False]
    path.write_text(json.dumps(rows[0] | {"finish_reason": "eos"}) + "\n")
    with pytest.raises(ConfigError, match=r"row 0 has finish_reason 'eos': write one of stop, length, abort, error"):
        read_dataset(config, facts)


def test_ids_past_the_vocabulary_are_refused(checkpoint: str, tmp_path: Path, facts: Facts) -> None:
    past = facts.vocabulary.vocab_size
    written = replace(response("12"), token_ids=np.asarray([5, past], np.int32))
    ShardStore(tmp_path / "set", {"vocabulary_sha256": vocabulary_hash(facts.student.tokenizer)}).add([written])
    config = settings(checkpoint, tmp_path / "run", f"off_policy.path={tmp_path / 'set'}")
    with pytest.raises(ConfigError, match=f"row 0 has response_token_ids from 5 to {past}, and the vocabulary ends at"):
        read_dataset(config, facts)


def test_the_teacher_is_asked_in_every_mode(checkpoint: str, tmp_path: Path, facts: Facts) -> None:
    prompts = teacher_prompts(settings(checkpoint, tmp_path), facts.student.tokenizer)
    assert Counter(prompt.mode for prompt in prompts) == {"think": 4, "no_think": 4}
    assert len({prompt.uid for prompt in prompts}) == 4
    # A prompt that says its own mode is asked in that one only.
    rows = [{"prompt": "1+1? /no_think"}, {"prompt": "2+2?", "mode": "think"}, {"prompt": "3+3?"}, {"prompt": "held"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["data.tasks=[]", f"data.path={tmp_path / 'rows.jsonl'}", "data.heldout_prompts=1"]
    prompts = teacher_prompts(settings(checkpoint, tmp_path, *overrides), facts.student.tokenizer)
    assert Counter((prompt.messages[0]["content"], prompt.mode) for prompt in prompts) == {
        ("1+1? /no_think", "no_think"): 1, ("2+2?", "think"): 1, ("3+3?", "think"): 1, ("3+3?", "no_think"): 1,
    }  # fmt: skip
    only = settings(checkpoint, tmp_path, "data.modes=[no_think]", "off_policy.prompts=3")
    assert [prompt.mode for prompt in teacher_prompts(only, facts.student.tokenizer)] == ["no_think"] * 3


THOUGHT = "<think>\none and one\n</think>\n\n2"


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.parquet", "."])
def test_ready_responses(checkpoint: str, tmp_path: Path, facts: Facts, file: str) -> None:
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
    found = read_dataset(settings(checkpoint, tmp_path / "run", f"off_policy.path={path}"), facts)
    tokenizer = facts.student.tokenizer
    expected = [
        ("think", "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", THOUGHT),
        ("no_think", "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "2"),
        ("no_think", "<|im_start|>user\n1+1? /no_think<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "2"),
    ][: len(rows)]  # fmt: skip
    assert [
        (r.prompt.mode, tokenizer.decode(r.prompt.token_ids.tolist()), tokenizer.decode(r.token_ids.tolist()))
        for r in found
    ] == [(mode, prompt, text + "<|im_end|>") for mode, prompt, text in expected]
    assert [(r.prompt.task, r.prompt.answer) for r in found[:2]] == [("", None), ("exact_match", "2")]
    assert len({r.key for r in found}) == len(rows)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "1+1?", "completion": "2"}, "has no `response`: .* its columns are: prompt, completion"),
        ({"question": "1+1?", "reply": "2"}, "has no `prompt` and no `response`: .* its columns are: question, reply"),
        ({"messages": [{"role": "user", "content": "1+1?"}]}, "last of its messages must be the assistant's"),
        ({"messages": [{"role": "user"}]}, "a message has a `role` and a `content`"),
        ({"prompt": "1+1?", "response": "2", "mode": "quick"}, "has mode 'quick'; a mode is think or no_think"),
        ({"prompt": "1+1?", "response": "2", "task": "chain_sun"}, "did you mean 'chain_sum'"),
    ],
)
def test_rows_that_are_no_responses(
    checkpoint: str, tmp_path: Path, facts: Facts, row: dict[str, object], sentence: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=rf"rows\.jsonl', row 1.*{sentence}"):
        read_dataset(settings(checkpoint, tmp_path / "run", f"off_policy.path={path}"), facts)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["off_policy.path=/no/such.jsonl"], r"off_policy\.path=/no/such\.jsonl: there is no such file or directory"),
        (["off_policy.responses_per_step=0"], r"off_policy\.responses_per_step=0: write at least 1"),
        (["off_policy.filters.cjk_share=-1"], r"off_policy\.filters\.cjk_share=-1\.0: write a number from 0 to 1"),
        (["off_policy.learning_rate=0"], r"off_policy\.learning_rate=0\.0: write a number above 0"),
        (["off_policy.loss=divergence", "signal.kind=ids"], "only hidden and topk say what is needed"),
        (["loop.off_policy_fraction=0.25", "signal.kind=ids"], r"off_policy_fraction=0\.25 with signal\.kind=ids"),
        (["loop.off_policy_fraction=1"], r"loop\.off_policy_fraction=1\.0: write 0 or more, below 1"),
        (["loop.off_policy_fraction=0.001"], r"of loop\.prompts_per_step=64 rounds to 0 prompts"),
        (["off_policy.max_tokens=4000"], r"off_policy\.max_tokens = 5024 is more than the teacher's context of 4096"),
        (["off_policy.loss=kl"], r"off_policy\.loss: .*divergence, grpo, cross_entropy"),
    ],
)
def test_bad_settings(checkpoint: str, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(settings(checkpoint, tmp_path, *overrides))


# ---------------------------------------------------------------- learning


def test_held_out_prompts_are_not_trained_on() -> None:
    responses = [
        response(f"answer {i} {sample}", question=f"{i}?", mode=mode, sample=sample)
        for i in range(10)
        for mode in ("think", "no_think")
        for sample in range(2)
    ]
    parts = split(responses, 6, seed=0)
    assert len(parts.heldout) == 8 and len(parts.train) == 32
    assert not {r.prompt.uid for r in parts.heldout} & {r.prompt.uid for r in parts.train}
    assert [r.key for r in split(responses, 6, seed=0).train] == [r.key for r in parts.train]
    assert split(responses, 0, seed=0).heldout == []
    with pytest.raises(ConfigError, match=r"off_policy\.heldout_responses=37 leaves none of 40 responses"):
        split(responses, 37, seed=0)


def test_every_response_is_in_every_epoch_once() -> None:
    responses = [response(f"answer {i}", question=f"{i}?") for i in range(10)]
    stream = ResponseStream(responses, 4, seed=3)
    used = [r.prompt.uid for step in range(5) for r in stream.batch(step)]
    assert Counter(used[:10]) == Counter(used[10:]) == Counter(r.prompt.uid for r in responses)
    assert used[:10] != used[10:]
    # A batch is a function of its number alone, so a resumed run needs nothing but that.
    assert [r.key for r in ResponseStream(responses, 4, seed=3).batch(3)] == [r.key for r in stream.batch(3)]
    assert stream.fingerprint() == ResponseStream(list(responses), 4, seed=3).fingerprint()
    assert stream.fingerprint() != ResponseStream(responses[::-1], 4, seed=3).fingerprint()
    assert stream.fingerprint() != ResponseStream([*responses[:9], response("other", "9?")], 4, seed=3).fingerprint()


def test_forward_kl_to_a_certain_teacher_is_torchs_cross_entropy(checkpoint: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, width, vocab = 37, 16, 90
    ids = torch.randint(vocab, (rows,), generator=generator)
    loss = learner_settings(settings(checkpoint, tmp_path, "loss.divergence=jsd", "loss.temperature=2")).loss
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64, requires_grad=True)
    # Two rows of padding, which the softmax must leave out.
    head = torch.randn(vocab + 2, width, generator=generator, dtype=torch.float64, requires_grad=True)
    output = divergence_loss(
        hidden,
        Head(head),
        SparseRows.certain(ids),
        make_divergence(loss.divergence, beta=loss.beta, alpha=loss.alpha),
        vocab_size=vocab,
        temperature=loss.temperature,
    )
    expected = cross_entropy((hidden @ head.T)[:, :vocab], ids, reduction="none")
    # float64 both: rounding alone.
    torch.testing.assert_close(output.values, expected.detach(), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(output.loss, [hidden, head])
    for ours, torchs in zip(gradients, torch.autograd.grad(expected.sum(), [hidden, head]), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-10)
