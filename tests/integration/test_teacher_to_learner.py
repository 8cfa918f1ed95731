"""A real teacher engine, the wire and a learner rank: a student that is the teacher, and one process beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import ray
import torch
from tiny_models import VOCAB_SIZE, make_checkpoint
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, PreTrainedModel

from s2w.actors.vllm import actor_options
from s2w.config.schema import Config, TeacherConfig
from s2w.errors import PreflightError
from s2w.launch.preflight import FLOAT32, LOW_PRECISION, Reference, check_divergence, check_log_probs
from s2w.learner.group import LearnerGroup
from s2w.learner.messages import NonFiniteError
from s2w.models.checkpoint import ModelReference
from s2w.records import HiddenDtype, Prompt, Rollout, Scored, SignalKind, VersionSpan
from s2w.teacher.engine import TeacherEngine
from s2w.teacher.signal import Payload, SignalRequest

TOP_K = 16
SHAPES = [(20, 30), (1, 9), (33, 1), (15, 64), (40, 25)]
"""Prompt and response tokens: several micro-batches, one split by the teacher's prefill chunks."""


@dataclass
class World:
    """A teacher engine, a learner rank, checkpoints and rollouts."""

    teacher: Any
    group: LearnerGroup
    loop: asyncio.AbstractEventLoop
    teacher_path: Path
    student_path: Path
    rollouts: list[Rollout]

    def run(self, call: Any) -> Any:
        return self.loop.run_until_complete(call)

    def build(self, student: Path, kind: SignalKind = "hidden") -> LearnerGroup:
        config = self.group.config
        config.signal.kind = kind
        config.loss.divergence = "reverse_kl" if kind == "sampled" else "forward_kl"
        self.run(self.group.build(ModelReference(str(student)), VOCAB_SIZE))
        return self.group

    def score(self, kind: SignalKind = "hidden", dtype: HiddenDtype = "auto") -> list[Scored]:
        request = SignalRequest(kind, TOP_K, dtype=dtype)
        signals = ray.get([self.teacher.score.remote(rollout, request) for rollout in self.rollouts])
        assert all(signal.put_seconds > 0 for signal in signals)
        return [Scored(*pair) for pair in zip(self.rollouts, signals, strict=True)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("models")
    teacher_path = make_checkpoint(root / "teacher", "untied", seed=2)
    student_path = make_checkpoint(root / "student", "tied", seed=1)
    config = Config()
    config.teacher.model, config.run.dir = str(teacher_path), str(root / "run")
    config.rollout.dtype = config.learner.dtype = "float32"
    config.learner.cpus, config.learner.zero_stage, config.learner.tokens_per_micro_batch = 0.5, 1, 80
    config.learner.learning_rate = 1e-3

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    loop = asyncio.new_event_loop()
    settings = TeacherConfig(model=str(teacher_path), max_batched_tokens=48, max_sequences=16, enforce_eager=True)
    remote: Any = ray.remote(TeacherEngine)
    teacher = remote.options(**actor_options("cpu", 0.5, 1)).remote(settings, 0, "cpu", "float32", 128, VOCAB_SIZE)
    ready = teacher.start.remote()
    group = loop.run_until_complete(LearnerGroup.start(config, ModelReference(str(teacher_path)), "cpu", VOCAB_SIZE))
    ray.get(ready)
    generator, model = np.random.default_rng(0), AutoModelForCausalLM.from_pretrained(teacher_path, dtype=torch.float32)
    rollouts = [make_rollout(generator, model, f"r{i}", *shape) for i, shape in enumerate(SHAPES)]
    yield World(teacher, group, loop, teacher_path, student_path, rollouts)
    group.shutdown()
    ray.get(teacher.shutdown.remote())
    ray.shutdown()
    loop.close()


def make_rollout(
    generator: np.random.Generator, model: PreTrainedModel, uid: str, prompt: int, response: int
) -> Rollout:
    """Random tokens, each a candidate beside those that ``model`` holds for likeliest; three in the middle of a longer
    response were inserted."""
    ids = generator.integers(0, VOCAB_SIZE, prompt + response, dtype=np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long()[None]).logits[0, prompt - 1 : -1]
    own = torch.from_numpy(ids[prompt:, None]).long()
    candidates = logits.scatter(-1, own, torch.inf).topk(TOP_K).indices.int().numpy()
    return Rollout(
        prompt=Prompt(uid, (), ids[:prompt], "think", 0),
        sample=0,
        token_ids=ids[prompt:],
        log_probs=np.zeros(response, np.float32),
        versions=(VersionSpan(0, response, 0),),
        finish_reason="stop",
        engine=0,
        started=0.0,
        finished=0.0,
        candidates=ray.put(candidates),
        forced=((4, 7),) if response > 20 else (),
    )


def log_probs(model: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """[m, V] at the sampled tokens, from whole logits of one unpadded sequence."""
    ids = torch.from_numpy(rollout.input_ids).long()
    rows = log_softmax(model(ids[None]).logits[0, len(rollout.prompt.token_ids) - 1 : -1].float(), -1)
    return rows[torch.from_numpy(rollout.sampled_rows)]


def changed(samples: list[Scored], change: Callable[[Payload], Payload]) -> list[Scored]:
    """Samples whose payloads went wrong at the teacher."""
    result = []
    for sample in samples:
        assert sample.signal is not None
        payload = change(ray.get(sample.signal.payload))
        result.append(replace(sample, signal=replace(sample.signal, payload=ray.put(payload))))
    return result


def shifted(payload: Payload) -> Payload:
    """Each row is the one before it, and the first is the last."""
    return {name: value if name == "dtype" else np.roll(value, 1, 0) for name, value in payload.items()}


def uniform(payload: Payload) -> Payload:
    """The same for every token: a head on rows of zeros, or 1 / V at each id."""
    if "hidden" in payload:
        return {**payload, "hidden": np.zeros_like(payload["hidden"])}
    changed = {**payload, "log_probs": np.full_like(payload["log_probs"], -np.log(VOCAB_SIZE))}
    if "log_tail" in payload:
        changed["log_tail"] = np.full_like(payload["log_tail"], np.log(1 - TOP_K / VOCAB_SIZE))
    return changed


@pytest.mark.parametrize("kind", get_args(SignalKind))
def test_a_student_that_is_the_teacher_has_no_divergence(world: World, kind: SignalKind) -> None:
    learner, samples = world.build(world.teacher_path, kind), world.score(kind)
    value = world.run(check_divergence(learner, samples, FLOAT32))
    # Sampled: a difference of log-probs, in which float32 shows; a divergence is its square, plus its own rounding.
    assert value < (1e-5 if kind == "sampled" else 1e-7)
    for fault in (shifted, uniform):
        # Found out even with the tolerance of bfloat16.
        with pytest.raises(PreflightError, match=r"^preflight: a student equal to the teacher .* in r\d#0\)"):
            world.run(check_divergence(learner, changed(samples, fault), LOW_PRECISION))


def test_another_checkpoint_is_found_out(world: World) -> None:
    learner = world.build(world.student_path)
    with pytest.raises(PreflightError, match="look for shifted positions, another checkpoint"):
        world.run(check_divergence(learner, world.score(), LOW_PRECISION))


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 1e-4), ("float8", 1e-2)])
def test_smaller_dtypes_on_the_wire_cost_little(world: World, dtype: HiddenDtype, most: float) -> None:
    """Relative errors of 2^-9 and 2^-4 in the rows; the KL is quadratic in them. They must not be 0 either: the rows
    did travel in that dtype."""
    learner = world.build(world.teacher_path)
    value = world.run(check_divergence(learner, world.score(dtype=dtype), LOW_PRECISION))
    assert most / 1000 < value < most


