"""The learner group, two DeepSpeed ranks in Ray actors, against one plain torch process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import ray
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tiny_models import VOCAB_SIZE, Kind, make_checkpoint
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, PreTrainedModel

from s2w.config.schema import Config
from s2w.learner import checkpoint
from s2w.learner.group import LearnerError, LearnerGroup, LearnerStep
from s2w.learner.messages import NonFiniteError, SignalLostError
from s2w.learner.schedule import learning_rate
from s2w.models.checkpoint import ModelReference
from s2w.records import Mode, Prompt, Rollout, Scored, SignalKind, TeacherSignal

# Ray's workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

STEPS = 3
MAX_GRAD_NORM = 0.3
"""Below the first gradients' norms (about 0.7), so that clipping is at work."""


@dataclass
class World:
    """What all tests share: one pair of ranks, rebuilt for each test, checkpoints and samples."""

    root: Path
    group: LearnerGroup
    loop: asyncio.AbstractEventLoop
    students: dict[Kind, Path]
    teacher: PreTrainedModel
    batches: list[list[Scored]] = field(default_factory=list)

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(call)

    def build(self, kind: Kind, stage: int, dtype: str = "float32", **learner: Any) -> LearnerGroup:
        settings = self.group.config.learner
        settings.zero_stage, settings.dtype = stage, dtype
        settings.activation_checkpointing = learner.get("activation_checkpointing", False)
        self.run(self.group.build(ModelReference(str(self.students[kind])), VOCAB_SIZE))
        return self.group


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("learner")
    kinds: tuple[Kind, ...] = ("tied", "untied", "moe")
    students = {kind: make_checkpoint(root / kind, kind, seed=1) for kind in kinds}
    teacher_path = make_checkpoint(root / "teacher", "untied", seed=2)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path)

    config = Config()
    config.teacher.model, config.run.dir = str(teacher_path), str(root / "run")
    config.rollout.dtype = "float32"
    config.loop.steps = STEPS
    learner = config.learner
    learner.ranks, learner.threads, learner.cpus = 2, 1, 1.0
    learner.learning_rate, learner.weight_decay, learner.max_grad_norm = 1e-3, 0.1, MAX_GRAD_NORM
    learner.schedule, learner.warmup_steps, learner.min_lr_ratio = "cosine", 1, 0.1
    learner.tokens_per_micro_batch = 60

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    loop = asyncio.new_event_loop()
    student = ModelReference(str(students["tied"]))
    group = loop.run_until_complete(LearnerGroup.start(config, student, "cpu", VOCAB_SIZE))
    ray.get([rank.__ray_call__.remote(work_in_pieces) for rank in group.ranks])
    world = World(root, group, loop, students, teacher)
    generator = np.random.default_rng(0)
    world.batches = [[make_sample(teacher, generator, f"{step}/{i}") for i in range(11)] for step in range(STEPS)]
    yield world
    group.shutdown()
    ray.shutdown()
    loop.close()


def work_in_pieces(_: Any) -> None:
    """Many buckets a backward pass, parameters larger than one, and norms of parts of them; runs in a rank."""
    from s2w.learner import deepspeed_settings, worker

    deepspeed_settings.BUCKET_ELEMENTS["cpu"], worker.NORM_ELEMENTS = 50_000, 1_000


def make_sample(teacher: PreTrainedModel, generator: np.random.Generator, uid: str) -> Scored:
    """A random prompt (1 to 14 tokens) and response (1 to 29 tokens) with the teacher's hidden rows.

    Responses of 12 tokens and more have three in the middle that were forced: they count nowhere.
    """
    prompt_ids = generator.integers(0, VOCAB_SIZE, generator.integers(1, 15)).astype(np.int32)
    response = generator.integers(0, VOCAB_SIZE, generator.integers(1, 30)).astype(np.int32)
    mode: Mode = "think" if generator.random() < 0.5 else "no_think"
    prompt = Prompt(uid, (), prompt_ids, mode, seed=0)
    forced = ((4, 7),) if len(response) >= 12 else ()
    zeros = np.zeros(len(response), np.float32)
    rollout = Rollout(prompt, 0, response, zeros, (), "stop", 0, 0.0, 0.0, forced=forced)
    ids = torch.from_numpy(rollout.input_ids).long()
    with torch.no_grad():
        hidden = teacher.model(ids[None]).last_hidden_state[0, len(prompt_ids) - 1 : -1]
    return with_payload(rollout, {"hidden": hidden.contiguous().numpy(), "dtype": "float32"})


