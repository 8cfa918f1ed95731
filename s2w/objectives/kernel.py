"""The distillation loss from hidden states, with its gradients, without [N, vocabulary] tensors.

Loss and gradients are computed together in the forward pass, a chunk of rows at a time, by four matrix products:
student logits, teacher logits, gradient of the hidden states, gradient of the head. Nothing is computed twice, and
memory beyond inputs and gradients does not grow with N. Only :mod:`s2w.objectives.divergences` knows the divergences.

Products run in the dtype of the student's hidden states. Statistics, and the head's gradient until it is complete, are
float32 (float64 for float64 hidden states).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from s2w.models.head import Head
from s2w.models.logits import LOG_ZERO, statistics_dtype
from s2w.objectives.divergences import Divergence
from s2w.objectives.support import signal_support

_CACHE_ELEMENTS = 150_000
"""CPU: elements per thread for which the buffers of an elementwise tile stay in a core's share of the cache; measured
at 49,152 and 151,936 columns on an AMD EPYC with 512 KiB L2 per core."""
_HEAD_BLOCK = 16_384
"""Vocabulary rows of the temporary through which a low-precision product is added to the head's float32 gradient."""


class Rows(Protocol):
    """N rows, taken a chunk at a time: a tensor [N, d], or an object that makes them on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class HiddenRows:
    """Signal ``hidden``: the teacher's last hidden states and its head. Exact."""

    hidden: Rows
    """[N, d_t], any floating dtype."""
    head: Head
    """In the dtype of the student's hidden states."""

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
        """A teacher that is certain of one token per row, ids [N]: the forward KL to it is the token's NLL."""
        nothing = torch.zeros(len(ids), device=ids.device)
        return cls(ids[:, None], nothing[:, None], nothing - torch.inf)


@dataclass(frozen=True)
class SampledRows:
    """Signal ``sampled``: the log-prob of the token that was sampled; reverse KL by the score function.

    With A_i = log p_i - log q_i at the sampled token, held constant, the gradient is -rho_i A_i d log q_i: its mean
    over tokens drawn from the student is the gradient of KL(q || p). rho_i = q_i / q_sampling corrects for tokens
    drawn from an older student. ``values`` are rho_i (log q_i - log p_i), with mean KL(q || p); one may be negative.
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

    With rho_i = q_i / q_sampling, a row's value is -min(rho_i A_i, clip(rho_i, 1 - low, 1 + high) A_i). Where the
    policy that sampled the tokens is trained on them, rho is 1 and the gradient is -A_i d log q_i.
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
        """From the student's log-probs [n] at the tokens: values [n], and their derivatives w.r.t. -log q [n]."""
        advantages = self.advantages[rows].to(log_q.dtype)
        ratio = (log_q - self.sampling_log_probs[rows].to(log_q.dtype)).exp()
        low, high = self.clip
        free, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
        return -torch.minimum(free, clipped), torch.where(free <= clipped, free, 0)


@dataclass(frozen=True)
class DivergenceOutput:
    """A loss and statistics; all but ``loss`` are detached, [N], and at the temperature of the loss.

    float32, or float64 for float64 hidden states. Values and entropies are in nats.
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
    """Divergence between teacher and student, differentiable w.r.t. ``hidden``, ``head.weight`` and ``head.bias``.

    Args:
        hidden: [N, d_s] student hidden states, float32, bfloat16 or float64.
        head: the student's, in the same dtype.
        teacher: the teacher's signal at the same N rows; None leaves the divergence out: ``values`` are then
            those of ``policy``, and what needs a teacher is NaN.
        policy: a policy gradient to add, at the same logits: no product is computed twice.
        vocab_size: tokens of the vocabulary; columns of either head at or past it are padding and left out.
        weights: [N] of the rows in the sum, 1 if None. Put constant factors (1 / tokens) here rather than on the
            loss: a gradient of exactly 1 saves a copy of the head's gradient.
        temperature: divides the logits of both sides.
        temperature_squared: multiply the loss by temperature^2 (Hinton et al. 2015, section 2).
        chunk_rows: most rows of the [rows, vocabulary] buffers; changes memory and speed, not the result.

    Raises:
        ValueError: the signal does not support the divergence, row counts or vocabulary sizes do not fit, or there is
            neither teacher nor policy.
        TypeError: dtypes that differ, or an unsupported one.
    """
    if teacher is None and policy is None:
        raise ValueError("there is nothing to train on: neither teacher rows nor policy rows")
    if teacher is not None:
        support = signal_support(teacher.kind, divergence.name)
        if support.strength == "not possible":
            raise ValueError(f"signal {teacher.kind!r} does not support {divergence.name}: {support.reason}")
    _check(hidden, head, teacher, policy, vocab_size)
    if weights is None:
        weights = torch.ones(len(hidden), dtype=statistics_dtype(hidden.dtype), device=hidden.device)
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

    Arguments and errors as in :func:`divergence_loss`; ``teacher`` must be HiddenRows or SparseRows.
    """
    if isinstance(teacher, SampledRows):
        raise ValueError("sampled tokens hold no distribution to evaluate a divergence on")
    _check(hidden, head, teacher, None, vocab_size)
    dtype = statistics_dtype(hidden.dtype)
    out = {name: torch.empty(len(hidden), dtype=dtype, device=hidden.device) for name, _ in divergences}
    step = _step(_value_rows, hidden)
    for chunk in _chunks(hidden, head, teacher, vocab_size, chunk_rows):
        for tile in chunk.tiles():
            values = step(
                chunk.student, chunk.teacher, chunk.product[tile], chunk.columns_at(tile),
                [d for _, d in divergences], temperature,
            )  # fmt: skip
            for (name, _), value in zip(divergences, values, strict=True):
                out[name][chunk.rows][tile] = value
    return out


