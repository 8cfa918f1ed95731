"""Divergences between a teacher p and a student q over the vocabulary, with their derivatives.

A divergence is ``D(p, q) = sum_v f(log p_v, log q_v)``, in nats. :meth:`Divergence.terms` gives ``f`` and
``df / d log q`` per token of the vocabulary; the kernel (:mod:`s2w.objectives.kernel`) turns the second into the
gradient w.r.t. the student's logits, ``g_v - q_v * sum_u g_u``, and knows nothing else of the divergence.

To add one: a frozen dataclass with ``terms``, decorated with ``@register("its_name")``, a case in
tests/unit/objectives/test_divergences.py, and ``make docs``. A parameter is a field of the dataclass: ``beta`` and
``alpha`` are set from the settings of those names in ``loss``, any other one from ``loss.options``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from s2w.config.documentation import summary
from s2w.config.schema import LossConfig
from s2w.errors import did_you_mean
from s2w.models.logits import LOG_ZERO


class Divergence(ABC):
    """A divergence D(p, q); instances are immutable and hold only their parameters."""

    name: ClassVar[str]
    is_f_divergence: ClassVar[bool] = True
    """``f = q * phi(p / q)`` with phi convex: merging tokens into one bucket can then only lower D (data
    processing inequality; Csiszár 1967)."""

    @abstractmethod
    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """f and df / d log q, elementwise.

        Args:
            log_p: [..., V] teacher log-probs, at least ``LOG_ZERO``.
            log_q: [..., V] student log-probs, at least ``LOG_ZERO``.
            p, q: their exponentials, which the caller already has.

        Returns:
            Two new tensors of the same shape and dtype, which the caller may overwrite. The arguments are left as
            they are.
        """

    def __call__(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`terms` from log-probs alone; they may be -inf."""
        log_p, log_q = log_p.clamp_min(LOG_ZERO), log_q.clamp_min(LOG_ZERO)
        return self.terms(log_p, log_q, log_p.exp(), log_q.exp())


DIVERGENCES: dict[str, type[Divergence]] = {}
"""Every divergence by name."""

OF_LOSS = ("alpha", "beta")
"""Parameters that are settings of ``loss``; all others are set by ``loss.options``."""

D = TypeVar("D", bound=type[Divergence])


def register(name: str) -> Callable[[D], D]:
    """Class decorator: makes a divergence available under ``name``."""

    def add(cls: D) -> D:
        cls.name = name
        DIVERGENCES[name] = cls
        return cls

    return add


def make_divergence(name: str, **parameters: Any) -> Divergence:
    """The divergence called ``name``, with those of the ``parameters`` that it has.

    Raises:
        ValueError: no such divergence, or a parameter outside its range.
    """
    if name not in DIVERGENCES:
        hint = did_you_mean(name, DIVERGENCES) or ":"
        raise ValueError(f"unknown divergence {name!r}{hint} known are {', '.join(DIVERGENCES)}")
    cls = DIVERGENCES[name]
    return cls(**{key: value for key, value in parameters.items() if key in parameters_of(cls)})


def divergence_of(loss: LossConfig) -> Divergence:
    """The divergence of a section ``loss``; errors as in :func:`make_divergence`."""
    return make_divergence(loss.divergence, **{name: getattr(loss, name) for name in OF_LOSS} | loss.options)


def parameters_of(cls: type[Divergence]) -> set[str]:
    """Names of a divergence's parameters."""
    return {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def help_text() -> str:
    """Every divergence with its parameters, as ``s2w train --help`` lists them."""
    lines = ["Divergences (loss.divergence=NAME):"]
    for name, cls in DIVERGENCES.items():
        defaults = ", ".join(f"{key}={value}" for key, value in dataclasses.asdict(cls()).items())  # type: ignore[call-overload]
        lines.append(f"  {name}" + (f"  ({defaults})" if defaults else ""))
        lines += [f"      {line}" for line in summary(cls).splitlines()]
    return "\n".join(lines) + "\n"


def _require(holds: bool, what: str, value: float) -> None:
    if not holds:
        raise ValueError(f"{what}, got {value}")


def _mixture(p: Tensor, q: Tensor, weight_of_p: float) -> Tensor:
    """m = w p + (1 - w) q, never 0, so that its log and 1 / m are finite where p = q = 0."""
    m = torch.mul(p, weight_of_p).add_(q, alpha=1 - weight_of_p)
    return m.clamp_min_(torch.finfo(m.dtype).tiny)


@register("forward_kl")
@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p || q) = sum p (log p - log q). Mean-seeking: the student covers what the teacher does."""

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return (log_p - log_q).mul_(p), p.neg()


@register("reverse_kl")
@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p) = sum q (log q - log p). Mode-seeking: the student avoids what the teacher would not do."""

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        value = (log_q - log_p).mul_(q)
        return value, value + q


