"""Takes teacher signals out of the object store while the previous micro-batch computes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import ray
import torch

from s2w.records import Scored
from s2w.teacher.signal import Payload, decode, nbytes

PREFETCH = 2
"""Micro-batches fetched beside the one that computes."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """The signals of one micro-batch, sampled rows of its samples one after the other."""

    tensors: dict[str, torch.Tensor]
    """CPU tensors [N, ...] as :func:`s2w.teacher.signal.decode` names them; empty if fetching failed."""
    nbytes: int
    seconds: float
    """What it took to get and join them."""
    error: str | None = None
    """Why the signals could not be had, naming the sample."""


class _Unusable(Exception):
    """A signal is lost or malformed; the message names the sample."""


class Buffer:
    """Memory that signals are joined into, again and again: the first touch of new memory costs more than the copy."""

    def __init__(self) -> None:
        self._bytes: dict[str, torch.Tensor] = {}

    def join(self, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The parts one after the other; valid until the next call with this name."""
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        size = math.prod(shape) * parts[0].itemsize
        if name not in self._bytes or len(self._bytes[name]) < size:
            self._bytes[name] = torch.empty(size, dtype=torch.uint8)
        joined = self._bytes[name][:size].view(parts[0].dtype).view(shape)
        # NumPy copies in this thread alone. Torch would start an OpenMP team for it, and libgomp, with more threads
        # than cores, would then let no thread of any team wait without sleeping.
        np.concatenate([_raw(part) for part in parts], out=_raw(joined))
        return joined


def _raw(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's bytes, its last dimension longer; shares memory."""
    return tensor.view(torch.uint8).numpy()


def fetch(samples: Sequence[Scored], buffer: Buffer) -> Fetched:
    """Gets and joins the signals of a micro-batch; blocks. Never raises for a signal that is lost or malformed:
    the other ranks wait in collectives and must be told in step."""
    began = time.perf_counter()
    try:
        payloads = _get(samples)
        parts = [_sampled_rows(sample, payload) for sample, payload in zip(samples, payloads, strict=True)]
    except _Unusable as error:
        return Fetched({}, 0, time.perf_counter() - began, str(error))
    # The copy lets go of the object store's memory.
    tensors = {name: buffer.join(name, [part[name] for part in parts]) for name in parts[0]}
    return Fetched(tensors, sum(map(nbytes, payloads)), time.perf_counter() - began)


def _get(samples: Sequence[Scored]) -> list[Payload]:
    """The payloads, all asked for at once so that those of other nodes travel together."""
    references = [_reference(sample) for sample in samples]
    try:
        return ray.get(references)
    except ray.exceptions.RayError:
        # The error does not say whose it is: ask one by one.
        return [_get_one(sample) for sample in samples]


def _get_one(sample: Scored) -> Payload:
    try:
        return ray.get(_reference(sample))
    except ray.exceptions.RayError as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise _Unusable(f"teacher signal of {sample.rollout.uid} is lost ({reason})") from error


def _reference(sample: Scored) -> ray.ObjectRef:
    assert sample.signal is not None
    return sample.signal.payload


def _sampled_rows(sample: Scored, payload: Payload) -> dict[str, torch.Tensor]:
    """The rows that are learned from; inserted tokens are scored with the rest."""
    rollout = sample.rollout
    tensors = decode(payload)
    if any(len(tensor) != len(rollout.token_ids) for tensor in tensors.values()):
        there = {name: len(tensor) for name, tensor in tensors.items()}
        raise _Unusable(
            f"teacher signal of {rollout.uid} has rows {there} for {len(rollout.token_ids)} response tokens"
        )
    if not rollout.forced:
        return tensors
    return decode(payload | {name: payload[name][rollout.sampled_rows] for name in tensors})


class SignalStream:
    """Iterates over the signals of micro-batches, fetched in order by a background thread. What it yields is valid
    until the next is asked for.

    Attributes:
        waited: seconds that the consumer stood still for a signal.
        fetched: seconds that the background thread took to get and join them.
        nbytes: bytes of all signals so far.
    """

    def __init__(self, batches: Sequence[Sequence[Scored] | None], buffers: list[Buffer]) -> None:
        """
        Args:
            batches: samples of each micro-batch; None where no signal is needed (yields None).
            buffers: idle ones of earlier streams; some are taken out, and all are put back when they are idle again.
        """
        self.batches, self.buffers = batches, buffers
        self.waited = self.fetched = 0.0
        self.nbytes = 0

    def __iter__(self) -> Iterator[Fetched | None]:
        with ThreadPoolExecutor(1, thread_name_prefix="signals") as thread:
            ahead: deque[tuple[Future[Fetched], Buffer] | None] = deque()
            pending = iter(self.batches)
            for _ in self.batches:
                while len(ahead) <= PREFETCH and (batch := next(pending, ())) != ():
                    if batch is None:
                        ahead.append(None)
                        continue
                    buffer = self.buffers.pop() if self.buffers else Buffer()
                    ahead.append((thread.submit(fetch, batch, buffer), buffer))
                first = ahead.popleft()
                if first is None:
                    yield None
                    continue
                future, buffer = first
                started = time.perf_counter()
                fetched = future.result()
                self.waited += time.perf_counter() - started
                self.fetched += fetched.seconds
                self.nbytes += fetched.nbytes
                yield fetched
                self.buffers.append(buffer)
