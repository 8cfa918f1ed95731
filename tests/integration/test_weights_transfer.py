"""Weights on their way: shared memory that another process reads, and the plan of a broadcast by vLLM's NCCL engine."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, cast

import pytest
import torch
from tiny_models import make_model

from s2w.weights.shm import Segment, read_segment
from s2w.weights.stream import CheckpointStream
from s2w.weights.transfer import NcclTransfer


def test_another_process_reads_a_private_copy() -> None:
    model = make_model("tied", seed=0)
    stream = CheckpointStream(model, model.named_parameters, torch.float32)
    segment = Segment(stream.metadata())
    segment.write(stream)
    code = (
        "import json, sys; from s2w.weights.shm import read_segment\n"
        "total = 0.0\n"
        "for _, tensor in read_segment(json.loads(sys.argv[1])):\n"
        "    total += tensor.double().sum().item(); tensor.zero_()\n"
        "print(total)"
    )
    output = subprocess.run([sys.executable, "-c", code, json.dumps(segment.info)], capture_output=True, check=True)
    # The same sums in the same order, float64: equal but for the order inside a sum (threads), 1e-9.
    expected = sum(p.double().sum().item() for p in model.parameters())
    assert float(output.stdout) == pytest.approx(expected, abs=1e-9)
    assert all(
        torch.equal(read, p) for (_, read), p in zip(read_segment(segment.info), model.parameters(), strict=True)
    )


def test_nccl_plan_gives_every_worker_its_rank() -> None:
    """Only the plan: the communicator itself needs GPUs."""
    model = make_model("moe", seed=0)
    stream = CheckpointStream(model, model.named_parameters, torch.bfloat16)
    transfer = NcclTransfer(stream, rank=0)
    update = transfer.prepare({3: 2, 5: 4})
    assert update is not None
    plans = update.connect
    assert {engine: plan["rank_offset"] for engine, plan in plans.items()} == {3: 1, 5: 3}
    assert {plan["world_size"] for plan in plans.values()} == {7}
    assert update.info["names"] == [tensor.name for tensor in stream.metadata()]
    assert set(update.info["dtype_names"]) == {"bfloat16"}


class Broadcast:
    """In place of vLLM's NCCL engine, which needs GPUs."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def send_weights(self) -> None:
        if self.error:
            raise self.error


def test_nccl_connects_anew_until_a_swap_has_gone_through() -> None:
    model = make_model("moe", seed=0)
    transfer = NcclTransfer(CheckpointStream(model, model.named_parameters, torch.bfloat16), rank=0)

    def connects(workers: dict[int, int]) -> set[int]:
        update = transfer.prepare(workers)
        assert update is not None
        return set(update.connect)

    # Nobody has met yet, or the meeting failed.
    assert connects({3: 2, 5: 4}) == connects({3: 2, 5: 4}) == {3, 5}
    transfer._engine = cast(Any, Broadcast())
    transfer.send()
    assert connects({3: 2, 5: 4}) == set()
    assert connects({3: 2, 5: 4, 6: 1}) == {3, 5, 6}
    transfer.send()
    assert connects({3: 2, 5: 4, 6: 1}) == set()
    transfer._engine = cast(Any, Broadcast(ConnectionError("a peer is gone")))
    with pytest.raises(ConnectionError):
        transfer.send()
    assert connects({3: 2, 5: 4, 6: 1}) == {3, 5, 6}