def with_payload(rollout: Rollout, payload: dict[str, Any], kind: SignalKind = "hidden") -> Scored:
    signal = TeacherSignal(kind, len(rollout.token_ids), ray.put(payload), 0, 0, 0.0, 0.0, 0)
    return Scored(rollout, signal)


def log_probs(model: PreTrainedModel, sample: Scored) -> torch.Tensor:
    """[n, V] over the response tokens, from whole logits of one unpadded sequence."""
    ids = torch.from_numpy(sample.rollout.input_ids).long()
    return log_softmax(model(ids[None]).logits[0, len(sample.rollout.prompt.token_ids) - 1 : -1].float(), -1)


def learned(sample: Scored) -> torch.Tensor:
    """bool [n]: response tokens that are not forced."""
    mask = torch.ones(len(sample.rollout.token_ids), dtype=torch.bool)
    for start, stop in sample.rollout.forced:
        mask[start:stop] = False
    return mask


@dataclass
class Reference:
    """The same training in one process, one sample after the other, whole logits, torch's own clipping and AdamW."""

    model: PreTrainedModel
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    reverse_kl: float = 0.0
    """Before the first step, on its samples."""


@pytest.fixture(scope="module")
def references(world: World) -> dict[str, Reference]:
    return {kind: train_plainly(world, path) for kind, path in world.students.items()}


def train_plainly(world: World, student: Path) -> Reference:
    config = world.group.config.learner
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    groups = [[p for p in model.parameters() if (p.ndim > 1) == decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": config.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    reference = Reference(model)
    for step, samples in enumerate(world.batches):
        optimizer.zero_grad()
        tokens = sum(int(learned(sample).sum()) for sample in samples)
        loss = 0.0
        for sample in samples:
            log_q = log_probs(model, sample)[learned(sample)]
            with torch.no_grad():
                log_p = log_probs(world.teacher, sample)[learned(sample)]
            kl = (log_p.exp() * (log_p - log_q)).sum() / tokens
            kl.backward()
            loss += kl.item()
            if step == 0:
                reference.reverse_kl += (log_q.exp() * (log_q - log_p)).sum().item() / tokens
        reference.losses.append(loss)
        reference.grad_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, STEPS)
        optimizer.step()
    return reference


CASES: list[tuple[Kind, int, bool]] = [
    ("untied", 0, False),
    ("tied", 1, False),
    ("tied", 2, True),
    ("tied", 3, False),
    ("moe", 2, False),
    ("moe", 3, True),
]


@pytest.mark.parametrize(("kind", "stage", "activation_checkpointing"), CASES)
def test_matches_one_process_and_resumes(
    world: World, references: dict[str, Reference], kind: Kind, stage: int, activation_checkpointing: bool
) -> None:
    """Losses, norms and weights of three steps; refused and skipped steps leave no trace; a resumed run is the same.

    Tolerances: both sides compute in float32 and sum in another order. Adam turns a gradient near 0 into a step of
    the size of the learning rate (1e-3) whatever its sign, so a few weights may differ by that; their mean may not.
    """
    reference, root = references[kind], world.root / f"{kind}_{stage}"
    group = world.build(kind, stage, activation_checkpointing=activation_checkpointing)
    batches = world.batches

    before = world.run(group.evaluate(batches[0], ["forward_kl", "reverse_kl"]))
    assert before == pytest.approx({"forward_kl": reference.losses[0], "reverse_kl": reference.reverse_kl}, rel=1e-5)
    for step, samples in enumerate(batches):
        refuse_steps(world, samples, step)
        skip_a_step(world, samples, step)
        report = world.run(group.step(samples, step))
        assert report.loss == pytest.approx(reference.losses[step], rel=1e-5)
        assert report.grad_norm == pytest.approx(reference.grad_norms[step], rel=1e-4)
        check_report(report, samples)
        path = world.run(group.save(root, step + 1, {"position": 11 * (step + 1)}, keep=2))
        assert path == checkpoint.latest(root) == checkpoint.step_dir(root, step + 1)

    # The checkpoint is the reference's model for transformers, and what the ranks themselves compute with.
    saved = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    trained, expected = saved.state_dict(), reference.model.state_dict()
    assert trained.keys() == expected.keys()
    difference = torch.cat([(trained[name] - expected[name]).abs().flatten() for name in expected])
    assert difference.max() < 1e-3
    assert difference.mean() < 1e-6
    ids = batches[0][0].rollout.input_ids
    tokens = torch.from_numpy(ids).long()
    with torch.no_grad():
        log_q = log_softmax(saved(tokens[None, :-1]).logits[0], -1).gather(-1, tokens[1:, None])[:, 0]
    np.testing.assert_allclose(world.run(group.probe(ids)), log_q.numpy(), atol=1e-4)
    assert (path / "tokenizer.json").read_bytes() == (world.students[kind] / "tokenizer.json").read_bytes()

    # Resumed after step 2, from new engines, the third step is the same bit for bit.
    world.build(kind, stage, activation_checkpointing=activation_checkpointing)
    assert world.run(group.load(checkpoint.step_dir(root, 2))) == (2, {"position": 22})
    resumed = world.run(group.step(batches[2], 2))
    assert (resumed.loss, resumed.grad_norm) == (report.loss, report.grad_norm)
    again = world.run(group.save(world.root / f"{kind}_{stage}_resumed", 3, {}, keep=1))
    for name, tensor in AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32).state_dict().items():
        assert torch.equal(tensor, trained[name]), name

    # One sample for two ranks: the other rank only keeps in step.
    (value,) = world.run(group.evaluate(batches[0][:1], ["forward_kl"])).values()
    sums = world.run(group.evaluate_samples(batches[0], ["forward_kl", "reverse_kl"]))
    assert sums[0, 0] == pytest.approx(value * len(batches[0][0].rollout.sampled_rows), rel=1e-5)
    # Whichever rank and micro-batch a sample was in.
    assert world.run(group.evaluate_samples(batches[0][::-1], ["forward_kl", "reverse_kl"])) == pytest.approx(
        sums[::-1], rel=1e-5
    )
    assert world.run(group.step(batches[0][:1], 2)).loss == pytest.approx(value, rel=1e-5)