@pytest.mark.parametrize("kind", get_args(SignalKind))
def test_log_probs_are_those_of_the_teacher(world: World, kind: SignalKind) -> None:
    learner, samples = world.build(world.student_path, kind), world.score(kind)
    model = AutoModelForCausalLM.from_pretrained(world.teacher_path, dtype=torch.float32)
    references = []
    for rollout in world.rollouts:
        ids = torch.from_numpy(rollout.token_ids[rollout.sampled_rows]).long()[:, None]
        with torch.no_grad():
            references.append(Reference(rollout, log_probs(model, rollout).gather(-1, ids)[:, 0].numpy()))
    assert world.run(check_log_probs(learner, references, samples, FLOAT32)) < 1e-5
    for fault in (shifted, uniform):
        with pytest.raises(PreflightError, match=r"differ by .* nats on average"):
            world.run(check_log_probs(learner, references, changed(samples, fault), LOW_PRECISION))


def test_a_step_is_that_of_one_process_with_both_models(world: World) -> None:
    """Loss, gradient norm and updated weights against whole logits of teacher and student in this process.

    Both sides compute in float32 and sum in another order; Adam turns a gradient near 0 into a step of the size of the
    learning rate (1e-3) whatever its sign, so single weights may differ by that, and their mean may not.
    """
    learner, samples = world.build(world.student_path), world.score()
    report = world.run(learner.step(samples, 0))
    path = world.run(learner.save(world.student_path.parent / "checkpoints", 1, {}, keep=1))

    settings = learner.config.learner
    teacher = AutoModelForCausalLM.from_pretrained(world.teacher_path, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(world.student_path, dtype=torch.float32)
    tokens = sum(len(rollout.sampled_rows) for rollout in world.rollouts)
    loss = torch.zeros(())
    for rollout in world.rollouts:
        with torch.no_grad():
            log_p = log_probs(teacher, rollout)
        loss = loss + (log_p.exp() * (log_p - log_probs(model, rollout))).sum() / tokens
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm).item()
    betas = (settings.beta1, settings.beta2)
    torch.optim.AdamW(model.parameters(), settings.learning_rate, betas, settings.eps, weight_decay=0.0).step()

    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    assert report.grad_norm == pytest.approx(norm, rel=1e-4)
    assert report.signal_bytes == sum(4 * 128 * len(rollout.token_ids) for rollout in world.rollouts)
    assert report.fetch_seconds > 0 and report.micro_batches > 1
    saved = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    difference = torch.cat([(saved[name] - value).abs().flatten() for name, value in model.state_dict().items()])
    assert difference.max() < 1e-3 and difference.mean() < 1e-6


