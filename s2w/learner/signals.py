"""Takes teacher signals out of the object store while the previous micro-batch computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import ray
import torch

from s2w.records import Scored
from s2w.teacher.signal import decode, nbytes

PREFETCH = 2
"""Micro-batches fetched beside the one that computes."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """The signals of one micro-batch, sampled rows of its samples one after the other."""

    tensors: dict[str, torch.Tensor]
    """CPU tensors [N, ...] as :func:`s2w.teacher.signal.decode` names them; empty if fetching failed."""
    nbytes: int
    error: str | None = None
    """Why the signals could not be had, naming the sample."""


def fetch(samples: Sequence[Scored]) -> Fetched:
    """Gets and joins the signals of a micro-batch; blocks. Never raises for a signal that is lost or malformed:
    the other ranks wait in collectives and must be told in step."""
    parts: list[dict[str, torch.Tensor]] = []
    size = 0
    for sample in samples:
        uid = sample.rollout.uid
        try:
            payload = ray.get(sample.signal.payload)
        except ray.exceptions.RayError as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            return Fetched({}, size, f"teacher signal of {uid} is lost ({reason})")
        part = decode(payload)
        expected = len(sample.rollout.token_ids)
        if any(len(tensor) != expected for tensor in part.values()):
            there = {name: len(tensor) for name, tensor in part.items()}
            return Fetched({}, size, f"teacher signal of {uid} has rows {there} for {expected} response tokens")
        # Inserted tokens are scored with the rest and not learned from.
        rows = torch.from_numpy(sample.rollout.sampled_rows)
        parts.append({name: tensor[rows] for name, tensor in part.items()} if sample.rollout.forced else part)
        size += nbytes(payload)
    # The copy lets go of the object store's memory.
    return Fetched({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, size)


class SignalStream:
    """Iterates over the signals of micro-batches, fetched in order by a background thread.

    Attributes:
        waited: seconds that the consumer stood still for a signal.
        nbytes: bytes of all signals so far.
    """

    def __init__(self, batches: Sequence[Sequence[Scored] | None]) -> None:
        """``batches``: samples of each micro-batch; None where no signal is needed (yields None)."""
        self.batches = batches
        self.waited = 0.0
        self.nbytes = 0

    def __iter__(self) -> Iterator[Fetched | None]:
        with ThreadPoolExecutor(1, thread_name_prefix="signals") as thread:
            ahead: deque[Future[Fetched] | None] = deque()
            pending = iter(self.batches)
            for _ in self.batches:
                while len(ahead) <= PREFETCH and (batch := next(pending, ())) != ():
                    ahead.append(thread.submit(fetch, batch) if batch is not None else None)
                future = ahead.popleft()
                if future is None:
                    yield None
                    continue
                started = time.perf_counter()
                fetched = future.result()
                self.waited += time.perf_counter() - started
                self.nbytes += fetched.nbytes
                del future
                yield fetched
