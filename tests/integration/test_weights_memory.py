"""Weights in shared memory, read by another process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import make_model

from s2w.weights.shm import Segment, read_segment
from s2w.weights.stream import CheckpointStream


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