def test_a_step_measures_the_bias_of_other_signals_when_asked(world: World) -> None:
    world.group.config.signal.bias_every = 2
    learner, samples = world.build(world.student_path), world.score()
    assert world.run(learner.step(samples, 0)).signal_bias == {}
    bias = world.run(learner.step(samples, 1)).signal_bias
    world.group.config.signal.bias_every = 0
    assert set(bias) == {f"{kind}_{k}" for kind in ("topk", "ids") for k in (16, 64, 256)} | {
        "hidden_bfloat16", "hidden_float8",
    }  # fmt: skip
    for kind in ("topk", "ids"):
        values = [bias[f"{kind}_{k}"]["divergence"] for k in (16, 64, 256)]
        assert values == sorted(values) and bias[f"{kind}_256"]["bias"] < 0
        assert bias[f"{kind}_16"]["cosine"] < bias[f"{kind}_256"]["cosine"] < 1


@pytest.mark.parametrize(("kind", "name"), [("topk", "log_probs"), ("sampled", "log_probs")])
def test_a_nan_in_a_signal_names_the_sample_and_stops_the_step(world: World, kind: SignalKind, name: str) -> None:
    def spoil(payload: Payload) -> Payload:
        values = payload[name].copy()
        values[3] = np.nan
        return {**payload, name: values}

    learner, samples = world.build(world.student_path, kind), world.score(kind)
    before = world.run(learner.probe(world.rollouts[0].input_ids))
    uid = samples[1].rollout.uid
    because = rf"\(teacher signal of {uid}: {name} is not finite in 1 of \d+ rows, first 3\)"
    with pytest.raises(NonFiniteError, match=f"divergence of {uid} is not finite {because}, see") as error:
        world.run(learner.step([samples[0], *changed(samples[1:2], spoil), *samples[2:]], 0))
    kept = torch.load(str(error.value).rpartition("see ")[2], weights_only=False)
    assert kept["signals"][kept["uids"].index(uid)][name].isnan().any()
    assert np.array_equal(world.run(learner.probe(world.rollouts[0].input_ids)), before)
