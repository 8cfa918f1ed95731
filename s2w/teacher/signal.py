"""The four kinds of teacher signal: what is asked for, what crosses the wire, what the learner decodes.

Row i of a signal is the teacher's distribution over response token i, given the prompt and the response
tokens before it: n rows for a response of n tokens. Its payload is a dict of numpy arrays:

========  ==================================================================================  =============
kind      arrays                                                                              bytes per row
========  ==================================================================================  =============
hidden    ``hidden`` [n, d] in the teacher's dtype (bfloat16 as an int16 view), ``dtype``     2 d (4 d fp32)
..        in float8 (e4m3, a uint8 view), with ``scale`` float32 [n]                          d + 4
topk      ``ids`` int32 [n, k], ``log_probs`` float32 [n, k], ``log_tail`` float32 [n]        8 k + 4
ids       the same, at the student's ids, in the student's order                              8 k + 4
sampled   ``log_probs`` float32 [n]                                                           4
========  ==================================================================================  =============

On request, any of the first three also has ``sampled`` float32 [n]: the log-prob of the token that was sampled, 4
bytes more.

Log-probs are in nats, normalised over the whole vocabulary at the requested temperature, never renormalised
over the ids that are sent and never clamped. ``log_tail`` is the log of the exact mass of all other ids, -inf
where there is none. Hidden states are taken after the final norm, before the head: no temperature in them. A float8
row is to be multiplied by its scale; its largest element is stored as the format's largest, 448.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from s2w.records import HiddenDtype, SignalKind

Payload = dict[str, Any]
"""Numpy arrays by name; kind ``hidden`` adds the string ``dtype``."""

_FLOAT8 = torch.float8_e4m3fn
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3fn": _FLOAT8,
}
"""Dtypes of hidden states, by the name in their payload."""
_VIEWS = {torch.bfloat16: torch.int16, _FLOAT8: torch.uint8}
"""Integers that stand for the dtypes that numpy does not have."""
_BLOCK_ELEMENTS = 2**16
"""Numbers that are turned into float8 at a time."""


@dataclass(frozen=True, slots=True)
class SignalRequest:
    """What the learner wants to know about each response token."""

    kind: SignalKind
    top_k: int = 0
    """Ids per row, for kind ``topk`` only (``ids`` takes as many as the student sends)."""
    temperature: float = 1.0
    """The teacher's logits are divided by it (topk, ids and sampled)."""
    dtype: HiddenDtype = "auto"
    """How hidden states travel."""
    sampled: bool = False
    """Add the log-prob of the sampled token to the signal (kinds other than ``sampled``)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(SignalKind):
            raise ValueError(f"unknown kind of teacher signal: {self.kind!r}")
        if self.kind == "topk" and self.top_k < 1:
            raise ValueError(f"kind topk needs top_k >= 1, not {self.top_k}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")


def bytes_per_row(kind: SignalKind, *, top_k: int = 0, hidden_size: int = 0, dtype: str = "bfloat16") -> int:
    """Payload bytes of one response token; ``hidden_size`` and ``dtype`` (a payload's) matter for ``hidden`` only."""
    match kind:
        case "hidden":
            return hidden_size * _DTYPES[dtype].itemsize + (4 if _DTYPES[dtype] == _FLOAT8 else 0)
        case "topk" | "ids":
            return 8 * top_k + 4
        case "sampled":
            return 4


def encode(
    kind: SignalKind,
    rows: torch.Tensor,
    candidates: np.ndarray | None = None,
    dtype: HiddenDtype = "auto",
    sampled: bool = False,
) -> Payload:
    """Turns the pooler's CPU tensor (layout: :mod:`s2w.teacher.pooler`) into a payload.

    Args:
        kind: Kind of signal that ``rows`` holds.
        rows: [n, width].
        candidates: int32 [n, k], the ids that were asked for (kind ``ids`` only).
        dtype: How hidden states travel.
        sampled: ``rows`` end with the log-prob of the sampled token.
    """
    if sampled and kind != "sampled":
        width = rows.shape[1] - 4 // rows.itemsize
        log_probs = rows[:, width:].contiguous().view(torch.float32)[:, 0]
        return encode(kind, rows[:, :width], candidates, dtype) | {"sampled": log_probs.numpy()}
    match kind:
        case "hidden":
            return _hidden(rows.contiguous(), dtype)
        case "topk":
            top_k = (rows.shape[1] - 1) // 2
            values = rows[:, top_k:].contiguous().view(torch.float32)
            return {"ids": _contiguous(rows[:, :top_k])} | _log_probs(values)
        case "ids":
            assert candidates is not None
            return {"ids": np.ascontiguousarray(candidates, np.int32)} | _log_probs(rows)
        case "sampled":
            return {"log_probs": rows[:, 0].numpy()}


def decode(payload: Payload) -> dict[str, torch.Tensor]:
    """Turns a payload into tensors that share its memory.

    Arrays out of Ray's object store are read-only: do not write to the tensors. Shapes and dtypes are the
    table's, hidden states in their own dtype.
    """
    tensors = {}
    for name, array in payload.items():
        if name == "dtype":
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors[name] = torch.from_numpy(array)
    if "hidden" in tensors:
        tensors["hidden"] = tensors["hidden"].view(_DTYPES[payload["dtype"]])
    return tensors


def hidden_rows(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Hidden states [n, d] in ``dtype`` from decoded tensors, float8 ones multiplied by their scales."""
    if "scale" not in tensors:
        return tensors["hidden"].to(dtype)
    return (tensors["hidden"].float() * tensors["scale"][:, None]).to(dtype)


def nbytes(payload: Payload) -> int:
    """Bytes of the payload's arrays."""
    return sum(array.nbytes for name, array in payload.items() if name != "dtype")


def check_finite(payload: Payload, uid: str) -> None:
    """Raises FloatingPointError, naming the rollout, at a NaN or an infinity that no distribution has.

    ``log_tail`` may be -inf: the ids that were sent can hold all of the mass.
    """
    for name, tensor in decode(payload).items():
        if tensor.dtype == _FLOAT8:
            continue  # its scale is NaN or infinite where the row was
        # The fastest pass that catches every NaN and infinity: a sum of finite numbers is finite, or has overflowed
        # and the next lines find nothing.
        if torch.isfinite(tensor.sum()):
            continue
        finite = torch.isfinite(tensor)
        if name == "log_tail":
            finite |= tensor == -torch.inf
        bad = (~finite.view(len(finite), -1).all(-1)).nonzero()[:, 0].tolist()
        if bad:
            raise FloatingPointError(
                f"teacher signal of {uid}: {name} is not finite in {len(bad)} of {len(finite)} rows, first {bad[0]}"
            )


def _hidden(rows: torch.Tensor, dtype: HiddenDtype) -> Payload:
    if str(rows.dtype).removeprefix("torch.") not in _DTYPES:
        raise ValueError(f"hidden rows in {rows.dtype} have no wire form")
    scales: Payload = {}
    if dtype == "bfloat16":
        rows = rows.bfloat16()
    elif dtype == "float8":
        rows, scale = _to_float8(rows)
        scales = {"scale": scale.numpy()}
    name = str(rows.dtype).removeprefix("torch.")
    return {"hidden": rows.view(_VIEWS.get(rows.dtype, rows.dtype)).numpy(), **scales, "dtype": name}


def _to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 [n, d] and the scales, float32 [n]; in blocks of rows, so that temporaries stay in the cache."""
    quantized, scale = torch.empty(rows.shape, dtype=_FLOAT8), torch.empty(len(rows))
    block = max(1, _BLOCK_ELEMENTS // rows.shape[1])
    for part, part_quantized, part_scale in zip(
        rows.split(block), quantized.split(block), scale.split(block), strict=True
    ):
        part = part.float()
        torch.amax(part.abs(), -1, out=part_scale)
        part_scale.div_(torch.finfo(_FLOAT8).max).clamp_min_(torch.finfo(torch.float32).tiny)
        part_quantized.copy_(part / part_scale[:, None])
    return quantized, scale


def _log_probs(values: torch.Tensor) -> Payload:
    """float32 [n, k + 1], the tail last."""
    return {"log_probs": _contiguous(values[:, :-1]), "log_tail": _contiguous(values[:, -1])}


def _contiguous(tensor: torch.Tensor) -> np.ndarray:
    """Ray shares contiguous arrays out of band and copies the others into the pickle."""
    return tensor.contiguous().numpy()