def refuse_steps(world: World, samples: list[Scored], step: int) -> None:
    """A NaN, then rows that are missing: both ranks refuse, the sample is named, nothing changes."""
    rollout = samples[3].rollout
    assert samples[3].signal is not None
    hidden = ray.get(samples[3].signal.payload)["hidden"].copy()
    hidden[-1, 5] = np.nan
    bad = [*samples[:3], with_payload(rollout, {"hidden": hidden, "dtype": "float32"}), *samples[4:]]
    with pytest.raises(NonFiniteError, match=rf"divergence of {rollout.uid} is not finite \(.*hidden is not") as error:
        world.run(world.group.step(bad, step))
    dump = torch.load(str(error.value).rpartition("see ")[2].split(";")[0], weights_only=False)
    assert rollout.uid in dump["uids"]
    assert sum(int(part["hidden"].isnan().sum()) for part in dump["signals"]) == 1
    with pytest.raises(NonFiniteError, match=f"teacher signal of {rollout.uid}: hidden is not finite in 1 of"):
        world.run(world.group.evaluate(bad, ["forward_kl"]))
    with pytest.raises(NonFiniteError, match=f"teacher signal of {rollout.uid}: hidden is not finite in 1 of"):
        world.run(world.group.teacher_log_probs(bad))

    hidden = np.zeros((len(hidden) + 1, hidden.shape[1]), np.float32)
    bad[3] = with_payload(rollout, {"hidden": hidden, "dtype": "float32"})
    with pytest.raises(SignalLostError, match=f"teacher signal of {rollout.uid} has rows"):
        world.run(world.group.step(bad, step))


def skip_a_step(world: World, samples: list[Scored], step: int) -> None:
    """Divergences are finite and a gradient is not: the sample is named, the weights stay."""
    heavy = replace(samples[5], weight=float("inf"))
    update = world.run(world.group.step([*samples[:5], heavy, *samples[6:]], step))
    assert update.skipped == (
        f"step {step + 1}: the gradient is not finite (that of {heavy.rollout.uid}), so the update is skipped"
    )
    assert update.grad_norm == np.inf and np.isfinite(update.metrics["divergence"])


