"""Both phases on tiny models: real engines, real learner ranks; interrupted in the generation and in the learning."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from huggingface_hub import ModelCard
from stop_signals import stop_during
from tiny_models import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2w import cli
from s2w.actors.stopping import INTERRUPTED
from s2w.config.compose import compose
from s2w.data.verifiers import extract_answer
from s2w.errors import ConfigError
from s2w.eval.heldout import heldout_responses
from s2w.launch.check import check
from s2w.launch.job import Job
from s2w.launch.phases import run_off_policy
from s2w.launch.train import train
from s2w.models.student import student_reference
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder
from s2w.records import HeldoutResponse, Rollout, Scored
from s2w.teacher_data import ceiling
from s2w.teacher_data.batches import ResponseStream, split
from s2w.teacher_data.collect import TeacherResponses, collect
from s2w.teacher_data.dataset import read_dataset
from s2w.teacher_data.response import Response

SAMPLES, PROMPTS, MODES = 2, 5, 2
RESPONSES = SAMPLES * PROMPTS * MODES

# A random teacher keeps to no mode and is right by chance alone.
NO_FILTERS = "off_policy.filters={truncated: false, format: false, loop_ngram: 0, cjk_share: 1.0, verified: false}"


@dataclass
class World:
    """What all tests share."""

    teacher: Path
    other_teacher: Path
    """Narrower; it takes the prompts in no_think mode."""
    directory: Path

    def overrides(self, name: str) -> list[str]:
        return [
            f"teacher.model={self.teacher}", f"student.model={self.teacher}", f"run.dir={self.directory / name}",
            "student.init=fresh", "+student.overrides.num_hidden_layers=1",
            "data.tasks=[chain_sum]", f"data.train_prompts={PROMPTS}", "data.heldout_prompts=3",
            "data.max_prompt_tokens=128", "rollout.max_tokens=8", "rollout.enforce_eager=true",
            "teacher.enforce_eager=true", "rollout.cpus=0.2", "teacher.cpus=0.2", "learner.cpus=0.2",
            "learner.learning_rate=1e-3", "loop.steps=1", "loop.prompts_per_step=4",
            "loop.off_policy_fraction=0.25",
            "off_policy.steps=5", "off_policy.max_tokens=16", f"off_policy.samples_per_prompt={SAMPLES}",
            "off_policy.responses_per_step=8", "off_policy.learning_rate=1e-2", "off_policy.heldout_responses=4",
            "off_policy.shard_responses=4", "off_policy.temperature=1", "off_policy.top_p=1", "off_policy.top_k=-1",
            "cluster.device=cpu", "run.deterministic=true", NO_FILTERS,
            "teacher.dtype=float32", "rollout.dtype=float32", "learner.dtype=float32",
            f"teachers.plain={{model: {self.other_teacher}, modes: [no_think]}}", "loop.eval_teacher=true",
        ]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("off_policy")
    other = make_checkpoint(root / "other", "untied", 2, hidden_size=64)
    return World(make_checkpoint(root / "teacher", "untied", 1), other, root)


def interrupt_at(patch: pytest.MonkeyPatch, method: str, when: Callable[..., bool]) -> None:
    """Ctrl-C at the first call of a method of Progress for which ``when`` is true."""
    original = getattr(Progress, method)
    pending = [True]

    def call(self: Progress, *arguments: Any) -> None:
        original(self, *arguments)
        if pending and when(*arguments):
            pending.clear()
            signal.raise_signal(signal.SIGINT)

    patch.setattr(Progress, method, call)


@dataclass
class Story:
    """One run, interrupted twice."""

    directory: Path
    overrides: list[str]
    interrupted_shards: dict[str, bytes]
    """Those of the interrupted generation."""
    interrupted_step: int
    batches: list[list[Scored]]
    ceiling: list[Rollout]
    """The teachers' own responses to the held-out prompts."""

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / name).read_text().splitlines()]

    def responses(self) -> list[Response]:
        """Those that passed the filters; nothing is generated for it."""
        config = compose([*self.overrides, "run.resume=true"])
        return asyncio.run(collect(config, check(config), "cpu", self.directory / "off_policy", Progress({}))).kept

    def shards(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self.directory / "off_policy").glob("shard-*"))}


