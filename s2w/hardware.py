"""What the hardware is good at: the dtype behind ``auto``, the usable cores, and how processes share them."""

from __future__ import annotations

import os

import torch

SHARED_CORES = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "GOMP_SPINCOUNT": "0",
}
"""Environment of an actor on the CPU: idle OpenMP threads sleep, for engines and learner ranks work in turn."""


def resolve_dtype(name: str, device: str) -> str:
    """Turns ``auto`` into ``bfloat16`` where products in it are native, else ``float32``.

    A CPU without AMX or AVX512-BF16 emulates bfloat16 products, eight times slower than float32.
    """
    if name != "auto":
        return name
    if device == "cuda":
        return "bfloat16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
