"""Takes teacher signals out of the object store while the previous micro-batch computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import ray
import torch

from s2w.records import Scored, TeacherSignal
from s2w.teacher.signal import Payload, check_finite, decode, hidden_rows, nbytes

PREFETCH = 2
"""Micro-batches fetched ahead of the one being computed."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """The signals of one micro-batch."""

    parts: list[dict[str, torch.Tensor]]
    """The teacher's signal at the sampled tokens of each sample: CPU tensors [n, ...] as
    :func:`s2w.teacher.signal.decode` names them, in the object store's memory and so read-only; empty if none."""
    reference: list[dict[str, torch.Tensor]]
    """The same for the reference."""
    nbytes: int
    seconds: float
    """Time to get them."""
    error: str | None = None
    """Why the signals could not be fetched, naming the sample."""


class _Unusable(Exception):
    """A signal is lost or malformed; the message names the sample."""


class HiddenParts:
    """Hidden states of several samples, as if concatenated: they stay where they are, in the object store's memory on
    the CPU, until the kernel takes a chunk of them."""

    def __init__(self, parts: Sequence[dict[str, torch.Tensor]], dtype: torch.dtype) -> None:
        """
        Args:
            parts: of each sample, tensors as :func:`s2w.teacher.signal.decode` names them.
            dtype: that of the rows taken.
        """
        self._parts, self._dtype = parts, dtype
        self._ends = list(accumulate(len(part["hidden"]) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Rows [n, d] in the dtype; they share memory with a part where they are in one and need no conversion."""
        start, stop, _ = rows.indices(len(self))
        pieces = []
        for part, end in zip(self._parts, self._ends, strict=True):
            first = end - len(part["hidden"])
            if first < stop and start < end:
                inside = slice(max(start - first, 0), stop - first)
                pieces.append({name: tensor[inside] for name, tensor in part.items()})
        return hidden_rows(pieces[0] if len(pieces) == 1 else joined(pieces), self._dtype)


def joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The parts concatenated, in new memory."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def fetch(samples: Sequence[Scored]) -> Fetched:
    """Gets the signals of a micro-batch; blocks. Never raises for a signal that is lost or malformed:
    the other ranks wait in collectives and must be told in step."""
    began = time.perf_counter()
    found: list[list[dict[str, torch.Tensor]]] = []
    size = 0
    try:
        for signals in ([sample.signal for sample in samples], [sample.reference for sample in samples]):
            payloads = _get(samples, signals)
            size += sum(map(nbytes, payloads))
            found.append([_at_sampled(sample, payload) for sample, payload in zip(samples, payloads, strict=False)])
    except _Unusable as error:
        return Fetched([], [], 0, time.perf_counter() - began, str(error))
    return Fetched(found[0], found[1], size, time.perf_counter() - began)


def first_flaw(samples: Iterable[Scored]) -> str | None:
    """What is NaN or infinite in the first faulty signal, or why it cannot be fetched; None if all are fine."""
    return next(filter(None, map(_flaw, samples)), None)


def _flaw(sample: Scored) -> str | None:
    assert sample.signal is not None
    try:
        check_finite(_get_one(sample, sample.signal), sample.rollout.uid)
    except (FloatingPointError, _Unusable) as error:
        return str(error)
    return None


def _get(samples: Sequence[Scored], signals: Sequence[TeacherSignal | None]) -> list[Payload]:
    """The payloads, all asked for at once so that those of other nodes travel together; none where there are none."""
    there = [signal for signal in signals if signal is not None]
    try:
        return ray.get([signal.payload for signal in there])
    except ray.exceptions.RayError:
        # The error does not say whose it is: ask one by one.
        return [_get_one(sample, signal) for sample, signal in zip(samples, there, strict=True)]


def _get_one(sample: Scored, signal: TeacherSignal) -> Payload:
    try:
        return ray.get(signal.payload)
    except ray.exceptions.RayError as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise _Unusable(f"teacher signal of {sample.rollout.uid} is lost ({reason})") from error


def _at_sampled(sample: Scored, payload: Payload) -> dict[str, torch.Tensor]:
    """The signal at the tokens that are trained on; inserted tokens are scored with the rest."""
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
    """Iterates over the signals of micro-batches, fetched in order by a background thread.

    Attributes:
        waited: seconds that the consumer waited for a signal.
        fetched: seconds that the background thread took to get them.
        nbytes: bytes of all signals so far.
    """

    def __init__(self, batches: Sequence[Sequence[Scored] | None]) -> None:
        """
        Args:
            batches: samples of each micro-batch; None where no signal is needed (yields None).
        """
        self.batches = batches
        self.waited = self.fetched = 0.0
        self.nbytes = 0

    def __iter__(self) -> Iterator[Fetched | None]:
        with ThreadPoolExecutor(1, thread_name_prefix="signals") as thread:
            ahead: deque[Future[Fetched] | None] = deque()
            for done in range(len(self.batches)):
                while len(ahead) <= PREFETCH and done + len(ahead) < len(self.batches):
                    batch = self.batches[done + len(ahead)]
                    ahead.append(None if batch is None else thread.submit(fetch, batch))
                future = ahead.popleft()
                yield None if future is None else self._take(future)

    def _take(self, future: Future[Fetched]) -> Fetched:
        started = time.perf_counter()
        fetched = future.result()
        self.waited += time.perf_counter() - started
        self.fetched += fetched.seconds
        self.nbytes += fetched.nbytes
        return fetched
