"""The distillation loss from hidden rows, with its gradients, without [N, vocabulary] tensors.

Loss and gradients are made together in the forward pass, a chunk of rows at a time, by four matrix products: student
logits, teacher logits, gradient of the hidden rows, gradient of the head. Nothing is computed twice, and memory
beyond inputs and gradients does not grow with N. What a divergence is, only :mod:`s2w.learner.divergence` knows.

Products run in the dtype of the student's hidden rows. Statistics, and the head's gradient until it is complete, are
float32 (float64 for float64 rows).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from s2w.learner.carriage import carries
from s2w.learner.divergence import LOG_ZERO, Divergence
from s2w.models.logits import float32_product

_CACHE_ELEMENTS = 150_000
"""CPU: elements a thread for which the buffers of an elementwise tile stay in a core's share of the cache; measured
at 49,152 and 151,936 columns on an AMD EPYC with 512 KiB L2 a core."""
_HEAD_BLOCK = 16_384
"""Vocabulary rows of the temporary by which a low-precision product reaches the head's float32 gradient."""


@dataclass(frozen=True)
class Head:
    """An output embedding: ``logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``."""

    weight: Tensor
    """[V, d]; V may include padding."""
    bias: Tensor | None = None
    """[V]; -inf masks a token."""
    softcap: float | None = None
    """``final_logit_softcapping`` of Gemma 2; None is no cap."""
    scale: float = 1.0
    """``logit_scale`` of Cohere, ``1 / logits_scaling`` of Granite."""

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [N, V] (float64 for float64 rows) with float32 products, padding included; without gradient."""
        return self.cut(len(self.weight)).finish(float32_product(hidden, self.weight))[0]

    def cut(self, vocab_size: int) -> Head:
        """The first ``vocab_size`` tokens; log-probs that the bias sets to -inf become ``LOG_ZERO``."""
        bias = None if self.bias is None else self.bias[:vocab_size].clamp_min(LOG_ZERO)
        return Head(self.weight[:vocab_size], bias, self.softcap, self.scale)

    def finish(self, product: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """From ``hidden @ weight.T`` to logits / temperature, and the tanh of the softcap if there is one.

        The logits may be ``product`` itself.
        """
        logits = product.to(_statistics_dtype(product.dtype))
        if self.bias is not None:
            logits = logits + self.bias
        if self.softcap is None:
            factor = self.scale / temperature
            return (logits if factor == 1 else logits * factor), None
        tanh = torch.tanh(logits * (self.scale / self.softcap))
        # The tanh of an infinite logit would pass for a number.
        return torch.where(logits.isfinite(), tanh * (self.softcap / temperature), torch.nan), tanh


class Rows(Protocol):
    """N rows of which a chunk at a time is taken: a tensor [N, d], or what makes them when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class HiddenRows:
    """Signal ``hidden``: the teacher's last hidden rows and its head. Exact."""

    hidden: Rows
    """[N, d_t], any floating dtype."""
    head: Head
    """In the dtype of the student's hidden rows."""

    kind = "hidden"


@dataclass(frozen=True)
class SparseRows:
    """Signals ``topk`` and ``ids``: log-probs at k ids; all other tokens are one bucket.

    The divergence is that of the two coarsened distributions of k + 1 outcomes. The student's tail mass is the sum
    over the tokens outside the ids, not 1 minus the sum over those inside. Log-probs must be the teacher's at the
    temperature of the loss: they cannot be rescaled here.
    """

    ids: Tensor
    """Integers [N, k], no id twice in a row, each below the vocabulary size."""
    log_probs: Tensor
    """[N, k], normalised over the whole vocabulary."""
    log_tail: Tensor
    """[N], log of the teacher's mass outside ids; -inf where there is none."""

    kind = "topk"

    @classmethod
    def certain(cls, ids: Tensor) -> SparseRows:
        """A teacher that is certain of one token a row, ids [N]: the forward KL to it is the token's log-loss."""
        nothing = torch.zeros(len(ids), device=ids.device)
        return cls(ids[:, None], nothing[:, None], nothing - torch.inf)