def check_report(report: LearnerStep, samples: list[Scored]) -> None:
    """The parts of a report add up."""
    lengths = {mode: 0 for mode in ("no_think", "think")}
    for sample in samples:
        lengths[sample.rollout.prompt.mode] += int(learned(sample).sum())
    assert report.by_mode.keys() == lengths.keys() and report.left_out == 0
    assert report.tokens == sum(lengths.values())
    assert set(report.metrics) == {"divergence", "student_entropy", "teacher_entropy", "agreement"}
    for name, mean in report.metrics.items():
        by_mode = {mode: values[name] * lengths[mode] for mode, values in report.by_mode.items()}
        assert mean == pytest.approx(sum(by_mode.values()) / report.tokens, rel=1e-9)
        # Each sample's own sum, in the order of the samples.
        for mode, expected in by_mode.items():
            own = [i for i, sample in enumerate(samples) if sample.rollout.prompt.mode == mode]
            assert report.sums[name][own].sum() == pytest.approx(expected, rel=1e-9)
    assert report.metrics["divergence"] == pytest.approx(report.loss, rel=1e-5)
    assert 0 < report.metrics["teacher_entropy"] < np.log(VOCAB_SIZE)
    assert report.signal_bytes == sum(len(sample.rollout.token_ids) for sample in samples) * 4 * 128
    assert report.micro_batches > 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16(world: World, references: dict[str, Reference], stage: int) -> None:
    """bfloat16 weights and products, float32 master copy: the float32 losses within bfloat16's 3 digits.

    A norm weight near 1 is held to 4e-3 in bfloat16 and moves by 2e-3 in all: only a float32 copy can follow. The
    moves are those of float32 but for the sign of gradients near 0, hence 10 %.
    """
    group, reference = world.build("tied", stage, dtype="bfloat16"), references["tied"]
    root = world.root / f"bfloat16_{stage}"
    for step, samples in enumerate(world.batches):
        report = world.run(group.step(samples, step))
        assert report.loss == pytest.approx(reference.losses[step], rel=5e-3)
        assert report.grad_norm == pytest.approx(reference.grad_norms[step], rel=2e-2)
        path = world.run(group.save(root, step + 1, {}, keep=2))
    saved = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert saved.dtype == torch.bfloat16

    if stage > 1:  # Stage 1 is another optimizer wrapper in bfloat16, whose files DeepSpeed's reader does not know.
        master = get_fp32_state_dict_from_zero_checkpoint(str(path / "optimizer"), "ranks")
        initial = AutoModelForCausalLM.from_pretrained(world.students["tied"], dtype=torch.float32).state_dict()
        for name, trained in reference.model.state_dict().items():
            assert torch.equal(master[f"lm.{name}"].bfloat16(), saved.state_dict()[name]), name
            moved = master[f"lm.{name}"] - initial[name].bfloat16().float()
            expected = trained - initial[name]
            assert (moved - expected).abs().mean() < 0.1 * expected.abs().mean(), name

    world.build("tied", stage, dtype="bfloat16")
    world.run(group.load(checkpoint.step_dir(root, 2)))
    resumed = world.run(group.step(world.batches[2], 2))
    assert (resumed.loss, resumed.grad_norm) == (report.loss, report.grad_norm)


@ray.remote(num_cpus=0, max_retries=0)
def score() -> dict[str, Any]:
    raise RuntimeError("the teacher died")


def test_a_lost_signal_is_named(world: World) -> None:
    """Its sample is named, and the step can be made without it."""
    group = world.build("tied", 2)
    samples = list(world.batches[0])
    assert samples[3].signal is not None
    samples[3] = replace(samples[3], signal=replace(samples[3].signal, payload=score.remote()))
    with pytest.raises(SignalLostError, match=f"teacher signal of {samples[3].rollout.uid} is lost"):
        world.run(group.step(samples, 0))
    world.run(group.step(samples[:3] + samples[4:], 0))


def test_topk_of_the_whole_vocabulary_is_exact(world: World, references: dict[str, Reference]) -> None:
    samples = []
    for sample in world.batches[0]:
        with torch.no_grad():
            top = log_probs(world.teacher, sample).topk(VOCAB_SIZE)
        payload = {
            "ids": top.indices.int().numpy(),
            "log_probs": top.values.numpy(),
            "log_tail": np.full(len(top.values), -np.inf, np.float32),
        }
        samples.append(with_payload(sample.rollout, payload, "topk"))
    world.group.config.signal.kind = "topk"
    group = world.build("tied", 1)
    assert world.run(group.step(samples, 0)).loss == pytest.approx(references["tied"].losses[0], rel=1e-5)


