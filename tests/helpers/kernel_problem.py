"""Small problems for the kernel: heads, teachers and row weights, and every divergence as a formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2w.objectives.divergences import AdaptiveKL, Divergence, make_divergence
from s2w.objectives.kernel import (
    DivergenceOutput,
    Head,
    HiddenRows,
    SampledRows,
    SparseRows,
    divergence_loss,
)

Formula = Callable[[Tensor, Tensor], Tensor]
ROWS, VOCAB, STUDENT_PAD, TEACHER_PAD = 11, 37, 40, 43


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mixture(log_p: Tensor, log_q: Tensor, w: float) -> Tensor:
    return (w * log_p.exp() + (1 - w) * log_q.exp()).log()


def adaptive(log_p: Tensor, log_q: Tensor) -> Tensor:
    w = AdaptiveKL().forward_weight(log_p.detach().exp(), log_q.detach().exp())[:, 0]
    return w * kl(log_p, log_q) + (1 - w) * kl(log_q, log_p)


FORMULAS: dict[str, Formula] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: 0.3 * kl(p, mixture(p, q, 0.3)) + 0.7 * kl(q, mixture(p, q, 0.3)),
    "skew_forward_kl": lambda p, q: kl(p, mixture(p, q, 0.2)),
    "skew_reverse_kl": lambda p, q: kl(q, mixture(p, q, 0.8)),
    "tvd": lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2,
    "alpha_divergence": lambda p, q: (1 - (0.2 * p + 0.8 * q).exp().sum(-1)) / (0.2 * 0.8),
    "adaptive_kl": adaptive,
    "kl_mixture": lambda p, q: (kl(p, q) + kl(q, p)) / 2,
    "entropy_aware_kl": lambda p, q: kl(q, p) + torch.where(entropy(p) >= 0.8, kl(p, q), 0.0),
    "clipped_forward_kl": lambda p, q: (p.exp() * (p - q)).clamp_max(0.05).sum(-1),
}


def build(name: str) -> Divergence:
    return make_divergence(name, beta=0.3, alpha=0.2)


class Problem:
    """A student and a teacher of different widths, with padded heads of different sizes."""

    def __init__(
        self,
        rows: int = ROWS,
        vocab: int = VOCAB,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        bias: bool = True,
        softcap: float | None = None,
        scale: float = 1.0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.vocab = vocab
        self.hidden = draw(rows, 5).requires_grad_()
        self.weight = draw(vocab + STUDENT_PAD - VOCAB, 5).requires_grad_()
        self.bias = draw(vocab + STUDENT_PAD - VOCAB).requires_grad_() if bias else None
        self.head = Head(self.weight, self.bias, softcap, scale)
        teacher_bias = draw(vocab + TEACHER_PAD - VOCAB) if bias else None
        teacher_head = Head(draw(vocab + TEACHER_PAD - VOCAB, 7), teacher_bias, softcap, scale)
        self.teacher = HiddenRows(draw(rows, 7), teacher_head)
        self.weights = torch.rand(rows, generator=generator, dtype=torch.float64).to(dtype)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.hidden, self.weight] + ([self.bias] if self.bias is not None else [])

    def log_probs(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """log p and log q [rows, vocab] by plain operations."""

        def side(hidden: Tensor, head: Head) -> Tensor:
            logits = hidden @ head.weight[: self.vocab].T
            if head.bias is not None:
                logits = logits + head.bias[: self.vocab]
            logits = logits * head.scale
            if head.softcap is not None:
                logits = head.softcap * (logits / head.softcap).tanh()
            return (logits / temperature).log_softmax(-1)

        return side(self.teacher.hidden[:], self.teacher.head), side(self.hidden, self.head)

    def sparse(self, k: int, by: str = "teacher", temperature: float = 1.0) -> SparseRows:
        """The k likeliest ids of one side, with exact tail."""
        with torch.no_grad():
            log_p, log_q = self.log_probs(temperature)
            ids = (log_p if by == "teacher" else log_q).topk(k).indices
            rest = log_p.scatter(-1, ids, -torch.inf)
            return SparseRows(ids, log_p.gather(-1, ids), rest.logsumexp(-1))

    def loss(self, teacher: Any, divergence: Divergence, **options: Any) -> DivergenceOutput:
        options = {"vocab_size": self.vocab, "weights": self.weights, "chunk_rows": 4, **options}
        return divergence_loss(self.hidden, self.head, teacher, divergence, **options)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.inputs))


def coarsen(log_probs: Tensor, ids: Tensor) -> Tensor:
    """log-probs [rows, k + 1] over the ids and the rest."""
    rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, ids), rest], -1)


def entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)


def assert_same(got: list[Tensor], expected: list[Tensor], rtol: float = 1e-9, atol: float = 1e-12) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def sampled(problem: Problem, seed: int = 0, **options: Any) -> tuple[SampledRows, Tensor, Tensor]:
    """Tokens drawn from the student; log p and log q (with graph) at them."""
    log_p, log_q = problem.log_probs()
    ids = torch.multinomial(log_q.exp().detach(), 1, generator=torch.Generator().manual_seed(seed))
    at_p, at_q = (t.gather(-1, ids)[:, 0] for t in (log_p, log_q))
    return SampledRows(ids[:, 0], at_p, **options), at_p, at_q
