"""vLLM's NCCL weight transfer on CPU: gloo in place of the communicator, stand-ins for streams; all else is vLLM's own.

Engines take part with ``worker_extension_cls="gloo_broadcast.Extension"``: importing this module in a worker is enough.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

TIMEOUT_S = 20
"""After which a peer that is gone is noticed; NCCL itself would wait for ever."""


class GlooCommunicator:
    """The part of ``PyNcclCommunicator`` that a weight transfer uses."""

    def __init__(self, group: Any, device: Any) -> None:
        store = distributed.PrefixStore("gloo", group.store)
        limit = timedelta(seconds=TIMEOUT_S)
        self._group = distributed.ProcessGroupGloo(store, group.rank, group.world_size, limit)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        self._group.broadcast(tensor, src).wait()  # type: ignore[attr-defined]

    def destroy(self) -> None:
        del self._group


class Stream:
    """A CUDA stream on which everything has happened already."""

    def synchronize(self) -> None: ...


def install(replace: Callable[[object, str, Any], None]) -> None:
    """Replaces what needs a GPU; ``replace`` as ``setattr``."""
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import packed_tensor

    replace(pynccl, "PyNcclCommunicator", GlooCommunicator)
    replace(packed_tensor, "_get_streams", lambda device, count: [Stream() for _ in range(count)])
    replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    replace(torch.cuda, "current_stream", lambda *_: Stream())
    replace(torch.accelerator, "current_device_index", lambda: 0)
    replace(torch.accelerator, "synchronize", lambda *_: None)


class Extension:
    """Adds nothing to vLLM's worker."""


if multiprocessing.parent_process() is not None:
    install(setattr)