@dataclass(frozen=True)
class SampledRows:
    """Signal ``sampled``: the log-prob of the token that was sampled; reverse KL by the score function.

    With A_i = log p_i - log q_i at the sampled token, held constant, the gradient is -rho_i A_i d log q_i: its mean
    over tokens drawn from the student is the gradient of KL(q || p). rho_i = q_i / q_sampling corrects for tokens
    drawn from an older student. ``values`` are rho_i (log q_i - log p_i), of mean KL(q || p); one may be negative.
    """

    ids: Tensor
    """Integers [N]."""
    log_probs: Tensor
    """[N], the teacher's, at the temperature of the loss."""
    sampling_log_probs: Tensor | None = None
    """[N], of the policy that sampled, at the temperature of the loss; None where it is the current one (rho = 1)."""
    importance_limit: float | None = None
    """Upper limit of rho (V-trace's rho-bar, arXiv 1802.01561)."""
    discount: float = 0.0
    """gamma > 0 credits a token with what follows: A_i = sum_(j >= i) gamma^(j - i) (log p_j - log q_j)."""
    sequence_ids: Tensor | None = None
    """[N], for ``discount``: rows of one response are adjacent, in order, and share a number."""

    kind = "sampled"

    def __post_init__(self) -> None:
        if self.discount and self.sequence_ids is None:
            raise ValueError("a discount over later tokens needs sequence_ids")

    def importance(self, rows: slice, log_q: Tensor) -> Tensor:
        """rho, [n]."""
        if self.sampling_log_probs is None:
            return torch.ones_like(log_q)
        ratio = (log_q - self.sampling_log_probs[rows]).exp()
        return ratio if self.importance_limit is None else ratio.clamp_max(self.importance_limit)

    def returns(self, rows: slice, rewards: Tensor, following: Tensor | None) -> Tensor:
        """Discounted sums of ``rewards`` [n] over the later rows of the same sequence, [n].

        ``following``: the return of row ``rows.stop``, None at the end.
        """
        if not self.discount or self.sequence_ids is None:
            return rewards
        sequence = self.sequence_ids[rows]
        position = torch.arange(len(rewards), device=rewards.device)
        distance = position[None, :] - position[:, None]
        ahead = (distance >= 0) & (sequence[:, None] == sequence[None, :])
        powers = torch.pow(self.discount, distance.clamp_min(0).to(rewards.dtype))
        returns = torch.where(ahead, powers, 0) @ rewards
        if following is not None:
            same = sequence == self.sequence_ids[rows.stop]
            reach = torch.pow(self.discount, (len(rewards) - position).to(rewards.dtype))
            returns += torch.where(same, reach * following, 0)
        return returns


TeacherRows = HiddenRows | SparseRows | SampledRows


