"""Every objective against its formula in plain float64 autograd, through the module that the learner trains.

Value and gradient by every parameter of a tiny Qwen3, models and kernel in float64. Weights of tokens are float32, so
both agree to 1e-6 relative. A formula here is written from its source, token by token, without the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, make_model
from torch import Tensor

from s2w.config.schema import Config, LossConfig, RewardConfig
from s2w.eval.grading import Graded
from s2w.learner.student_model import StudentModel
from s2w.learner.worker import pack
from s2w.models.head import head_of
from s2w.objectives import OBJECTIVES, Objective, TokenBatch
from s2w.objectives.divergences import divergence_of
from s2w.objectives.kdrl import KDRL
from s2w.objectives.kernel import HiddenRows, SparseRows
from s2w.objectives.negative import FixedNegative
from s2w.objectives.objective import TRAINED, help_text
from s2w.objectives.prefix import PrefixDistillation
from s2w.objectives.stable import StableDistillation
from s2w.records import Mode, Prompt, Rollout, Scored, VersionSpan

LENGTHS = (9, 14, 6)


@dataclass
class World:
    """A student, its teacher and its first weights, and responses that the student has sampled."""

    student: Any
    teacher: Any
    first: Any
    samples: list[Scored]
    graded: list[Graded]

    def log_probs(self, model: Any, sample: Scored) -> Tensor:
        """float64 [n, V] at the response's tokens; differentiable."""
        ids = torch.from_numpy(sample.rollout.input_ids).long()
        return model(ids[None]).logits[0, len(sample.rollout.prompt.token_ids) - 1 : -1].log_softmax(-1)

    def rows(self, model: Any, samples: Sequence[Scored]) -> HiddenRows:
        """What ``model`` says at the responses' tokens, as its hidden states."""
        parts = []
        for sample in samples:
            ids = torch.from_numpy(sample.rollout.input_ids).long()
            hidden = model.base_model(ids[None]).last_hidden_state[0]
            parts.append(hidden[len(sample.rollout.prompt.token_ids) - 1 : -1])
        return HiddenRows(torch.cat(parts).detach(), head_of(model).detach())

    def batch(self, samples: Sequence[Scored]) -> TokenBatch:
        rollouts = [sample.rollout for sample in samples]
        with torch.no_grad():
            picked = [at(self.log_probs(self.teacher, sample), sample) for sample in samples]
        tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        return TokenBatch(
            samples=samples,
            ids=torch.from_numpy(np.concatenate([rollout.token_ids for rollout in rollouts])).long(),
            log_probs=torch.from_numpy(np.concatenate([rollout.log_probs for rollout in rollouts])),
            teacher=self.rows(self.teacher, samples),
            reference=self.rows(self.first, samples),
            teacher_log_probs=torch.cat(picked),
            token_weight=1 / tokens,
        )


@pytest.fixture
def world() -> World:
    student, teacher, first = (make_model("untied", seed).double() for seed in (0, 1, 2))
    draw = np.random.default_rng(0)
    samples, graded = [], []
    for i, length in enumerate(LENGTHS):
        mode: Mode = "think" if i % 2 else "no_think"
        prompt = Prompt("sum/0", (), draw.integers(0, VOCAB_SIZE, 5, dtype=np.int32), mode, 0, "exact_match", "1")
        ids = draw.integers(0, VOCAB_SIZE, length, dtype=np.int32)
        spans = (VersionSpan(0, length, 0),)
        rollout = Rollout(prompt, i, ids, np.zeros(length), spans, "stop", 0, 0.0, 1.0)
        sample = Scored(rollout, None)
        # Sampled by a student a little different from this one.
        with torch.no_grad():
            ids_q = torch.from_numpy(rollout.input_ids).long()
            logits = student(ids_q[None]).logits[0, len(prompt.token_ids) - 1 : -1]
        log_q = (logits + 0.1 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(i))).log_softmax(-1)
        samples.append(replace(sample, rollout=replace(rollout, log_probs=at(log_q, sample).numpy())))
        graded.append(
            Graded("sum/0", "exact_match", mode, i == 2, adherent=True, truncated=False, forced=False, tokens=9)
        )
    return World(student, teacher, first, samples, graded)


def at(values: Tensor, sample: Scored) -> Tensor:
    """[n] of [n, V]: at the sampled tokens."""
    return values.gather(-1, torch.from_numpy(sample.rollout.token_ids).long()[:, None])[:, 0]


Formula = Callable[[World, Sequence[Scored]], Tensor]
"""The loss, from the samples with their weights and advantages; differentiable by the student."""


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def total(samples: Sequence[Scored]) -> int:
    return sum(len(sample.rollout.token_ids) for sample in samples)


