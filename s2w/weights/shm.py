"""Weights in shared memory: the segment that holds them on one node."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from typing import TypedDict

import torch

from s2w.weights.stream import CheckpointStream, CheckpointTensor

ALIGNMENT = 64
"""Bytes, a cache line: every tensor begins on one."""


class SegmentInfo(TypedDict):
    """What an engine needs to read a segment; plain values, so it passes through vLLM's RPC."""

    path: str
    tensors: list[tuple[str, str, list[int], int]]
    """Name, dtype (``bfloat16``), shape and offset in bytes of each tensor."""


def place(tensors: Sequence[CheckpointTensor]) -> tuple[list[int], int]:
    """Offsets of ``tensors`` in one piece of memory, and its size; bytes."""
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, size


class Segment:
    """A memory file that lives as long as this object; readers keep what they have mapped.

    Opened by other processes of this user through ``/proc``. Unlike a named file in ``/dev/shm`` it cannot outlive
    the process that made it, however that ends, and a container's limit on ``/dev/shm`` does not apply to it.
    """

    def __init__(self, tensors: Sequence[CheckpointTensor]) -> None:
        """Allocates the memory for ``tensors``.

        Raises:
            OSError: not enough memory.
        """
        offsets, size = place(tensors)
        layout = [
            (tensor.name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset)
            for tensor, offset in zip(tensors, offsets, strict=True)
        ]
        self._file = os.fdopen(os.memfd_create("s2w-weights"), "r+b", buffering=0)
        # Allocates now: writing to a hole that cannot be filled would kill the process instead of raising.
        os.posix_fallocate(self._file.fileno(), 0, size)
        self._memory = mmap.mmap(self._file.fileno(), size)
        self.info: SegmentInfo = {"path": f"/proc/{os.getpid()}/fd/{self._file.fileno()}", "tensors": layout}

    def write(self, stream: CheckpointStream) -> None:
        """Writes one pass of ``stream``, cast on the way, over what was there. No reader may be active."""
        for (_, target), (_, value) in zip(_views(self._memory, self.info), stream, strict=True):
            target.copy_(value)


def read_segment(info: SegmentInfo) -> Iterator[tuple[str, torch.Tensor]]:
    """``(name, tensor)``: views of a private mapping that lasts until the last of them is gone. Where they have not
    been written to, they show what is written to the segment later.

    Raises:
        FileNotFoundError: the segment is gone or belongs to another node.
    """
    try:
        with open(info["path"], "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no weights at {info['path']}: shared-memory transfer needs engines and learner rank 0 on one node"
        ) from error
    return _views(memory, info)


def _views(memory: mmap.mmap, info: SegmentInfo) -> Iterator[tuple[str, torch.Tensor]]:
    for name, dtype, shape, offset in info["tensors"]:
        count = torch.Size(shape).numel()
        yield name, torch.frombuffer(memory, dtype=getattr(torch, dtype), count=count, offset=offset).view(shape)