@register("jsd")
@dataclass(frozen=True)
class GeneralisedJSD(Divergence):
    """JSD_beta = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, eq. 1).

    It vanishes with beta and with 1 - beta: JSD_beta / beta tends to KL(p || q) for beta -> 0, and
    JSD_beta / (1 - beta) to KL(q || p) for beta -> 1. At exactly 0 and 1 these limits are returned, as GKD and TRL
    do, so the scale jumps there: a beta close to 0 or 1 wants a higher learning rate than beta = 0 or 1.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        _require(0 <= self.beta <= 1, "jsd needs 0 <= beta <= 1", self.beta)

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        if self.beta == 0:
            return ForwardKL().terms(log_p, log_q, p, q)
        if self.beta == 1:
            return ReverseKL().terms(log_p, log_q, p, q)
        log_m = _mixture(p, q, self.beta).log_()
        grad = (log_q - log_m).mul_(q).mul_(1 - self.beta)
        return (log_p - log_m).mul_(p).mul_(self.beta).add_(grad), grad


@register("skew_forward_kl")
@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898): forward KL with a bounded gradient."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _require(0 <= self.alpha < 1, "skew_forward_kl needs 0 <= alpha < 1", self.alpha)

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        m = _mixture(p, q, self.alpha)
        value = (log_p - m.log()).mul_(p)
        return value, torch.div(q, m).mul_(p).mul_(self.alpha - 1)


@register("skew_reverse_kl")
@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM, arXiv 2402.03898): reverse KL that stays finite where p = 0."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _require(0 <= self.alpha < 1, "skew_reverse_kl needs 0 <= alpha < 1", self.alpha)

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        m = _mixture(p, q, 1 - self.alpha)
        value = (log_q - m.log()).mul_(q)
        # q (log q - log m + 1 - alpha q / m)
        grad = torch.div(q, m).mul_(-self.alpha).add_(1).mul_(q).add_(value)
        return value, grad


@register("tvd")
@dataclass(frozen=True)
class TotalVariation(Divergence):
    """Total variation distance, sum |p - q| / 2, in [0, 1]; its subgradient is 0 where p = q."""

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        gap = q - p
        return gap.abs().mul_(0.5), gap.sign_().mul_(q).mul_(0.5)


@register("alpha_divergence")
@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """(1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha)) (Amari; Cichocki and Amari 2010, eq. 44).

    alpha -> 1 is KL(p || q), alpha -> 0 is KL(q || p) and alpha = 1/2 is four times the squared Hellinger distance.
    The terms are alpha p + (1 - alpha) q - p^alpha q^(1 - alpha), which sum to the same and are never negative.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _require(0 <= self.alpha <= 1, "alpha_divergence needs 0 <= alpha <= 1", self.alpha)

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        if self.alpha == 0:
            return ReverseKL().terms(log_p, log_q, p, q)
        if self.alpha == 1:
            return ForwardKL().terms(log_p, log_q, p, q)
        power = (log_p - log_q).mul_(self.alpha).add_(log_q).exp_()
        value = torch.mul(p, self.alpha).add_(q, alpha=1 - self.alpha).sub_(power)
        return value.div_(self.alpha * (1 - self.alpha)), torch.sub(q, power).div_(self.alpha)