def divergence_terms(world: World, sample: Scored) -> Tensor:
    """Forward KL at each token."""
    return kl(world.log_probs(world.teacher, sample).detach(), world.log_probs(world.student, sample))


def distillation(world: World, samples: Sequence[Scored]) -> Tensor:
    return sum(s.weight * divergence_terms(world, s).sum() for s in samples) / total(samples)  # type: ignore[return-value]


def cross_entropy(world: World, samples: Sequence[Scored]) -> Tensor:
    log_probs = torch.cat([at(world.log_probs(world.student, sample), sample) for sample in samples])
    return -log_probs.sum() / total(samples)


def policy_gradient(world: World, samples: Sequence[Scored]) -> Tensor:
    """-min(rho A, clip(rho, 0.8, 1.2) A)."""
    loss = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        rho = (at(world.log_probs(world.student, sample), sample) - torch.from_numpy(sample.rollout.log_probs)).exp()
        advantage = torch.full_like(rho, sample.advantage)
        if sample.token_advantages is not None:
            advantage = torch.from_numpy(sample.token_advantages).double()
        loss = loss - torch.minimum(rho * advantage, rho.clamp(0.8, 1.2) * advantage).sum()
    return loss / total(samples)


def kdrl(world: World, samples: Sequence[Scored]) -> Tensor:
    return distillation(world, samples) + 0.3 * policy_gradient(world, samples)


def prefix(gamma: float, part_nats: float | None) -> Formula:
    def loss(world: World, samples: Sequence[Scored]) -> Tensor:
        value = torch.zeros((), dtype=torch.float64)
        for sample in samples:
            log_p = at(world.log_probs(world.teacher, sample), sample).detach().numpy()
            a = log_p - sample.rollout.log_probs
            terms = divergence_terms(world, sample)
            parted = 0.0
            for t in range(len(a)):
                if part_nats is not None and parted > part_nats:
                    break
                g = 1 + gamma * (1 - np.abs(a[:t]).sum() / (np.abs(a).sum() + 1e-8))
                value = value + g * terms[t]
                parted -= a[t]
        return value / total(samples)

    return loss


def stable(world: World, samples: Sequence[Scored]) -> Tensor:
    loss = distillation(world, samples)
    for sample in samples:
        log_q, log_first = world.log_probs(world.student, sample), world.log_probs(world.first, sample).detach()
        loss = loss + 0.2 * sample.weight * kl(log_q, log_first).sum() / total(samples)
    return loss


def negative(world: World, samples: Sequence[Scored]) -> Tensor:
    """Mean over the fifth of the tokens that were least likely of +0.5 rho: A = -0.5, and rho A below its clip."""
    pairs = [(sample, t, value) for sample in samples for t, value in enumerate(sample.rollout.log_probs)]
    chosen = sorted(pairs, key=lambda pair: pair[2])[: int(0.2 * len(pairs))]
    loss = torch.zeros((), dtype=torch.float64)
    for sample, t, value in chosen:
        rho = (at(world.log_probs(world.student, sample), sample)[t] - value).exp()
        loss = loss - torch.minimum(-0.5 * rho, -0.5 * rho.clamp(0.8, 1.2))
    return loss / len(chosen)


CASES: list[tuple[str, Objective, Formula]] = [
    ("divergence", OBJECTIVES["divergence"](), distillation),
    ("cross_entropy", OBJECTIVES["cross_entropy"](), cross_entropy),
    ("grpo", OBJECTIVES["grpo"](), policy_gradient),
    ("kdrl", KDRL(RewardConfig(weight=0.3)), kdrl),
    ("prefix", PrefixDistillation(), prefix(0.5, None)),
    ("prefix, parted", PrefixDistillation(gamma=1.0, part_nats=6.0), prefix(1.0, 6.0)),
    ("stable", StableDistillation(reference_weight=0.2), stable),
    ("stable, no reference", StableDistillation(), distillation),
    ("negative", FixedNegative(), negative),
]


@pytest.mark.parametrize(("name", "objective", "formula"), CASES, ids=[name for name, _, _ in CASES])
def test_value_and_gradient(world: World, name: str, objective: Objective, formula: Formula) -> None:
    samples = objective.credit(world.samples, world.graded)
    batch = world.batch(samples)
    if not objective.needs_reference:
        batch = replace(batch, reference=None)
    if not objective.teacher_log_probs:
        batch = replace(batch, teacher_log_probs=None)
    settings = objective.loss_settings(LossConfig())
    module = StudentModel(world.student, settings, divergence_of(settings), VOCAB_SIZE)
    module(pack(samples), objective.loss(batch))["loss"].backward()
    got = {key: p.grad.clone() for key, p in world.student.named_parameters() if p.grad is not None}
    value = module(pack(samples), objective.loss(batch))["loss"].item()
    world.student.zero_grad()
    expected = formula(world, samples)
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-6)  # weights are float32
    for key, parameter in world.student.named_parameters():
        scale = parameter.grad.abs().max()
        assert (got[key] - parameter.grad).abs().max() <= 1e-6 * scale + 1e-12, key
    assert max(gradient.abs().max() for gradient in got.values()) > 1e-6


