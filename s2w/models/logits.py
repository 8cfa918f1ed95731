"""Logits in float32 from hidden states and a head in low precision, and the log-prob of an impossible token."""

from __future__ import annotations

import torch

LOG_ZERO = -1e30
"""The log-prob of an impossible token: finite, so that ``0 * (log p - log q)`` is 0 and never NaN."""
LOGITS_BYTES = 128 * 2**20
"""Size of the float32 [rows, vocabulary shard] buffer that a row chunk of the teacher's pooler may fill."""
_BLOCK = 16_384
"""CPU: rows of the head that are in float32 at a time."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits and of everything computed from them: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def float32_product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``hidden @ weight.T`` in float32 (float64 for float64): keeps what a low-precision output would round off.

    A logit of 20 in bfloat16 is off by up to 0.06, and so is its log-prob.

    Args:
        hidden: [n, d].
        weight: [V, d], in the same dtype.

    Returns:
        [n, V].
    """
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # type: ignore[call-overload]
    # No matrix product on the CPU takes low precision and returns float32.
    rows = hidden.float()
    return torch.cat([rows @ block.float().T for block in weight.split(_BLOCK)], -1)
