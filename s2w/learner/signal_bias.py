"""What cheaper teacher signals would have given, measured where the whole distribution is known.

On the tokens of a micro-batch with signal ``hidden``: the divergence that each other signal gives, and the gradient
with respect to the student's hidden states, beside the exact ones. The signals are those that the teacher would have
sent: ``topk`` its own ids, ``ids`` the student's, ``sampled`` the response's token (importance ratio 1: as if the
current student had sampled it), and hidden states in a smaller dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2w.models.head import Head
from s2w.objectives.divergences import Divergence
from s2w.objectives.kernel import HiddenRows, SampledRows, SparseRows, TeacherRows, divergence_loss
from s2w.objectives.support import signal_support
from s2w.teacher.signal import HiddenDtype, bytes_per_row, decode, encode, hidden_rows

TOP_K = (16, 64, 256)
"""Ids per token of ``topk`` and ``ids``; those above the vocabulary's size are left out."""


@dataclass(frozen=True, slots=True)
class SignalSums:
    """One signal on some rows, in sums that add up over micro-batches and ranks."""

    rows: int
    value: float
    """Divergence by this signal, nats."""
    exact: float
    """Divergence by the whole distribution, nats."""
    dot: float
    """Inner product of the gradient w.r.t. the student's hidden states, [rows, d] as one vector, with the exact one."""
    square: float
    """Squared norm of the gradient."""
    exact_square: float
    bytes_per_row: int

    def __add__(self, other: SignalSums) -> SignalSums:
        return SignalSums(
            self.rows + other.rows,
            self.value + other.value,
            self.exact + other.exact,
            self.dot + other.dot,
            self.square + other.square,
            self.exact_square + other.exact_square,
            self.bytes_per_row,
        )


def signal_bias(
    hidden: Tensor,
    head: Head,
    teacher: HiddenRows,
    divergence: Divergence,
    *,
    sampled_ids: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_rows: int = 1024,
    top_k: Sequence[int] = TOP_K,
) -> dict[str, SignalSums]:
    """Compares signals on one micro-batch; no argument gets a gradient.

    Args:
        hidden: [N, d_s] student hidden states.
        head: the student's, in the same dtype.
        sampled_ids: int64 [N], the response tokens.
        vocab_size, temperature, chunk_rows: see :func:`s2w.objectives.kernel.divergence_loss`.
        top_k: ids per token.

    Returns:
        By ``topk_K``, ``ids_K``, ``hidden_bfloat16``, ``hidden_float8``, and ``sampled`` if it supports the divergence.
    """
    hidden = hidden.detach()
    head = head.detach()
    options: dict[str, Any] = {"vocab_size": vocab_size, "temperature": temperature, "chunk_rows": chunk_rows}

    def solve(rows: TeacherRows) -> tuple[float, Tensor]:
        """The divergence summed over the rows, and its gradient [N, d_s]."""
        with torch.enable_grad():
            leaf = hidden.requires_grad_()
            output = divergence_loss(leaf, head, rows, divergence, **options)
            (gradient,) = torch.autograd.grad(output.loss, leaf)
        return output.values.double().sum().item(), gradient.float()

    exact, exact_gradient = solve(teacher)
    exact_square = exact_gradient.square().sum(dtype=torch.float64).item()
    result = {}
    for name, rows, size in _signals(hidden, head, teacher, divergence.name, sampled_ids, top_k, options):
        value, gradient = solve(rows)
        result[name] = SignalSums(
            rows=len(hidden),
            value=value,
            exact=exact,
            dot=(gradient * exact_gradient).sum(dtype=torch.float64).item(),
            square=gradient.square().sum(dtype=torch.float64).item(),
            exact_square=exact_square,
            bytes_per_row=size,
        )
    return result


def summarise(parts: Sequence[dict[str, SignalSums]]) -> dict[str, dict[str, float]]:
    """Over all ranks, for each signal:

    ``divergence``
        What it gives, nats/token.
    ``bias``
        The same, minus the exact divergence.
    ``cosine``
        Between its gradient w.r.t. the student's hidden states and the exact one, all rows as one vector; 1 is the
        same direction, NaN where either is 0.
    ``bytes_per_token``
        Of its payload.
    """
    totals: dict[str, SignalSums] = {}
    for part in parts:
        for name, sums in part.items():
            totals[name] = totals[name] + sums if name in totals else sums
    return {
        name: {
            "divergence": sums.value / sums.rows,
            "bias": (sums.value - sums.exact) / sums.rows,
            "cosine": _cosine(sums),
            "bytes_per_token": sums.bytes_per_row,
        }
        for name, sums in totals.items()
    }


def _cosine(sums: SignalSums) -> float:
    norms = math.sqrt(sums.square) * math.sqrt(sums.exact_square)
    return sums.dot / norms if norms > 0 else math.nan


def _signals(
    hidden: Tensor,
    head: Head,
    teacher: HiddenRows,
    divergence: str,
    sampled_ids: Tensor,
    top_k: Sequence[int],
    options: dict[str, Any],
) -> Iterator[tuple[str, TeacherRows, int]]:
    """Name, rows and bytes per row of each signal."""
    vocab_size, temperature = options["vocab_size"], options["temperature"]
    with torch.no_grad():
        sizes = [k for k in top_k if k <= vocab_size]
        parts: dict[str, list[SparseRows]] = {f"{kind}_{k}": [] for kind in ("topk", "ids") for k in sizes}
        at_sampled = []
        for start in range(0, len(hidden), options["chunk_rows"]):
            rows = slice(start, start + options["chunk_rows"])
            log_p = _log_probs(teacher.hidden[rows].to(hidden.dtype), teacher.head, vocab_size, temperature)
            log_q = _log_probs(hidden[rows], head, vocab_size, temperature)
            at_sampled.append(log_p.gather(-1, sampled_ids[rows, None])[:, 0])
            if not sizes:
                continue
            for kind, by in (("topk", log_p), ("ids", log_q)):
                order = by.topk(max(sizes)).indices
                for k in sizes:
                    ids = order[:, :k]
                    tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
                    parts[f"{kind}_{k}"].append(SparseRows(ids, log_p.gather(-1, ids), tail))
    for name, pieces in parts.items():
        columns = [
            torch.cat(column) for column in zip(*((p.ids, p.log_probs, p.log_tail) for p in pieces), strict=True)
        ]
        yield name, SparseRows(*columns), bytes_per_row("topk", top_k=columns[0].shape[1])
    if signal_support("sampled", divergence).strength != "not possible":
        yield "sampled", SampledRows(sampled_ids, torch.cat(at_sampled)), bytes_per_row("sampled")
    teacher_rows = teacher.hidden[:].detach().float().cpu()
    dtypes: tuple[HiddenDtype, ...] = ("bfloat16", "float8")
    for dtype in dtypes:
        payload = encode("hidden", teacher_rows, dtype=dtype)
        rows_again = hidden_rows(decode(payload), hidden.dtype).to(hidden.device)
        size = bytes_per_row("hidden", hidden_size=teacher_rows.shape[1], dtype=payload["dtype"])
        yield f"hidden_{dtype}", HiddenRows(rows_again, teacher.head), size


def _log_probs(hidden: Tensor, head: Head, vocab_size: int, temperature: float) -> Tensor:
    """float32 [N, vocab_size]."""
    return (head.cut(vocab_size).logits(hidden) / temperature).log_softmax(-1)
