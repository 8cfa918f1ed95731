"""What the hardware is good at: the dtype behind ``auto``, the usable cores, and how processes share them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch


def cpu_environment() -> dict[str, str]:
    """Environment of an actor on the CPU, read when its process starts.

    Engines and learner ranks work in turn on the same cores: an OpenMP thread with nothing to do spins for some 50
    microseconds, which bridges the gap between two operations, and then sleeps.

    Tensors come and go many times per step. glibc returns each large one to the kernel at once, and touching
    such memory again takes longer than the arithmetic done in it. jemalloc (the copy that Ray ships) keeps it; the
    kernel may reclaim what has been idle for ten seconds.
    """
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "2000"}
    ray = importlib.util.find_spec("ray")
    jemalloc = Path(ray.origin).parent / "core" / "libjemalloc.so" if ray and ray.origin else None
    if jemalloc and jemalloc.is_file():
        libraries = [str(jemalloc), *filter(None, [os.environ.get("LD_PRELOAD")])]
        environment |= {"LD_PRELOAD": ":".join(libraries), "MALLOC_CONF": "muzzy_decay_ms:-1,oversize_threshold:0"}
    return environment


def resolve_dtype(name: str, device: str) -> str:
    """Turns ``auto`` into ``bfloat16`` where matrix products in it are native, else ``float32``.

    A CPU without AMX or AVX512-BF16 emulates bfloat16 products, eight times slower than float32.
    """
    if name != "auto":
        return name
    if device == "cuda":
        return "bfloat16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def shares_gpu(device: str, gpus: float) -> bool:
    """Whether an actor on ``device`` (cuda or cpu), which reserves ``gpus`` of a GPU, leaves the rest to others."""
    return device == "cuda" and gpus < 1


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