def test_sampled(world: World) -> None:
    """The mean of log q - log p at the sampled tokens, with importance weight 1."""
    student = AutoModelForCausalLM.from_pretrained(world.students["tied"], dtype=torch.float32)
    samples, gap, tokens = [], 0.0, 0
    for sample in world.batches[0]:
        ids = torch.from_numpy(sample.rollout.token_ids).long()[:, None]
        with torch.no_grad():
            log_p, log_q = (log_probs(m, sample).gather(1, ids)[:, 0] for m in (world.teacher, student))
        rollout = replace(sample.rollout, log_probs=log_q.numpy())
        samples.append(with_payload(rollout, {"log_probs": log_p.numpy()}, "sampled"))
        gap += (log_q - log_p)[learned(sample)].sum().item()
        tokens += int(learned(sample).sum())
    config = world.group.config
    config.signal.kind, config.loss.divergence = "sampled", "reverse_kl"
    group = world.build("tied", 1)
    values = world.run(group.evaluate(samples, ["forward_kl", "reverse_kl"]))
    assert np.isnan(values["forward_kl"])
    assert values["reverse_kl"] == pytest.approx(gap / tokens, rel=1e-4)
    report = world.run(group.step(samples, 0))
    assert report.metrics["divergence"] == pytest.approx(gap / tokens, rel=1e-4)
    assert np.isnan(report.metrics["agreement"])