@register("adaptive_kl")
@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """w KL(p || q) + (1 - w) KL(q || p), w per token from where the student is wrong (AKL, arXiv 2404.02657).

    The head is the smallest set of the teacher's most likely tokens with ``head_mass`` or more; w is the share of
    sum |p - q| that lies in the head, held constant in the gradient. Not an f-divergence: w couples the tokens.
    """

    is_f_divergence: ClassVar[bool] = False
    head_mass: float = 0.5

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        w = self.forward_weight(p, q)
        forward, forward_grad = ForwardKL().terms(log_p, log_q, p, q)
        reverse, reverse_grad = ReverseKL().terms(log_p, log_q, p, q)
        return torch.lerp(reverse, forward, w), torch.lerp(reverse_grad, forward_grad, w)

    def forward_weight(self, p: Tensor, q: Tensor) -> Tensor:
        """w, [..., 1]; 1/2 where p = q."""
        # This head is short in language models: sorting the whole vocabulary is the rare case.
        top = p.topk(min(256, p.shape[-1])).values
        if not bool((top.sum(-1) >= self.head_mass).all()):
            top = p.sort(descending=True).values
        before = top.cumsum(-1) - top
        smallest = top.masked_fill(before >= self.head_mass, torch.inf).amin(-1, keepdim=True)
        gap = (p - q).abs_()
        total = gap.sum(-1, keepdim=True)
        head = gap.masked_fill_(p < smallest, 0).sum(-1, keepdim=True)
        return torch.where(total > 0, head / total, 0.5)


@register("kl_mixture")
@dataclass(frozen=True)
class KLMixture(Divergence):
    """w KL(p || q) + (1 - w) KL(q || p), w = ``forward_weight`` (arXiv 2605.16826, which calls 1 - w lambda).

    That paper finds that a large w keeps long responses from growing and entropy from collapsing at no cost in
    accuracy, and that w = 1/2 is not enough; NeMo-RL's default is 0.5.
    """

    forward_weight: float = 0.5

    def __post_init__(self) -> None:
        _require(0 <= self.forward_weight <= 1, "kl_mixture needs 0 <= forward_weight <= 1", self.forward_weight)

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        w = self.forward_weight
        gap = log_p - log_q
        grad = torch.mul(gap, w - 1).add_(1 - w).mul_(q).sub_(p, alpha=w)
        return torch.mul(p, w).sub_(q, alpha=1 - w).mul_(gap), grad


@register("entropy_aware_kl")
@dataclass(frozen=True)
class EntropyAwareKL(Divergence):
    """KL(q || p), plus ``forward_weight`` KL(p || q) where the teacher's entropy is at least ``threshold`` nats.

    EOPD (arXiv 2603.07079): where the teacher sees several ways to go on, reverse KL alone lets the student forget all
    but one. The paper's values are the defaults; it takes the reverse KL by policy gradient at the sampled token and
    the forward KL over the teacher's 16 most likely tokens; both are exact here. The entropy is held constant in the
    gradient, and couples the tokens: not an f-divergence.
    """

    is_f_divergence: ClassVar[bool] = False
    threshold: float = 0.8
    forward_weight: float = 1.0

    def __post_init__(self) -> None:
        _require(self.threshold >= 0, "entropy_aware_kl needs threshold >= 0", self.threshold)
        _require(self.forward_weight >= 0, "entropy_aware_kl needs forward_weight >= 0", self.forward_weight)

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        entropy = (p * log_p).sum(-1, keepdim=True).neg_()
        w = (entropy >= self.threshold).to(p.dtype) * self.forward_weight
        forward, forward_grad = ForwardKL().terms(log_p, log_q, p, q)
        reverse, reverse_grad = ReverseKL().terms(log_p, log_q, p, q)
        return reverse.add_(forward.mul_(w)), reverse_grad.add_(forward_grad.mul_(w))


@register("clipped_forward_kl")
@dataclass(frozen=True)
class ClippedForwardKL(Divergence):
    """sum_v min(p_v (log p_v - log q_v), ``clip``): forward KL in which no token of the vocabulary counts for more.

    OPSD (arXiv 2601.18734), for a teacher that has been shown the answer: a few tokens of style would make up most of
    the KL. Its clip of 0.05 is the default. No gradient where the clip is reached. Only terms above
    0 can be cut, so the sum may be negative; not an f-divergence, since merging tokens may merge clipped ones.
    """

    is_f_divergence: ClassVar[bool] = False
    clip: float = 0.05

    def __post_init__(self) -> None:
        _require(self.clip > 0, "clipped_forward_kl needs clip > 0", self.clip)

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        value = (log_p - log_q).mul_(p)
        return value.clamp_max(self.clip), (p * (value < self.clip)).neg_()