def test_every_objective_has_a_case() -> None:
    assert {type(objective) for _, objective, _ in CASES} == set(OBJECTIVES.values())
    for name, cls in OBJECTIVES.items():
        assert cls.name == name and cls.source and cls.when and cls.phases
        assert cls.__doc__ and f"  {name}  (" in help_text()


def test_a_response_that_has_parted_does_not_come_back() -> None:
    objective = PrefixDistillation(gamma=0.0, part_nats=2.0)
    advantages = torch.tensor([-1.0, -0.9, -0.2, 5.0, 0.0, 0.0])
    # Accumulated log q - log p before each token: 0, 1, 1.9, 2.1 (parted), -2.9, -2.9.
    assert objective.weights(advantages).tolist() == [1, 1, 1, 0, 0, 0]
    world_metrics = objective.weights(advantages) > 0
    assert int(world_metrics.sum()) == 3
    assert PrefixDistillation(gamma=0.5).weights(torch.zeros(3)).tolist() == [1.5, 1.5, 1.5]


def test_the_weights_fall_from_one_and_gamma_to_one() -> None:
    weights = PrefixDistillation(gamma=0.5).weights(torch.tensor([-1.0, 1.0, -2.0, 0.0]))
    torch.testing.assert_close(weights, torch.tensor([1.5, 1.375, 1.25, 1.0]))


def test_the_length_limit_follows_where_they_part() -> None:
    objective = PrefixDistillation(part_nats=5.0, length_quantile=0.5, shortest=10)
    assert objective.next_length_limit([20.0, 40.0, 90.0], 100) == 60
    assert objective.next_length_limit([2.0, 4.0], 100) == 10
    assert objective.next_length_limit([90.0, 95.0], 100) == 100
    assert PrefixDistillation(part_nats=5.0).next_length_limit([2.0], 100) == 100


def test_trained_tokens_are_counted(world: World) -> None:
    loss = PrefixDistillation(part_nats=6.0).loss(world.batch(world.samples))
    assert 0 < loss.metrics[TRAINED.name].sum() < sum(LENGTHS)


def test_truncated_and_repetitive_responses_are_left_out(world: World) -> None:
    whole, cut, loop = world.samples
    cut = replace(cut, rollout=replace(cut.rollout, finish_reason="length"))
    looping = np.tile(np.array([3, 4], np.int32), 40)
    loop = replace(loop, rollout=replace(loop.rollout, token_ids=looping, log_probs=np.zeros(80)))
    objective = StableDistillation(loop_tokens=64)
    kept = objective.credit([whole, cut, loop], world.graded)
    assert [sample.counts for sample in kept] == [True, False, False]
    everything = StableDistillation(truncated=False, loop_tokens=100).credit([whole, cut, loop], world.graded)
    assert all(sample.counts for sample in everything)


def test_the_least_likely_tokens_count_for_all(world: World) -> None:
    samples = FixedNegative(share=0.2, advantage=0.5).credit(world.samples, world.graded)
    advantages = np.concatenate([s.token_advantages for s in samples if s.token_advantages is not None])
    log_probs = np.concatenate([sample.rollout.log_probs for sample in samples])
    assert (advantages != 0).sum() == int(0.2 * sum(LENGTHS))
    assert log_probs[advantages != 0].max() < log_probs[advantages == 0].min()
    assert advantages.sum() / len(advantages) == pytest.approx(-0.5)


def test_settings_reach_the_objective() -> None:
    config = Config()
    config.loss.options = {"gamma": 2, "forward_weight": 0.25}
    made = PrefixDistillation.make(config)
    assert made.gamma == 2.0 and PrefixDistillation.options() == ["gamma", "part_nats", "length_quantile", "shortest"]
    config.reward.clip_high = 0.3
    assert KDRL.make(config).reward.clip_high == 0.3 and KDRL.options() == []
    config.loss.divergence = "kl_mixture"
    assert divergence_of(config.loss).forward_weight == 0.25  # type: ignore[attr-defined]


def test_cross_entropy_is_the_log_loss_of_its_tokens(world: World) -> None:
    loss = OBJECTIVES["cross_entropy"]().loss(world.batch(world.samples))
    assert isinstance(loss.teacher, SparseRows) and loss.policy is None
