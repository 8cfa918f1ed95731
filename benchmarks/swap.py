"""Time of a hot swap against the time to copy the same bytes.

A model of random weights (`--size`) is swapped between two versions in one vLLM engine, on this machine's device
path (shared memory on CPU). Medians over `--repeats`; the first swap is not counted. The engine is idle, so the pause
is the cost of the swap itself.

    python benchmarks/swap.py --json swap.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from s2w.actors.hardware import resolve_dtype
from s2w.actors.vllm import prepare_process
from s2w.weights.probe import compare, engine_log_probs, model_log_probs
from s2w.weights.publish import EngineWeights, SwapReport, publish
from s2w.weights.stream import CheckpointStream
from s2w.weights.transfer import SharedMemoryTransfer, Update

SIZES: dict[str, dict[str, Any]] = {
    "60m": {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1536, "num_attention_heads": 8},
    "140m": {"hidden_size": 768, "num_hidden_layers": 16, "intermediate_size": 2304, "num_attention_heads": 12},
}
VOCAB_SIZE = 32768


class Receiver(EngineWeights):
    """The engine, in this process."""

    workers = 1


class Learner:
    """A learner of one rank in this process."""

    def __init__(self, model: Qwen3ForCausalLM, dtype: torch.dtype) -> None:
        self.transfer = SharedMemoryTransfer(CheckpointStream(model, model.named_parameters, dtype), rank=0)

    async def prepare_weights(self, workers: dict[int, int]) -> Update:
        update = self.transfer.prepare(workers)
        assert update is not None  # rank 0's
        return update

    async def connect_weights(self) -> None:
        self.transfer.connect()

    async def send_weights(self) -> None:
        self.transfer.send()


def make_model(size: str, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    shape = SIZES[size]
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        num_key_value_heads=shape["num_attention_heads"] // 2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        **shape,
    )
    return Qwen3ForCausalLM(config).eval()


def copy_ms(nbytes: int, repeats: int) -> float:
    """Median time to copy ``nbytes`` once from memory to memory that is mapped already."""
    source = torch.ones(nbytes, dtype=torch.uint8)
    target = torch.zeros(nbytes, dtype=torch.uint8)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        target.copy_(source)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


async def measure(size: str, dtype: Any, repeats: int) -> tuple[list[SwapReport], dict[str, float]]:
    """The reports of ``repeats`` swaps, and the probe after the last."""
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    models = [make_model(size, seed).to(getattr(torch, dtype)) for seed in (0, 1)]
    with tempfile.TemporaryDirectory() as path:
        models[0].save_pretrained(path)
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=path,
                skip_tokenizer_init=True,
                dtype=dtype,
                max_model_len=512,
                enforce_eager=True,
                gpu_memory_utilization=0.1,
                disable_log_stats=True,
                weight_transfer_config=WeightTransferConfig(backend=SharedMemoryTransfer.backend),
            )
        )
    try:
        model = make_model(size, seed=2).to(getattr(torch, dtype))
        learner, engines = Learner(model, getattr(torch, dtype)), {0: Receiver(llm)}
        reports = []
        for version in range(1, repeats + 2):
            model.load_state_dict(models[version % 2].state_dict())
            reports.append(await publish(learner, engines, version))
        ids = np.arange(64, dtype=np.int32) * 97
        values = await engine_log_probs(llm, ids)
        # A swap that is fast and wrong is not a result.
        probe = compare(values, model_log_probs(model, ids), name="the engine", version=version, tolerance=0.05)
    finally:
        llm.shutdown()
    return reports[1:], {"mean": probe.mean, "max": probe.max}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="140m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    prepare_process("cpu", 1, None, kv_cache_gib=1)
    dtype = resolve_dtype(arguments.dtype, "cpu")
    reports, probe = asyncio.run(measure(arguments.size, dtype, arguments.repeats))
    copy = copy_ms(reports[0].bytes, arguments.repeats)

    def median(name: str) -> float:
        return statistics.median(getattr(report, name) for report in reports)

    parts = {name: median(name) for name in ("gather_ms", "load_ms", "pause_ms", "total_ms")}
    stop_and_resume = statistics.median(report.pause_ms - report.load_ms for report in reports)
    result = {
        "size": arguments.size,
        "dtype": dtype,
        "bytes": reports[0].bytes,
        "repeats": arguments.repeats,
        **parts,
        "stop_and_resume_ms": stop_and_resume,
        "copy_ms": copy,
        "ratio": parts["total_ms"] / copy,
        "load_ratio": parts["load_ms"] / copy,
        "probe": probe,
    }
    rows = [
        ("gather and write (engine at work)", parts["gather_ms"]),
        ("stop and resume", stop_and_resume),
        ("load", parts["load_ms"]),
        ("engine stopped", parts["pause_ms"]),
        ("whole swap", parts["total_ms"]),
        ("copy of the same bytes", copy),
    ]
    print(f"{arguments.size}, {dtype}, {reports[0].bytes / 2**20:.0f} MiB, median of {arguments.repeats}")
    for name, value in rows:
        print(f"  {name:<36}{value:9.1f} ms")
    print(f"  whole swap / copy: {result['ratio']:.1f}; load / copy: {result['load_ratio']:.1f}")
    print(f"  log-probs against the learner's model: {probe['mean']:.1e} nats on average")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