@pytest.fixture(scope="module")
def story(world: World) -> Story:
    directory = world.directory / "run"
    overrides = world.overrides("run")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, "say", lambda text: "responses written" in text)
        # As a shell without job control starts a job in the background.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert cli.main(["generate", *overrides]) == INTERRUPTED
        assert signal.signal(signal.SIGINT, before) == signal.SIG_IGN
    shards = {path.name: path.read_bytes() for path in (directory / "off_policy").glob("shard-*")}
    again = compose([*overrides, "run.resume=true"])
    with pytest.MonkeyPatch.context() as patch:
        stop_during(patch, "step", 2)
        assert train(again) == INTERRUPTED
    step = json.loads((directory / "off_policy" / "checkpoints" / "latest" / "state.json").read_text())["step"]
    batches: list[list[Scored]] = []
    own: list[Rollout] = []

    def seen(version: int | None, rollouts: Sequence[Rollout], *rest: Any) -> list[HeldoutResponse]:
        own.extend(rollouts)
        return heldout_responses(version, rollouts, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceiling, "heldout_responses", seen)
        assert train(again, batches.append) == 0
    return Story(directory, overrides, shards, step, batches, own)


def test_an_interrupted_generation_repeats_nothing(story: Story) -> None:
    shards = story.shards()
    assert 0 < len(story.interrupted_shards) < len(shards)
    # What was there stayed as it was, to the byte.
    assert {name: shards[name] for name in story.interrupted_shards} == story.interrupted_shards
    rows = [row for name in shards for row in pq.read_table(story.directory / "off_policy" / name).to_pylist()]
    keys = [(row["uid"], row["mode"], row["sample"]) for row in rows]
    assert len(keys) == len(set(keys)) == RESPONSES
    assert {len(row["response_token_ids"]) for row in rows} <= set(range(1, 17))
    assert all(row["finish_reason"] == "length" for row in rows if len(row["response_token_ids"]) == 16)
    assert len({tuple(row["response_token_ids"]) for row in rows}) > RESPONSES // 2


def test_the_run_directory(story: Story) -> None:
    table = json.loads((story.directory / "off_policy" / "filters.json").read_text())
    assert table["responses"] == RESPONSES
    dropped = pq.read_table(story.directory / "off_policy" / "dropped.parquet")
    assert dropped.num_rows == RESPONSES - table["kept"] == table["dropped"]["duplicate"]
    assert dropped["reason"].to_pylist() == ["duplicate"] * dropped.num_rows
    assert (story.directory / "tensorboard" / "off_policy").is_dir()
    summary = json.loads((story.directory / "summary.json").read_text())
    assert summary["off_policy"]["after"]["step"] == 5


def test_checkpoints_of_both_phases_have_a_card(story: Story, world: World) -> None:
    first, second = [
        ModelCard.load(story.directory / path / "latest" / "README.md").content
        for path in ("off_policy/checkpoints", "checkpoints")
    ]
    losses = [line["loss"] for line in story.lines("off_policy/heldout.jsonl")]
    loss = f"| off-policy loss, nats/token, after 5 steps | {losses[0]:.4f} | {losses[1]:.4f} |"
    assert loss in first and loss in second
    assert "# s2w: off-policy step 5" in first and "# s2w: on-policy step 1" in second
    kl = [line["forward_kl"] for line in story.lines("heldout.jsonl")]
    assert f"| KL(teacher‖student), nats/token, after 1 on-policy steps | {kl[0]:.4f} | {kl[1]:.4f} |" in second
    assert "KL(" not in first
    assert f"| teacher `plain` | `{world.other_teacher}`, for no_think |" in second


