"""Tests that need GPUs; without them each is skipped by name. `make test-gpu` shows what they print."""

from __future__ import annotations

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("gpus"):
        [wanted] = marker.args
        if (there := torch.cuda.device_count()) < wanted:
            pytest.skip(f"needs {wanted} GPUs, and this machine has {there}")
