"""The clipped policy gradient, alone (GRPO) and beside a divergence (KDRL), against float64 autograd."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from s2w.models.head import Head
from s2w.objectives.divergences import ForwardKL, ReverseKL
from s2w.objectives.kernel import HiddenRows, PolicyRows, SampledRows, SparseRows, TeacherRows, divergence_loss

ROWS, VOCAB, PADDING, WIDTH = 12, 17, 3, 5
CLIP = (0.2, 0.3)


@dataclass
class Case:
    """A small problem in float64, with padding, bias and softcap."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    softcap: float | None
    weights: Tensor
    policy: PolicyRows

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight, self.bias

    def log_q(self, temperature: float) -> Tensor:
        """float64 [N, V], the obvious way."""
        logits = self.hidden @ self.weight.T + self.bias
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (logits[:, :VOCAB] / temperature).log_softmax(-1)

    def policy_loss(self, temperature: float) -> Tensor:
        """PPO's clipped objective (arXiv 1707.06347, eq. 7), as written there."""
        rows = self.policy
        ratio = (self.log_q(temperature).gather(-1, rows.ids[:, None])[:, 0] - rows.sampling_log_probs).exp()
        clipped = ratio.clamp(1 - CLIP[0], 1 + CLIP[1])
        return -(rows.weights * torch.minimum(ratio * rows.advantages, clipped * rows.advantages)).sum()

    def loss(self, teacher: TeacherRows | None, temperature: float = 1.0, policy: PolicyRows | None = None) -> Tensor:
        return divergence_loss(
            self.hidden,
            Head(self.weight, self.bias, self.softcap),
            teacher,
            ReverseKL() if isinstance(teacher, SampledRows) else ForwardKL(),
            vocab_size=VOCAB,
            weights=self.weights,
            policy=policy or self.policy,
            temperature=temperature,
            temperature_squared=False,
            chunk_rows=5,
        ).loss


def make(softcap: float | None = None, stale: float = 0.3) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = normal(ROWS, WIDTH), normal(VOCAB + PADDING, WIDTH), normal(VOCAB + PADDING)
    ids = torch.randint(VOCAB, (ROWS,), generator=generator)
    case = Case(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        bias.requires_grad_(),
        softcap,
        torch.rand(ROWS, generator=generator, dtype=torch.float64),
        PolicyRows(
            ids, normal(ROWS), torch.zeros(ROWS), torch.rand(ROWS, generator=generator, dtype=torch.float64), CLIP
        ),
    )
    current = case.log_q(1.0).detach().gather(-1, ids[:, None])[:, 0]
    case.policy = replace(case.policy, sampling_log_probs=current + stale * normal(ROWS))
    return case


def gradients(loss: Tensor, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, case.inputs)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_alone(softcap: float | None, temperature: float) -> None:
    """GRPO: no teacher. Some of the ratios are clipped."""
    case = make(softcap)
    expected = case.policy_loss(temperature)
    torch.testing.assert_close(case.loss(None, temperature), expected)
    for got, reference in zip(gradients(case.loss(None, temperature), case), gradients(expected, case), strict=True):
        torch.testing.assert_close(got, reference)


def test_clipped_tokens_have_no_gradient() -> None:
    """An advantage that asks for more of what the update has already given more of, and the other way round."""
    case = make(stale=0.0)
    far = case.policy.sampling_log_probs - 1.0  # ratio e: above 1 + CLIP[1] everywhere
    for sign, learns in ((1.0, False), (-1.0, True)):
        policy = replace(case.policy, sampling_log_probs=far, advantages=torch.full((ROWS,), sign, dtype=torch.float64))
        (gradient, *_) = gradients(case.loss(None, policy=policy), case)
        assert bool(gradient.abs().max() > 0) == learns


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_beside_a_divergence(kind: str, temperature: float) -> None:
    """KDRL: the gradient is the sum of both, each with its own weights."""
    case = make()
    generator = torch.Generator().manual_seed(1)
    head = Head(torch.randn(VOCAB + PADDING, 3, generator=generator, dtype=torch.float64))
    rows = HiddenRows(torch.randn(ROWS, 3, generator=generator, dtype=torch.float64), head)
    log_p = (head.logits(rows.hidden[:])[:, :VOCAB] / temperature).log_softmax(-1)
    log_q = case.log_q(temperature)
    teacher: TeacherRows = rows
    if kind == "topk":
        ids = log_p.topk(4).indices
        inside, tails = [one.gather(-1, ids) for one in (log_p, log_q)], []
        for one in (log_p, log_q):
            tails.append(one.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True))
        teacher = SparseRows(ids, inside[0], tails[0][:, 0])
        log_p, log_q = (torch.cat(pair, -1) for pair in zip(inside, tails, strict=True))
    divergence = (case.weights * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()
    expected = divergence + case.policy_loss(temperature)
    torch.testing.assert_close(case.loss(teacher, temperature), expected)
    for got, reference in zip(gradients(case.loss(teacher, temperature), case), gradients(expected, case), strict=True):
        torch.testing.assert_close(got, reference)


def test_beside_sampled_reverse_kl() -> None:
    """Both are multiples of the same score function: the sum of the two gradients."""
    case = make()
    teacher = SampledRows(case.policy.ids, torch.linspace(-3, -1, ROWS, dtype=torch.float64))
    nothing = replace(case.policy, weights=torch.zeros(ROWS, dtype=torch.float64))
    both, alone = gradients(case.loss(teacher), case), gradients(case.loss(teacher, policy=nothing), case)
    for got, one, other in zip(both, alone, gradients(case.policy_loss(1.0), case), strict=True):
        torch.testing.assert_close(got, one + other)


def test_statistics_without_a_teacher() -> None:
    case = make()
    output = divergence_loss(
        case.hidden, Head(case.weight, case.bias), None, ForwardKL(), vocab_size=VOCAB, policy=case.policy
    )
    log_q = case.log_q(1.0)
    torch.testing.assert_close(output.student_entropy, -(log_q.exp() * log_q).sum(-1))
    torch.testing.assert_close((case.policy.weights * output.values).sum(), case.policy_loss(1.0))
    assert output.teacher_entropy.isnan().all() and output.agreement.isnan().all()


def test_gradcheck() -> None:
    case = make(softcap=4.0)

    def loss(*inputs: Tensor) -> Tensor:
        return replace(case, hidden=inputs[0], weight=inputs[1], bias=inputs[2]).loss(None)

    assert torch.autograd.gradcheck(loss, case.inputs)


def test_nothing_to_learn() -> None:
    case = make()
    with pytest.raises(ValueError, match="nothing to train on"):
        divergence_loss(case.hidden, Head(case.weight, case.bias), None, ForwardKL(), vocab_size=VOCAB)
    short = replace(case.policy, ids=case.policy.ids[:3])
    with pytest.raises(ValueError, match="3 policy rows for 12 student rows"):
        case.loss(None, policy=short)