@dataclass(frozen=True)
class _Problem:
    """What the loss needs besides the tensors that have gradients."""

    teacher: TeacherRows | None
    policy: PolicyRows | None
    divergence: Divergence
    weights: Tensor
    head: Head
    vocab_size: int
    temperature: float
    chunk_rows: int


class _DivergenceLoss(torch.autograd.Function):
    """Loss and per-row statistics; the gradients are computed in forward, and backward only scales them."""

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
        # Returned unchanged, they need no copy: autograd keeps them if the graph is freed, and copies them if not.
        unit = bool(grad_loss == 1)
        scaled = [g if g is None or unit else g * grad_loss for g in ctx.saved_tensors]
        return *scaled, None, None


def _solve(
    hidden: Tensor, head: Head, problem: _Problem, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Loss, the statistics of :class:`_Seen`, gradients w.r.t. hidden states, weight and bias."""
    teacher, policy = problem.teacher, problem.policy
    seen = _Seen.of(hidden)
    gradients = _Gradients(hidden, head, needs, problem.temperature)
    kind = _Distributions if isinstance(teacher, HiddenRows | SparseRows) else _SampledTokens
    loss_of = kind(problem, seen, hidden)
    for chunk in _chunks(hidden, head, teacher, problem.vocab_size, problem.chunk_rows):
        by_logits = _gradient_buffer(chunk.product, hidden.dtype) if any(needs) else None
        factors = loss_of.chunk(chunk, by_logits)
        if by_logits is not None:
            gradients.add(chunk, by_logits, factors)
    loss = torch.zeros((), dtype=seen.values.dtype, device=hidden.device)
    if policy is not None:
        loss += torch.dot(policy.weights.to(loss.dtype), seen.policy_values)
    if teacher is not None:
        loss += torch.dot(problem.weights.to(loss.dtype), seen.values)
    else:
        seen.values = seen.policy_values
    return loss, seen.statistics, gradients.finish(head)


@dataclass
class _Seen:
    """What is known of each row at the end, [N]; NaN where a signal does not say."""

    values: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    policy_values: Tensor

    @classmethod
    def of(cls, hidden: Tensor) -> _Seen:
        dtype = statistics_dtype(hidden.dtype)
        return cls(*(torch.full((len(hidden),), torch.nan, dtype=dtype, device=hidden.device) for _ in range(5)))

    @property
    def statistics(self) -> list[Tensor]:
        """Values, student entropy, teacher entropy, agreement."""
        return [self.values, self.student_entropy, self.teacher_entropy, self.agreement]


class _Gradients:
    """Sums of the gradients w.r.t. hidden states, weight and bias, from those w.r.t. the logits of a chunk."""

    def __init__(self, hidden: Tensor, head: Head, needs: Sequence[bool], temperature: float) -> None:
        self.hidden, self.dtype = hidden, statistics_dtype(hidden.dtype)
        self.scale = head.scale / temperature  # d logits / d product, apart from the softcap
        self.of_hidden = torch.empty_like(hidden) if needs[0] else None
        self.of_weight = torch.zeros_like(head.weight, dtype=self.dtype) if needs[1] else None
        self.of_bias = torch.zeros_like(head.bias, dtype=self.dtype) if needs[2] and head.bias is not None else None

    def add(self, chunk: _Chunk, by_logits: Tensor, factors: Tensor) -> None:
        """Adds ``factors`` [n] times ``by_logits`` [n, V].

        The factors go to the narrow side of the products, [n, d].
        """
        factors = factors * self.scale
        if self.of_hidden is not None:
            product = torch.mm(by_logits, chunk.student.weight)
            # Factors in low precision would change a row's weight by up to 0.4%.
            torch.mul(product, factors[:, None], out=self.of_hidden[chunk.rows])
        vocab_size = by_logits.shape[1]
        if self.of_weight is not None:
            narrow = (self.hidden[chunk.rows] * factors[:, None]).to(self.hidden.dtype)
            _add_product(self.of_weight[:vocab_size], by_logits.T, narrow)
        if self.of_bias is not None:
            self.of_bias[:vocab_size] += by_logits.T.to(self.dtype) @ factors

    def finish(self, head: Head) -> list[Tensor | None]:
        """The sums, in the dtypes of the tensors that they are gradients of."""
        return [
            self.of_hidden,
            None if self.of_weight is None else self.of_weight.to(head.weight.dtype),
            None if self.of_bias is None or head.bias is None else self.of_bias.to(head.bias.dtype),
        ]


class _Distributions:
    """The divergence of two distributions at each row, plus a policy gradient if there is one."""

    def __init__(self, problem: _Problem, seen: _Seen, hidden: Tensor) -> None:
        self.problem, self.seen = problem, seen
        self.weights = problem.weights.to(seen.values.dtype)
        self.step, self.policy_step = _step(_divergence_rows, hidden), _step(_sampled_rows, hidden)

    def chunk(self, chunk: _Chunk, by_logits: Tensor | None) -> Tensor:
        """Fills ``by_logits`` [n, V] with the gradient, without the factors [n] that are returned."""
        problem, seen, policy = self.problem, self.seen, self.problem.policy
        for tile in chunk.tiles():
            at, product, columns = chunk.absolute(tile), chunk.product[tile], chunk.columns_at(tile)
            values, student_entropy, teacher_entropy, agreement, grad = self.step(
                chunk.student, chunk.teacher, product, columns, problem.divergence, problem.temperature,
                by_logits is not None,
            )  # fmt: skip
            seen.values[at], seen.agreement[at] = values, agreement
            seen.student_entropy[at], seen.teacher_entropy[at] = student_entropy, teacher_entropy
            if policy is not None:
                ids = (policy.ids[at].long(),)
                log_q, _, policy_grad = self.policy_step(
                    chunk.student, product, ids, problem.temperature, by_logits is not None
                )
                seen.policy_values[at], slope = policy.value(at, log_q)
                if by_logits is not None:
                    # In a sum of two terms their factors have to be on the wide side.
                    policy_grad.mul_((slope * policy.weights[at].to(slope.dtype))[:, None])
                    grad = policy_grad.add_(grad * self.weights[at, None])
            if by_logits is not None:
                by_logits[tile] = grad
        weights = self.weights[chunk.rows]
        return weights if policy is None else torch.ones_like(weights)


class _SampledTokens:
    """Losses by the score function: the gradient of each is a multiple of that of -log q at the sampled token."""

    def __init__(self, problem: _Problem, seen: _Seen, hidden: Tensor) -> None:
        self.problem, self.seen = problem, seen
        self.weights = problem.weights.to(seen.values.dtype)
        self.step = _step(_sampled_rows, hidden)
        self.following: Tensor | None = None
        """Return of the row after the chunk: chunks come from the last to the first."""

    def chunk(self, chunk: _Chunk, by_logits: Tensor | None) -> Tensor:
        """As :meth:`_Distributions.chunk`."""
        teacher, policy, seen = self.problem.teacher, self.problem.policy, self.seen
        source = teacher if isinstance(teacher, SampledRows) else policy
        assert source is not None
        log_q = torch.empty_like(seen.values[chunk.rows])
        for tile in chunk.tiles():
            at = chunk.absolute(tile)
            log_q[tile], seen.student_entropy[at], grad = self.step(
                chunk.student, chunk.product[tile], (source.ids[at].long(),), self.problem.temperature,
                by_logits is not None,
            )  # fmt: skip
            if by_logits is not None:
                by_logits[tile] = grad
        factors = torch.zeros_like(log_q)
        if isinstance(teacher, SampledRows):
            rewards = teacher.log_probs[chunk.rows].to(log_q.dtype) - log_q
            importance = teacher.importance(chunk.rows, log_q)
            returns = teacher.returns(chunk.rows, rewards, self.following)
            self.following = returns[0]
            seen.values[chunk.rows] = -importance * rewards
            factors += self.weights[chunk.rows] * importance * returns
        if policy is not None:
            seen.policy_values[chunk.rows], slope = policy.value(chunk.rows, log_q)
            factors += policy.weights[chunk.rows].to(slope.dtype) * slope
        return factors


@dataclass(frozen=True)
class _Chunk:
    """Rows of one set of matrix products."""

    rows: slice
    product: Tensor
    """[n, vocab_size] student hidden states times head, before bias, scale and softcap."""
    columns: tuple[Tensor, ...]
    """[n, ...] the teacher's signal, by its kind; for HiddenRows its own product."""
    student: Head
    teacher: Head | None
    """Both cut to vocab_size."""

    def tiles(self) -> Iterator[slice]:
        """Rows of the elementwise work: all of them on GPU, what fits the caches on CPU."""
        n, columns = self.product.shape
        size = n if self.product.is_cuda else torch.get_num_threads() * max(1, _CACHE_ELEMENTS // columns)
        return (slice(start, min(start + size, n)) for start in range(0, n, size))

    def absolute(self, tile: slice) -> slice:
        """The tile's rows among all rows."""
        return slice(self.rows.start + tile.start, self.rows.start + tile.stop)

    def columns_at(self, tile: slice) -> tuple[Tensor, ...]:
        return tuple(column[tile] for column in self.columns)


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
    dtype = hidden.dtype if low else statistics_dtype(hidden.dtype)
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
            columns = ()  # There is nothing but the sampled tokens' ids.
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
    """[n, V]: the student's distribution over the tokens outside ``ids``; meaningless at ids."""

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
    student: Head, product: Tensor, columns: tuple[Tensor, ...], temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log q of the sampled token and the student's entropy, [n]; gradient of -log q w.r.t. the (uncapped) logits."""
    (ids,) = columns
    logits, tanh = student.finish(product, temperature)
    log_q, q, _ = _log_softmax(logits)
    chosen, entropy = log_q.gather(-1, ids[:, None])[:, 0], _entropy(log_q, q)
    if not with_gradient:
        return chosen, entropy, None
    grad = q.scatter_add_(-1, ids[:, None], q.new_full((len(ids), 1), -1.0))
    return chosen, entropy, grad if tanh is None else grad.mul_(1 - tanh.square())


def _pair(
    student: Head, teacher: Head | None, product: Tensor, columns: tuple[Tensor, ...], temperature: float
) -> _Pair:
    student_logits, tanh = student.finish(product, temperature)
    if teacher is not None:
        teacher_logits, _ = teacher.finish(columns[0], temperature)
        teacher_top, student_top = (x.amax(-1, keepdim=True) for x in (teacher_logits, student_logits))
        agreement = _same_top(teacher_logits, student_logits, teacher_top + student_top)
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


def _same_top(a: Tensor, b: Tensor, tops: Tensor) -> Tensor:
    """bool [n]: both rows have their largest value in the same column; ``tops`` [n, 1]: the sum of both largest.

    a + b reaches it only there. (Two argmax take ten times as long.)
    """
    return (a + b).amax(-1) >= tops[:, 0]


def _log_softmax(logits: Tensor, top: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs, probabilities and log-sum-exp [..., 1], in one pass of exp; ``top``: the largest logits [..., 1]."""
    if top is None:
        top = logits.amax(-1, keepdim=True)
    log_probs = logits - top
    probs = log_probs.exp()
    total = probs.sum(-1, keepdim=True)
    log_total = total.log()
    return log_probs.sub_(log_total), probs.div_(total), log_total + top


def _entropy(log_probs: Tensor, probs: Tensor) -> Tensor:
    return (probs * log_probs).sum(-1).neg_()


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
    """On CUDA the elementwise work of a chunk is fused into one pass; on CPU tiles in cache are as good, and need no
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