@dataclass(frozen=True)
class PolicyRows:
    """The clipped policy gradient at the sampled token (PPO, arXiv 1707.06347, eq. 7), to be added to a divergence.

    With rho_i = q_i / q_sampling, a row's value is -min(rho_i A_i, clip(rho_i, 1 - low, 1 + high) A_i). Where tokens
    are learned by the policy that sampled them, rho is 1 and the gradient is -A_i d log q_i.
    """

    ids: Tensor
    """Integers [N]: the sampled tokens."""
    advantages: Tensor
    """[N], of the response that each token belongs to."""
    sampling_log_probs: Tensor
    """[N], of the policy that sampled, at the temperature of the loss."""
    weights: Tensor
    """[N], of the rows in the sum."""
    clip: tuple[float, float]
    """low and high."""

    def value(self, rows: slice, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """From the student's log-probs [n] at the tokens: values [n], and their derivatives by -log q [n]."""
        advantages = self.advantages[rows].to(log_q.dtype)
        ratio = (log_q - self.sampling_log_probs[rows].to(log_q.dtype)).exp()
        low, high = self.clip
        free, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
        return -torch.minimum(free, clipped), torch.where(free <= clipped, free, 0)


@dataclass(frozen=True)
class DivergenceOutput:
    """A loss and what was seen on the way; all but ``loss`` are detached, [N], and at the temperature of the loss.

    float32, or float64 for float64 rows. Values and entropies are in nats.
    """

    loss: Tensor
    """Scalar: sum of weight * divergence, times temperature^2 if asked for."""
    values: Tensor
    """The divergence of each row, without weight or temperature^2."""
    student_entropy: Tensor
    teacher_entropy: Tensor
    """With SparseRows that of the coarsened distribution; NaN with SampledRows."""
    agreement: Tensor
    """1 where the teacher's most likely token (with SparseRows, among the ids) is the student's most likely, else 0;
    NaN with SampledRows."""


def divergence_loss(
    hidden: Tensor,
    head: Head,
    teacher: TeacherRows | None,
    divergence: Divergence,
    *,
    vocab_size: int,
    policy: PolicyRows | None = None,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    temperature_squared: bool = True,
    chunk_rows: int = 1024,
) -> DivergenceOutput:
    """Divergence between teacher and student, differentiable by ``hidden``, ``head.weight`` and ``head.bias``.

    Args:
        hidden: [N, d_s] student hidden rows, float32, bfloat16 or float64.
        head: the student's, in the same dtype.
        teacher: what the teacher says about the same N rows; None leaves the divergence out: ``values`` are then
            those of ``policy``, and what needs a teacher is NaN.
        policy: a policy gradient to add, at the same logits: no product is computed twice.
        vocab_size: tokens of the vocabulary; columns of either head at or past it are padding and left out.
        weights: [N] of the rows in the sum, 1 if None. Put constant factors (1 / tokens) here rather than on the
            loss: a gradient of exactly 1 saves a copy of the head's gradient.
        temperature: divides the logits of both sides.
        temperature_squared: multiply the loss by temperature^2 (Hinton et al. 2015, section 2).
        chunk_rows: most rows of the [rows, vocabulary] buffers; changes memory and speed, not the result.

    Raises:
        ValueError: the signal cannot carry the divergence, row counts or vocabulary sizes do not fit, or there is
            neither teacher nor policy.
        TypeError: dtypes that differ, or an unsupported one.
    """
    if teacher is None and policy is None:
        raise ValueError("there is nothing to learn: neither teacher rows nor policy rows")
    if teacher is not None:
        carriage = carries(teacher.kind, divergence.name)
        if carriage.strength == "not possible":
            raise ValueError(f"signal {teacher.kind!r} cannot carry {divergence.name}: {carriage.reason}")
    _check(hidden, head, teacher, policy, vocab_size)
    if weights is None:
        weights = torch.ones(len(hidden), dtype=_statistics_dtype(hidden.dtype), device=hidden.device)
    if temperature_squared:
        weights = weights * temperature**2
    problem = _Problem(teacher, policy, divergence, weights, head, vocab_size, temperature, chunk_rows)
    return DivergenceOutput(*_DivergenceLoss.apply(hidden, head.weight, head.bias, problem, torch.is_grad_enabled()))


@torch.no_grad()
def divergence_values(
    hidden: Tensor,
    head: Head,
    teacher: TeacherRows,
    divergences: Sequence[tuple[str, Divergence]],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_rows: int = 1024,
) -> dict[str, Tensor]:
    """Several divergences, [N] by the given names, from one pass over the logits and without gradient.

    Arguments and errors as of :func:`divergence_loss`; ``teacher`` must be HiddenRows or SparseRows.
    """
    if isinstance(teacher, SampledRows):
        raise ValueError("sampled tokens hold no distribution to evaluate a divergence on")
    _check(hidden, head, teacher, None, vocab_size)
    dtype = _statistics_dtype(hidden.dtype)
    out = {name: torch.empty(len(hidden), dtype=dtype, device=hidden.device) for name, _ in divergences}
    step = _step(_value_rows, hidden)
    for chunk in _chunks(hidden, head, teacher, vocab_size, chunk_rows):
        for tile in chunk.tiles():
            values = step(chunk.student, chunk.teacher, *chunk.at(tile), [d for _, d in divergences], temperature)
            for (name, _), value in zip(divergences, values, strict=True):
                out[name][chunk.rows][tile] = value
    return out


@dataclass(frozen=True)
class _Problem:
    """What the loss needs beside the tensors that have gradients."""

    teacher: TeacherRows | None
    policy: PolicyRows | None
    divergence: Divergence
    weights: Tensor
    head: Head
    vocab_size: int
    temperature: float
    chunk_rows: int


class _DivergenceLoss(torch.autograd.Function):
    """Loss and per-row statistics; the gradients are made in forward, and backward only scales them."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: _Problem, grad_enabled: bool
    ) -> tuple[Tensor, ...]:
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        head = Head(weight, bias, problem.head.softcap, problem.head.scale)
        loss, statistics, gradients = _solve(hidden, head, problem, needs)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return loss, *statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_loss is None:
            return None, None, None, None, None
        # Returned as they are they need no copy: autograd keeps them if the graph is freed, and copies them if not.
        unit = bool(grad_loss == 1)
        scaled = [g if g is None or unit else g * grad_loss for g in ctx.saved_tensors]
        return *scaled, None, None


def _solve(
    hidden: Tensor, head: Head, problem: _Problem, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Loss, [values, student entropy, teacher entropy, agreement], gradients by hidden rows, weight and bias."""
    teacher, policy, vocab_size = problem.teacher, problem.policy, problem.vocab_size
    dtype = _statistics_dtype(hidden.dtype)
    statistics = [torch.full((len(hidden),), torch.nan, dtype=dtype, device=hidden.device) for _ in range(4)]
    values = statistics[0]
    policy_values = torch.empty_like(values) if policy is not None else None
    weights = problem.weights.to(dtype)
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    grad_weight = torch.zeros_like(head.weight, dtype=dtype) if needs[1] else None
    grad_bias = torch.zeros_like(head.bias, dtype=dtype) if needs[2] and head.bias is not None else None
    factor = head.scale / problem.temperature  # d logits / d product, but for the softcap
    following: Tensor | None = None

    sampled = isinstance(teacher, SampledRows)
    step = _step(_sampled_rows if sampled else _divergence_rows, hidden)
    policy_step = _step(_sampled_rows, hidden)
    for chunk in _chunks(hidden, head, teacher, vocab_size, problem.chunk_rows):
        rows = chunk.rows
        gradient = _gradient_buffer(chunk.product, hidden.dtype) if any(needs) else None
        # Row factors go to the narrow side of the products, [rows, d], not to [rows, V]. Only a sum of two terms
        # has to carry them on the wide side.
        row_factor = weights[rows] * factor
        for tile in chunk.tiles():
            policy_grad: Tensor | None = None
            if policy is not None and policy_values is not None:
                at = slice(rows.start + tile.start, rows.start + tile.stop)
                log_q, entropy, *_, policy_grad = policy_step(
                    chunk.student,
                    None,
                    chunk.product[tile],
                    (policy.ids[at].long(),),
                    problem.divergence,
                    problem.temperature,
                    # With sampled rows it is a multiple of their own gradient, made below.
                    any(needs) and not sampled,
                )
                policy_values[at], slope = policy.value(at, log_q)
                if policy_grad is not None:
                    policy_grad.mul_((slope * policy.weights[at].to(dtype))[:, None])
                if teacher is None:
                    statistics[1][at] = entropy
                    if gradient is not None and policy_grad is not None:
                        gradient[tile] = policy_grad
                    continue
            *seen, grad = step(
                chunk.student, chunk.teacher, *chunk.at(tile), problem.divergence, problem.temperature, any(needs)
            )
            for statistic, tile_statistic in zip(statistics, seen, strict=True):
                statistic[rows][tile] = tile_statistic
            if gradient is not None:
                if policy_grad is not None:
                    grad = policy_grad.add_(grad * weights[rows][tile, None])
                gradient[tile] = grad

        if isinstance(teacher, SampledRows):
            log_q = values[rows]
            rewards = teacher.log_probs[rows].to(dtype) - log_q
            importance = teacher.importance(rows, log_q)
            returns = teacher.returns(rows, rewards, following)
            following = returns[0]
            row_factor = row_factor * importance * returns
            if policy is not None:
                # Both gradients are multiples of that of -log q at the same token.
                row_factor += factor * policy.weights[rows].to(dtype) * policy.value(rows, log_q)[1]
            values[rows] = -importance * rewards
        elif policy is not None:
            row_factor = torch.full_like(row_factor, factor)
        if gradient is None:
            continue
        if grad_hidden is not None:
            product = torch.mm(gradient, chunk.student.weight)
            # Factors in low precision would change a row's weight by up to 0.4%.
            torch.mul(product, row_factor[:, None], out=grad_hidden[rows])
        if grad_weight is not None:
            narrow = (hidden[rows] * row_factor[:, None]).to(hidden.dtype)
            _add_product(grad_weight[:vocab_size], gradient.T, narrow)
        if grad_bias is not None:
            grad_bias[:vocab_size] += gradient.T.to(dtype) @ row_factor
    loss = torch.zeros((), dtype=dtype, device=hidden.device)
    if policy is not None and policy_values is not None:
        loss += torch.dot(policy.weights.to(dtype), policy_values)
    if teacher is not None:
        loss += torch.dot(weights, values)
    elif policy_values is not None:
        statistics[0] = policy_values
    if grad_weight is not None:
        grad_weight = grad_weight.to(head.weight.dtype)
    if grad_bias is not None and head.bias is not None:
        grad_bias = grad_bias.to(head.bias.dtype)
    return loss, statistics, [grad_hidden, grad_weight, grad_bias]


@dataclass(frozen=True)
class _Chunk:
    """Rows of one set of matrix products."""

    rows: slice
    product: Tensor
    """[n, vocab_size] student hidden rows times head, before bias, scale and softcap."""
    columns: tuple[Tensor, ...]
    """[n, ...] what the teacher says, by kind of signal; for HiddenRows its own product."""
    student: Head
    teacher: Head | None
    """Both cut to vocab_size."""

    def tiles(self) -> Iterator[slice]:
        """Rows of the elementwise work: all of them on GPU, what fits the caches on CPU."""
        n, columns = self.product.shape
        size = n if self.product.is_cuda else torch.get_num_threads() * max(1, _CACHE_ELEMENTS // columns)
        return (slice(start, min(start + size, n)) for start in range(0, n, size))

    def at(self, tile: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.product[tile], tuple(column[tile] for column in self.columns)


def _chunks(
    hidden: Tensor, head: Head, teacher: TeacherRows | None, vocab_size: int, chunk_rows: int
) -> Iterator[_Chunk]:
    """The chunks from the last to the first, so that a discounted return is complete when its row comes. A chunk is
    valid until the next one is taken: they share buffers.
    """
    total = len(hidden)
    if total == 0:
        return
    size = math.ceil(total / math.ceil(total / chunk_rows))  # chunks of equal size: a short one is a slow product
    # Low precision on CPU has no product with float32 output.
    low = not hidden.is_cuda and hidden.dtype == torch.bfloat16
    dtype = hidden.dtype if low else _statistics_dtype(hidden.dtype)
    student = head.cut(vocab_size)
    buffer = hidden.new_empty(size, vocab_size, dtype=dtype)
    teacher_head = teacher.head.cut(vocab_size) if isinstance(teacher, HiddenRows) else None
    teacher_buffer = torch.empty_like(buffer) if teacher_head is not None else None
    for start in reversed(range(0, total, size)):
        rows = slice(start, min(start + size, total))
        product = _product(hidden[rows], student.weight.T, buffer[: rows.stop - start])
        columns: tuple[Tensor, ...]
        if isinstance(teacher, HiddenRows):
            assert teacher_head is not None and teacher_buffer is not None
            teacher_hidden = teacher.hidden[rows].to(hidden.dtype)
            columns = (_product(teacher_hidden, teacher_head.weight.T, teacher_buffer[: rows.stop - start]),)
        elif isinstance(teacher, SparseRows):
            columns = (teacher.ids[rows].long(), teacher.log_probs[rows], teacher.log_tail[rows])
        else:
            columns = () if teacher is None else (teacher.ids[rows].long(),)
        yield _Chunk(rows, product, columns, student, teacher_head)


@dataclass(frozen=True)
class _Pair:
    """Teacher and student over the same outcomes: the vocabulary, or k ids and the rest."""

    log_p: Tensor
    log_q: Tensor
    p: Tensor
    q: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    tanh: Tensor | None
    """Of the student's softcap."""
    ids: Tensor | None = None
    rest: Tensor | None = None
    """[n, V]: the student's distribution over the tokens outside ``ids``; of no meaning at ids."""

    def logit_gradient(self, grad: Tensor) -> Tensor:
        """From df / d log q to dD / d (uncapped logits), [n, V]; overwrites ``grad``."""
        grad.addcmul_(self.q, grad.sum(-1, keepdim=True), value=-1)
        if self.rest is not None and self.ids is not None:
            grad = (self.rest * grad[:, -1:]).scatter_(-1, self.ids, grad[:, :-1])
        return grad if self.tanh is None else grad.mul_(1 - self.tanh.square())


def _divergence_rows(
    student: Head,
    teacher: Head | None,
    product: Tensor,
    columns: tuple[Tensor, ...],
    divergence: Divergence,
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor | None, ...]:
    """values, student entropy, teacher entropy, agreement [n] and dD / d (uncapped logits) [n, V]."""
    pair = _pair(student, teacher, product, columns, temperature)
    value, grad = divergence.terms(pair.log_p, pair.log_q, pair.p, pair.q)
    seen = value.sum(-1), pair.student_entropy, pair.teacher_entropy, pair.agreement
    return *seen, pair.logit_gradient(grad) if with_gradient else None


def _value_rows(
    student: Head,
    teacher: Head | None,
    product: Tensor,
    columns: tuple[Tensor, ...],
    divergences: Sequence[Divergence],
    temperature: float,
) -> list[Tensor]:
    """[n] of each divergence."""
    pair = _pair(student, teacher, product, columns, temperature)
    return [divergence.terms(pair.log_p, pair.log_q, pair.p, pair.q)[0].sum(-1) for divergence in divergences]


def _sampled_rows(
    student: Head,
    teacher: None,
    product: Tensor,
    columns: tuple[Tensor, ...],
    divergence: Divergence,
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor | None, ...]:
    """As :func:`_divergence_rows`, with log q of the sampled token for values, and the gradient of -log q."""
    (ids,) = columns
    logits, tanh = student.finish(product, temperature)
    log_q, q, _ = _log_softmax(logits)
    chosen = log_q.gather(-1, ids[:, None])[:, 0]
    unknown = torch.full_like(chosen, torch.nan)
    seen = chosen, _entropy(log_q, q), unknown, unknown
    if not with_gradient:
        return *seen, None
    grad = q.scatter_add_(-1, ids[:, None], q.new_full((len(ids), 1), -1.0))
    return *seen, grad if tanh is None else grad.mul_(1 - tanh.square())


def _pair(
    student: Head, teacher: Head | None, product: Tensor, columns: tuple[Tensor, ...], temperature: float
) -> _Pair:
    student_logits, tanh = student.finish(product, temperature)
    if teacher is not None:
        teacher_logits, _ = teacher.finish(columns[0], temperature)
        teacher_top, student_top = (x.amax(-1, keepdim=True) for x in (teacher_logits, student_logits))
        # The sum of both reaches the sum of their tops only where both have theirs: argmax takes ten times as long.
        agreement = (teacher_logits + student_logits).amax(-1) >= (teacher_top + student_top)[:, 0]
        log_p, p, _ = _log_softmax(teacher_logits, teacher_top)
        log_q, q, _ = _log_softmax(student_logits, student_top)
        entropies = _entropy(log_q, q), _entropy(log_p, p)
        return _Pair(log_p, log_q, p, q, *entropies, agreement.to(p.dtype), tanh)

    ids, log_probs, log_tail = columns
    chosen = student_logits.gather(-1, ids)
    best = chosen.gather(-1, log_probs.argmax(-1, keepdim=True))[:, 0]
    agreement = best >= student_logits.amax(-1)
    log_rest, rest, rest_total = _log_softmax(student_logits.scatter(-1, ids, LOG_ZERO))
    total = torch.logaddexp(chosen.logsumexp(-1, keepdim=True), rest_total)
    log_q = torch.cat([chosen, rest_total], -1).sub_(total)
    log_p = torch.cat([log_probs, log_tail[:, None]], -1).to(log_q.dtype).clamp_min_(LOG_ZERO)
    p, q = log_p.exp(), log_q.exp()
    # Chain rule of entropy: that of the k + 1 outcomes, and that inside the last one.
    student_entropy = _entropy(log_q, q) + q[:, -1] * _entropy(log_rest, rest)
    return _Pair(log_p, log_q, p, q, student_entropy, _entropy(log_p, p), agreement.to(p.dtype), tanh, ids, rest)


def _log_softmax(logits: Tensor, top: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs, probabilities and log-sum-exp [..., 1], for one pass of exp; ``top``: the largest logits [..., 1]."""
    if top is None:
        top = logits.amax(-1, keepdim=True)
    log_probs = logits - top
    probs = log_probs.exp()
    total = probs.sum(-1, keepdim=True)
    log_total = total.log()
    return log_probs.sub_(log_total), probs.div_(total), log_total + top


def _entropy(log_probs: Tensor, probs: Tensor) -> Tensor:
    return (probs * log_probs).sum(-1).neg_()


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b`` into ``out``, which on CUDA may be float32 where a and b are bfloat16."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)  # type: ignore[call-overload]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``; total may be of higher precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    for start in range(0, len(total), _HEAD_BLOCK):
        block = slice(start, start + _HEAD_BLOCK)
        if a.is_cuda:
            total[block] += torch.mm(a[block], b, out_dtype=total.dtype)  # type: ignore[call-overload]
        else:
            total[block] += torch.mm(a[block], b)


def _gradient_buffer(product: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, V]: the product's own memory where the dtype allows; a tile of it is read before it is written."""
    return product if product.dtype == dtype else torch.empty_like(product, dtype=dtype)


@functools.cache
def _compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(step, dynamic=True)


def _step(step: Callable[..., Any], hidden: Tensor) -> Callable[..., Any]:
    """On CUDA the elementwise work of a chunk is fused into one pass; on CPU tiles in cache do as well, and need no
    compiler."""
    return _compiled(step) if hidden.is_cuda else step


def _check(hidden: Tensor, head: Head, teacher: TeacherRows | None, policy: PolicyRows | None, vocab_size: int) -> None:
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise TypeError(f"hidden rows are float32, bfloat16 or float64, not {hidden.dtype}")
    heads = {"student": head}
    if isinstance(teacher, HiddenRows):
        heads["teacher"] = teacher.head
    for side, one in heads.items():
        if one.weight.dtype != hidden.dtype:
            raise TypeError(f"the {side}'s head is {one.weight.dtype}, the student's hidden rows are {hidden.dtype}")
        if len(one.weight) < vocab_size:
            raise ValueError(f"the {side}'s head has {len(one.weight)} rows for a vocabulary of {vocab_size}")
    counts = {}
    if teacher is not None:
        counts["teacher"] = len(teacher.hidden if isinstance(teacher, HiddenRows) else teacher.ids)
    if policy is not None:
        counts["policy"] = len(policy.ids)
    for side, rows in counts.items():
        if rows != len(hidden):
            raise ValueError(f"{rows} {side} rows for {len(hidden)} student rows")