def test_the_student_and_its_teacher_answer_side_by_side(
    story: Story, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`s2w sample` on the run's directory: greedy, so that transformers gives the same words."""
    tokenizer: Any = AutoTokenizer.from_pretrained(world.teacher)
    paths = {"student": (story.directory / "checkpoints" / "latest").resolve(), "teacher": world.teacher}

    def answer(path: Path, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True
        )["input_ids"]
        model: Any = load(path)
        output = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        return str(tokenizer.decode(output, skip_special_tokens=True)).strip()

    questions = ["What is 2 plus 3?", "What is 4 plus 4?"]
    expected = {name: [answer(path, question) for question in questions] for name, path in paths.items()}
    assert expected["student"] != expected["teacher"]
    references = [extract_answer(expected["teacher"][0]), "8"]
    rows = [
        {"prompt": question, "answer": reference, "mode": "no_think"}
        for question, reference in zip(questions, references, strict=True)
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    status = cli.main([
        "sample", str(story.directory), str(prompts), "--teacher", str(world.teacher), "rollout.max_tokens=12",
        "rollout.temperature=0", "rollout.enforce_eager=true", "rollout.dtype=float32", "rollout.cpus=0.2",
        "cluster.device=cpu",
    ])  # fmt: skip
    shown = capsys.readouterr()
    assert status == 0, shown.err
    blocks = re.split(r"^(?:===|---) (.*)\n", shown.out, flags=re.MULTILINE)[1:]
    headings, bodies = blocks[::2], blocks[1::2]
    names = [f"{name} {path} (no_think)" for name, path in paths.items()]
    assert headings == [f"1/2: {questions[0]}", *names, f"2/2: {questions[1]}", *names]
    for i, texts in enumerate(expected.values()):
        for number, text in enumerate(texts):
            written, summary = bodies[3 * number + 1 + i].rsplit("\n[", 1)
            assert written == text
            assert re.match(r"\d+ tokens, (stop|length), [\d.]+ s, ", summary)
            reference = references[number]
            right = extract_answer(text) == reference
            verdict = "right by math_verify]" if right else f"wrong by math_verify, the answer is {reference!r}]"
            assert verdict in summary
    assert shown.out.endswith(f"teacher {world.teacher}: 1 of 2 right\n")
    assert "student 0 is up after" in shown.err and "teacher 0 is up after" in shown.err


def test_both_phases_are_in_the_metrics_once(story: Story) -> None:
    assert story.interrupted_step == 2
    lines = story.lines("metrics.jsonl")
    assert [(line["phase"], line["step"]) for line in lines] == [
        *(("off_policy", step) for step in range(1, 6)), ("on_policy", 1),
    ]  # fmt: skip
    # The phase's own schedule: cosine from 1e-2 to 0 over its five steps, the learner's constant rate after it.
    rates = [line["learning_rate"] for line in lines]
    torch.testing.assert_close(
        torch.tensor(rates), torch.tensor([1e-2, 8.536e-3, 5e-3, 1.464e-3, 0.0, 1e-3]), rtol=1e-3, atol=1e-9
    )
    trained = len(split(story.responses(), 4, seed=0).train)
    assert [line["epoch"] for line in lines[:5]] == [8 * step / trained for step in range(1, 6)]


def test_a_phase_stopped_in_an_update_ends_where_the_uninterrupted_one_does(story: Story, world: World) -> None:
    """Bit for bit, on the same responses."""
    directory = world.directory / "unbroken"
    shutil.copytree(story.directory / "off_policy", directory / "off_policy", ignore=lambda _, names: [
        name for name in names if not name.startswith("shard-")
    ])  # fmt: skip
    shutil.copy(story.directory / "config.yaml", directory)
    assert train(compose([*world.overrides("unbroken"), "run.resume=true", "loop.steps=0"])) == 0
    ours, theirs = (
        [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        for root in (story.directory, directory)
    )
    for name in ("step", "loss", "grad_norm", "student_entropy", "agreement", "response_tokens"):
        assert [line[name] for line in ours[:5]] == [line[name] for line in theirs], name
    heldout = "off_policy/heldout.jsonl"
    assert (directory / heldout).read_text() == (story.directory / heldout).read_text()
    models = [load(root / "off_policy" / "checkpoints" / "latest") for root in (story.directory, directory)]
    for (name, a), (_, b) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(a, b), name


def test_the_first_phase_minimises_cross_entropy(story: Story) -> None:
    responses = split(story.responses(), 4, seed=0)
    before, after = load(story.directory / "student"), load(story.directory / "off_policy" / "checkpoints" / "latest")
    assert loss_of(after, responses.train) < loss_of(before, responses.train) - 0.1
    evaluations = story.lines("off_policy/heldout.jsonl")
    assert [line["step"] for line in evaluations] == [0, 5]
    for line, model in zip(evaluations, (before, after), strict=True):
        assert line["tokens"] == sum(len(response.token_ids) for response in responses.heldout)
        # float32 both; other kernels and padding.
        assert line["loss"] == pytest.approx(loss_of(model, responses.heldout), rel=1e-5)


def test_the_second_phase_starts_from_the_weights_of_the_first(story: Story) -> None:
    assert [sample.rollout.versions[0].version for sample in story.batches[0]] == [0] * 3
    model = load(story.directory / "off_policy" / "checkpoints" / "latest")
    for sample in story.batches[0]:
        # float32 both; vLLM's kernels.
        expected = token_log_probs(model, sample.rollout)
        torch.testing.assert_close(torch.from_numpy(sample.rollout.log_probs), expected, rtol=0, atol=1e-4)
    assert (story.directory / "checkpoints" / "latest" / "model.safetensors").exists()


def test_a_share_of_each_batch_is_the_teachers(story: Story) -> None:
    _, batch, _ = story.batches
    by_teacher = [sample.rollout for sample in batch if not sample.rollout.versions]
    assert len(batch) == 4 and len(by_teacher) == 1
    [response] = ResponseStream(split(story.responses(), 4, seed=0).train, 1, seed=0).batch(0)
    assert by_teacher[0].uid == response.as_rollout().uid
    assert np.array_equal(by_teacher[0].token_ids, response.token_ids)
    line = story.lines("metrics.jsonl")[-1]
    assert line["staleness_max"] == 0
    lengths = [len(sample.rollout.token_ids) for sample in batch if sample.rollout.versions]
    assert line["response_length"] == np.mean(lengths)
    assert line["response_tokens"] == sum(lengths) + len(response.token_ids)


def test_teachers_differ_by_mode(story: Story, world: World) -> None:
    """Each response has the hidden rows of the teacher that takes its mode; in the held-out evaluations too."""
    models = {"teacher": load(world.teacher), "plain": load(world.other_teacher)}
    for sample in (sample for batch in story.batches for sample in batch):
        assert sample.signal is not None
        assert sample.signal.name == ("plain" if sample.rollout.prompt.mode == "no_think" else "teacher")
        # Payloads are gone with the cluster; their size tells the width, in float32.
        width = {"teacher": 128, "plain": 64}[sample.signal.name]
        assert sample.signal.nbytes == 4 * width * len(sample.rollout.token_ids)
    # Both heads at work: the first evaluation's KL is that of two models in one process.
    start = load(story.directory / "off_policy" / "checkpoints" / "latest")
    divergences = []
    for sample in story.batches[0]:
        assert sample.signal is not None
        log_p, log_q = (distributions(model, sample.rollout) for model in (models[sample.signal.name], start))
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    # float32 both; vLLM's kernels.
    assert story.lines("heldout.jsonl")[0]["forward_kl"] == pytest.approx(
        torch.cat(divergences).mean().item(), rel=1e-4
    )


def test_each_teacher_responds_to_its_own_held_out_prompts_once(story: Story, world: World) -> None:
    models = {"think": load(world.teacher), "no_think": load(world.other_teacher)}
    asked = [(sample.rollout.prompt.mode, sample.rollout.prompt.uid) for sample in story.batches[0]]
    assert [(rollout.prompt.mode, rollout.prompt.uid) for rollout in story.ceiling] == asked
    for rollout in story.ceiling:
        # Of rollout.max_tokens, not off_policy.max_tokens.
        assert len(rollout.token_ids) == 8 or rollout.finish_reason == "stop"
        expected = token_log_probs(models[rollout.prompt.mode], rollout)
        torch.testing.assert_close(torch.from_numpy(rollout.log_probs), expected, rtol=0, atol=1e-4)
    [line] = story.lines("teacher_heldout/heldout.jsonl")
    assert line["version"] is None and line["by_teacher"].keys() == {"teacher", "plain"}
    assert story.lines("heldout.jsonl")[0]["by_teacher"].keys() == {"teacher", "plain"}
    teachers = [one["teacher"] for one in story.lines("teacher_heldout/heldout_responses.jsonl")]
    assert teachers == ["plain" if mode == "no_think" else "teacher" for mode, _ in asked]
    summary = json.loads((story.directory / "summary.json").read_text())
    assert summary["heldout"]["teacher"]["by_mode"] == line["by_mode"]
    # The interrupted starts count too.
    segments = json.loads((story.directory / "segments.json").read_text())
    assert len(segments) == 2
    assert summary["wall_seconds"] == pytest.approx(sum(one["until"] - one["began"] for one in segments), abs=1.0)
    assert summary["wall_seconds"] > segments[1]["until"] - segments[1]["began"] + 1.0


def test_a_dataset_takes_the_place_of_generation_and_the_teacher_scores_it(story: Story, world: World) -> None:
    config = compose(
        [
            *world.overrides("divergence"), f"off_policy.path={story.directory / 'off_policy'}",
            "off_policy.loss=divergence", "off_policy.steps=2",
        ]
    )  # fmt: skip
    models = check(config)
    directory = Path(config.run.dir)
    student = student_reference(config.student, directory / "student", config.run.seed)
    recorder = Recorder(
        directory, step=0, off_policy_step=0, config={}, tensorboard=False, wandb=None, name="divergence", began=0.0
    )
    ray.init(include_dashboard=False, log_to_driver=False)
    try:
        progress = Progress({"off_policy": 2})
        job = Job(config, models, {}, "cpu", directory, recorder, progress)
        teacher_responses = TeacherResponses(config, models, "cpu", directory / "off_policy", progress)
        last = asyncio.run(run_off_policy(job, student, teacher_responses))
    finally:
        ray.shutdown()
    assert not list((directory / "off_policy").glob("shard-*"))
    first, second = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert last.resolve().name == "step_000002" and second["step"] == 2
    responses = split(read_dataset(config, models), 4, seed=0)
    teachers = {"think": load(world.teacher), "no_think": load(world.other_teacher)}

    def loss(path: Path, chosen: list[Response]) -> float:
        model, divergences = load(path), []
        for response in chosen:
            log_p, log_q = (distributions(one, response) for one in (teachers[response.prompt.mode], model))
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        return torch.cat(divergences).mean().item()

    # float32 both; the teacher's hidden rows come out of vLLM.
    first_batch = ResponseStream(responses.train, 8, seed=0).batch(0)
    assert first["loss"] == pytest.approx(loss(student.resolve(), first_batch), rel=1e-4)
    lines = [json.loads(line) for line in (directory / "off_policy" / "heldout.jsonl").read_text().splitlines()]
    expected = [loss(path, responses.heldout) for path in (student.resolve(), last.resolve())]
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-4)
    assert expected[1] < expected[0]


def test_an_empty_set_is_refused_with_its_table(story: Story, world: World) -> None:
    config = compose(
        [
            *world.overrides("empty"), f"off_policy.path={story.directory / 'off_policy'}",
            "off_policy.filters.min_tokens=50",
        ]
    )  # fmt: skip
    directory = Path(config.run.dir)
    with pytest.raises(ConfigError, match=r"(?s)none of the teacher's responses .*- length +20  100\.0%.*kept +0"):
        asyncio.run(collect(config, check(config), "cpu", directory, Progress({})))
    assert pq.read_table(directory / "dropped.parquet")["reason"].to_pylist() == ["length"] * RESPONSES


def load(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def distributions(model: torch.nn.Module, response: Response | Rollout) -> torch.Tensor:
    """float32 [n, V]: log-probs at each response token."""
    ids = torch.from_numpy(np.concatenate([response.prompt.token_ids, response.token_ids])).long()
    with torch.no_grad():
        return model(ids[None]).logits[0, len(response.prompt.token_ids) - 1 : -1].log_softmax(-1)


def token_log_probs(model: torch.nn.Module, response: Response | Rollout) -> torch.Tensor:
    """float32 [n]: log-probs of the response tokens."""
    ids = torch.from_numpy(response.token_ids.astype(np.int64))
    return distributions(model, response).gather(-1, ids[:, None])[:, 0]


def loss_of(model: torch.nn.Module, responses: list[Response]) -> float:
    """Cross-entropy by transformers and torch, nats a response token."""
    return -torch.cat([token_log_probs(model, response) for response in responses]).mean().item()