def test_sampled_with_discount_and_stale_tokens(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient against autograd, with returns summed token by token."""
    discount, limit = 0.9, 1.1
    student = AutoModelForCausalLM.from_pretrained(world.students["tied"], dtype=torch.float32)
    generator = np.random.default_rng(5)
    samples, loss, tokens, limited = [], torch.zeros(()), 0, 0
    for sample in world.batches[0]:
        mask = learned(sample)
        ids = torch.from_numpy(sample.rollout.token_ids).long()[:, None]
        log_q = log_probs(student, sample).gather(1, ids)[:, 0]
        with torch.no_grad():
            log_p = log_probs(world.teacher, sample).gather(1, ids)[:, 0]
        drawn = log_q.detach() + torch.from_numpy(0.3 * generator.standard_normal(len(ids))).float()
        samples.append(
            with_payload(replace(sample.rollout, log_probs=drawn.numpy()), {"log_probs": log_p.numpy()}, "sampled")
        )
        ratio, rewards = (log_q.detach() - drawn)[mask].exp().clamp_max(limit), (log_p - log_q.detach())[mask]
        limited += int((ratio == limit).sum())
        returns = [sum(discount**j * reward for j, reward in enumerate(rewards[i:])) for i in range(len(rewards))]
        loss = loss - (ratio * torch.stack(returns) * log_q[mask]).sum()
        tokens += len(rewards)
    assert 0 < limited < tokens
    (loss / tokens).backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM).item()

    config = world.group.config
    config.signal.kind, config.loss.divergence = "sampled", "reverse_kl"
    monkeypatch.setattr(config.loss, "discount", discount)
    monkeypatch.setattr(config.loss, "importance_limit", limit)
    group = world.build("tied", 1)
    assert world.run(group.step(samples, 0)).grad_norm == pytest.approx(norm, rel=1e-4)


def test_another_shape_is_refused(world: World, tmp_path: Path) -> None:
    group = world.build("tied", 1)
    path = world.run(group.save(tmp_path, 1, {}, keep=1))
    group.config.learner.zero_stage = 2
    with pytest.raises(ValueError, match=r"learner.ranks=2, learner.zero_stage=1.* cannot continue"):
        world.run(group.load(path))


@pytest.mark.parametrize("objective", ["grpo", "kdrl", "cross_entropy"])
def test_other_objectives(world: World, objective: str) -> None:
    """GRPO alone; KDRL with samples of unlike weight and two teachers of unlike width; cross-entropy: against autograd
    in one process.

    The sums differ in order, hence 1e-5; the gradient's norm passes two more matrix products.
    """
    student = AutoModelForCausalLM.from_pretrained(world.students["tied"], dtype=torch.float32)
    other_path = make_checkpoint(world.root / f"other_{objective}", "untied", 7, hidden_size=64)
    other = AutoModelForCausalLM.from_pretrained(other_path)
    generator = np.random.default_rng(3)
    samples, clip, beta = [], (0.2, 0.3), 0.7
    tokens = sum(int(learned(sample).sum()) for sample in world.batches[0])
    loss = torch.zeros(())
    for sample in world.batches[0]:
        teacher = world.teacher
        if objective == "kdrl" and sample.rollout.prompt.mode == "no_think":
            teacher = other
            ids, start = torch.from_numpy(sample.rollout.input_ids).long(), len(sample.rollout.prompt.token_ids) - 1
            with torch.no_grad():
                hidden = other.model(ids[None]).last_hidden_state[0, start:-1].contiguous().numpy()
            sample = with_payload(sample.rollout, {"hidden": hidden, "dtype": "float32"})
            assert sample.signal is not None
            sample = replace(sample, signal=replace(sample.signal, name="other"))
        log_q = log_probs(student, sample)
        chosen = log_q.gather(-1, torch.from_numpy(sample.rollout.token_ids).long()[:, None])[:, 0]
        sampled = chosen.detach() + 0.3 * torch.from_numpy(generator.standard_normal(len(chosen))).float()
        sample = replace(
            sample,
            rollout=replace(sample.rollout, log_probs=sampled.numpy()),
            advantage=float(generator.standard_normal()),
            weight=float(generator.random()) if objective == "kdrl" else 1.0,
            signal=sample.signal if objective == "kdrl" else None,
        )
        samples.append(sample)
        rows = learned(sample)
        ratio = (chosen - sampled).exp()
        surrogate = -torch.minimum(ratio * sample.advantage, ratio.clamp(1 - clip[0], 1 + clip[1]) * sample.advantage)
        with torch.no_grad():
            log_p = log_probs(teacher, sample)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        term = {"grpo": surrogate, "kdrl": sample.weight * kl + beta * surrogate, "cross_entropy": -chosen}[objective]
        loss = loss + term[rows].sum() / tokens
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])

    config = world.group.config
    config.teachers = {"other": {"model": str(other_path), "modes": ["no_think"]}}
    config.reward.clip_low, config.reward.clip_high = clip
    config.reward.weight = beta if objective == "kdrl" else 0.0
    config.loss.objective = objective
    config.signal.kind, config.loss.divergence = "hidden", "forward_kl"
    try:
        group = world.build("tied", 2)
        report = world.run(group.step(samples, 0))
    finally:
        config.teachers, config.loss.objective, config.reward.weight = {}, "divergence", 0.0
    assert report.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert report.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_a_rank_that_fails_alone_ends_the_group(world: World) -> None:
    """Last of the file: the ranks are gone afterwards."""
    empty = replace(world.batches[0][0].rollout, token_ids=np.zeros(0, np.int32))
    with pytest.raises(ValueError, match="has no sampled tokens"):
        world.run(world.group.step([Scored(empty, world.batches[0][0].signal)], 0))
    rollout = replace(world.batches[0][0].rollout, token_ids=np.full(20, VOCAB_SIZE, np.int32))
    with pytest.raises(ValueError, match=f"rollout {rollout.uid} has the token id {VOCAB_SIZE}, .* ends at 511"):
        world.run(world.group.step([Scored(rollout, world.batches[0][0].signal)], 0))
    heavy = replace(world.batches[0][0], weight=float("inf"))
    for _ in range(world.group.config.learner.max_skipped_steps):
        assert world.run(world.group.step([heavy], 0)).skipped
    with pytest.raises(NonFiniteError, match=r"4 in a row, more than learner\.max_skipped_steps=3"):
        world.run(world.group.step([heavy], 0))
    # No number: an error in the middle of one rank's step.
    odd = replace(world.batches[0][0], weight=cast(Any, "heavy"))
    with pytest.raises(LearnerError, match="step failed on learner rank"):
        world.run(world.group.step([odd, *world.batches[0][1:]], 0))
    with pytest.raises(LearnerError, match="shut down"):
        world.run(world.group.probe(np.arange(4, dtype=np.int32)))


def test_no_room_for_the_ranks(world: World) -> None:
    config = Config()
    config.learner.ranks, config.learner.cpus, config.cluster.start_timeout_s = 2, 64.0, 1
    with pytest.raises(TimeoutError, match="no room for 2 learner ranks"):
        world.run(LearnerGroup.start(config, ModelReference(str(world.students["tied"])), "cpu", VOCAB_SIZE))
