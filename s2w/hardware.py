"""What the hardware is good at: the dtype behind ``auto`` and the number of usable cores."""

from __future__ import annotations

import os

import torch


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
