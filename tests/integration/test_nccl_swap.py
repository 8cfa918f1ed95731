"""A swap by vLLM's NCCL backend with gloo in place of the communicator: an engine of two workers, one of one.

Tolerances as in test_weights_swap.py.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gloo_broadcast
import numpy as np
import psutil
import pytest
import torch
from tiny_models import VOCAB_SIZE, make_checkpoint, make_model

from s2w.actors.vllm import fail_with_engine_core, prepare_process
from s2w.weights import transfer
from s2w.weights.probe import ProbeError, compare, engine_log_probs, model_log_probs
from s2w.weights.publish import EngineWeights, SwapError, SwapReport, publish
from s2w.weights.stream import CheckpointStream
from s2w.weights.transfer import NcclTransfer, Update

PROBE = np.array([(7 * j * j + 5 * j) % VOCAB_SIZE for j in range(90)], dtype=np.int32)
BUCKET_BYTES = 1 << 16
"""A dozen buckets, and the embedding larger than one."""


class Engine(EngineWeights):
    """An engine in this process."""

    def __init__(self, llm: Any, workers: int) -> None:
        super().__init__(llm)
        self.workers = workers

    def kill(self) -> None:
        """Ends its engine core and workers, as the kernel would for memory."""
        for process in self.llm.engine_core.resources.engine_manager.processes:
            for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                one.kill()


class Learner:
    """A learner of one rank in this process; version ``v`` has the weights of seed ``v % 2``."""

    def __init__(self) -> None:
        self.models = [make_model("untied", seed) for seed in (0, 1)]
        self.version = 0
        self.during: Callable[[int], None] = lambda number: None
        """Called with the number of each parameter that is sent."""
        self.connected: list[set[int]] = []
        self.transfer = NcclTransfer(CheckpointStream(self.models[0], self._parameters, torch.float32), rank=0)

    def _parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, parameter) in enumerate(self.models[self.version % 2].named_parameters()):
            self.during(number)
            yield name, parameter

    async def prepare_weights(self, workers: dict[int, int]) -> Update:
        update = self.transfer.prepare(workers)
        assert update is not None
        self.connected.append(set(update.connect))
        return update

    async def connect_weights(self) -> None:
        await asyncio.to_thread(self.transfer.connect)

    async def send_weights(self) -> None:
        await asyncio.to_thread(self.transfer.send)


async def start(path: Path, workers: int) -> Engine:
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(path),
            dtype="float32",
            max_model_len=512,
            max_num_batched_tokens=2048,
            max_num_seqs=8,
            enforce_eager=True,
            scheduling_policy="priority",
            enable_chunked_prefill=False,
            gpu_memory_utilization=0.1,
            disable_log_stats=True,
            tensor_parallel_size=workers,
            weight_transfer_config=WeightTransferConfig(backend=NcclTransfer.backend),
            worker_extension_cls="gloo_broadcast.Extension",
            **prepare_process("cpu", workers, None, kv_cache_gib=1),
        )
    )
    fail_with_engine_core(llm)
    await llm.update_weight_version("0")
    return Engine(llm, workers)


def test_engines_come_and_go_and_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helpers = str(Path(gloo_broadcast.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [helpers, os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setattr(transfer, "BUCKET_BYTES", BUCKET_BYTES)
    gloo_broadcast.install(monkeypatch.setattr)
    learner, path = Learner(), make_checkpoint(tmp_path / "model", "untied", seed=0)
    references = [model_log_probs(model, PROBE) for model in learner.models]
    with asyncio.Runner() as runner:
        engines = {3: runner.run(start(path, 2)), 5: runner.run(start(path, 1))}

        def swap(version: int, *numbers: int) -> SwapReport:
            learner.version = version
            return runner.run(publish(learner, {n: engines[n] for n in numbers}, version, timeout_s=90))

        def check(version: int, *numbers: int) -> None:
            for number in numbers:
                found = runner.run(engine_log_probs(engines[number].llm, PROBE))
                compare(found, references[version % 2], name=f"engine {number}", version=version, tolerance=1e-4)

        try:
            check(0, 3, 5)
            for version in (1, 2):
                report = swap(version, 3, 5)
                check(version, 3, 5)
            assert report.bytes == sum(p.nbytes for p in learner.models[0].parameters())
            # One leaves, and comes back: the communicator is made anew each time.
            swap(3, 5)
            check(3, 5)
            swap(4, 3, 5)
            check(4, 3, 5)
            assert learner.connected == [{3, 5}, set(), {5}, {3, 5}]

            # A wrong parameter shows in the probe.
            learner.during = lambda number: spoil(learner.models[1], number)
            swap(5, 3, 5)
            with pytest.raises(ProbeError, match="engine 3"):
                check(5, 3)
            learner.during = lambda number: None
            learner.models[1] = make_model("untied", 1)
            swap(7, 3, 5)
            check(7, 3, 5)

            # One dies while the weights are broadcast: the swap fails, and the next one without it goes through.
            learner.during = lambda number: engines[3].kill() if number == 4 else None
            with pytest.raises((SwapError, RuntimeError)):
                swap(8, 3, 5)
            learner.during = lambda number: None
            swap(8, 5)
            check(8, 5)
            assert learner.connected[-1] == {5}
        finally:
            for engine in engines.values():
                engine.llm.shutdown()


def spoil(model: torch.nn.Module, number: int) -> None:
    """Zeroes the second layer's first matrix once it is about to be sent."""
    if number == 0:
        with torch.no_grad():
            model.get_submodule("model.layers.1.self_attn.q_proj").weight.zero_()  # type: ignore[operator]
