"""Hot swap in real vLLM engines on CPU, compared with transformers' models; one engine per group of tests.

Tolerances: float32 engines agree with transformers to 4e-6 nats at most (other order of additions); 1e-4 leaves
room for other kernels. The seeds of a model differ by about 1.4 nats on average, so a stale weight cannot hide.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from memory_segments import open_segments
from tiny_models import VOCAB_SIZE, Kind, make_checkpoint, make_model

from s2w.actors.vllm import prepare_process
from s2w.weights.probe import ProbeError, ProbeResult, compare, engine_log_probs, model_log_probs
from s2w.weights.publish import EngineWeights, SwapError, SwapReport, publish
from s2w.weights.stream import CheckpointStream
from s2w.weights.transfer import SharedMemoryTransfer, Update

TOLERANCE = 1e-4
PROBE = np.array([(7 * j * j + 5 * j) % VOCAB_SIZE for j in range(90)], dtype=np.int32)


class Learner:
    """A learner of one rank in this process, with the models of two versions."""

    def __init__(self, kind: Kind, dtype: str) -> None:
        self.kind, self.dtype = kind, getattr(torch, dtype)
        self.models = [make_model(kind, seed) for seed in (0, 1)]
        self.holds(0)

    def holds(self, version: int, without: str | None = None) -> None:
        """The weights of ``version`` are what the next swap sends, less that of the module ``without``."""
        model = self.models[version]
        if without is not None:
            model = make_model(self.kind, version)
            del model.get_submodule(without).weight
        self.transfer = SharedMemoryTransfer(CheckpointStream(model, model.named_parameters, self.dtype), rank=0)

    def log_probs(self, version: int, token_ids: np.ndarray = PROBE) -> np.ndarray:
        """With the weights and products in the engine's dtype."""
        model = self.models[version]
        if self.dtype != torch.float32:
            model = copy.deepcopy(model).to(self.dtype)
        return model_log_probs(model, token_ids)

    async def prepare_weights(self, workers: dict[int, int]) -> Update:
        update = self.transfer.prepare(workers)
        assert update is not None  # rank 0's
        return update

    async def connect_weights(self) -> None:
        self.transfer.connect()

    async def send_weights(self) -> None:
        self.transfer.send()


class Receiver(EngineWeights):
    """An engine in this process."""

    def __init__(self, llm: Any, workers: int) -> None:
        super().__init__(llm)
        self.workers = workers


class GoneReceiver:
    """An engine that does not answer."""

    workers = 1

    def __getattr__(self, step: str) -> Any:
        async def call(*args: Any) -> None:
            raise ConnectionError(f"{step}: the engine is gone")

        return call


class Engine:
    """A pool of one engine in this process, its event loop driven by the test."""

    def __init__(self, runner: asyncio.Runner, path: Path, learner: Learner, **options: Any) -> None:
        self.run, self.learner = runner.run, learner
        self.options = options
        self.run(self.start(path))

    async def start(self, path: Path) -> None:
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(path),
                max_model_len=512,
                max_num_batched_tokens=2048,
                max_num_seqs=8,
                enforce_eager=True,
                scheduling_policy="priority",
                enable_chunked_prefill=False,
                gpu_memory_utilization=0.1,
                disable_log_stats=True,
                weight_transfer_config=WeightTransferConfig(backend=SharedMemoryTransfer.backend),
                **self.options,
            )
        )
        workers = self.options.get("tensor_parallel_size", 1) * self.options.get("pipeline_parallel_size", 1)
        self.receivers: dict[int, Any] = {0: Receiver(self.llm, workers)}
        await self.llm.update_weight_version("0")

    def swap(self, version: int) -> SwapReport:
        """Version ``v`` has the weights of seed ``v % 2``."""
        self.learner.holds(version % 2)
        return self.run(publish(self.learner, self.receivers, version))

    def log_probs(self) -> np.ndarray:
        return self.run(engine_log_probs(self.llm, PROBE))

    def check(self, version: int, tolerance: float = TOLERANCE) -> ProbeResult:
        reference = self.learner.log_probs(version % 2)
        return compare(self.log_probs(), reference, name="engine 0", version=version, tolerance=tolerance)

    async def generate(self, name: str, prompt: list[int], tokens: int, progress: dict[str, int] | None = None) -> Any:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=0, seed=len(name), detokenize=False)
        async for output in self.llm.generate({"prompt_token_ids": prompt}, parameters, name):
            if progress is not None:
                progress[name] = len(output.outputs[0].token_ids)
        return output


@contextmanager
def running(
    path: Path,
    kind: Kind,
    dtype: str = "float32",
    tensor_parallel: int = 1,
    expert_parallel: bool = False,
    pipeline_parallel: int = 1,
) -> Iterator[Engine]:
    """An engine that starts with seed 0; ends its processes."""
    with patch.dict(os.environ), asyncio.Runner() as runner:
        os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_WAIT_POLICY": "PASSIVE"}
        options = prepare_process("cpu", tensor_parallel * pipeline_parallel, None, kv_cache_gib=1)
        options["pipeline_parallel_size"] = pipeline_parallel
        options["enable_expert_parallel"] = expert_parallel
        make_checkpoint(path, kind, seed=0, dtype=dtype)
        learner = Learner(kind, dtype)
        engine = Engine(runner, path, learner, dtype=dtype, tensor_parallel_size=tensor_parallel, **options)
        try:
            yield engine
        finally:
            engine.llm.shutdown()


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with running(tmp_path_factory.mktemp("tied"), "tied") as engine:
        yield engine


@pytest.mark.parametrize(
    ("kind", "dtype", "tensor_parallel", "expert_parallel", "tolerance"),
    [
        # bfloat16 products of two programs: 0.02 nats on average, as far as transformers' own is from float32.
        ("untied", "bfloat16", 1, False, 0.06),
        ("tied", "float32", 2, False, TOLERANCE),
        ("moe", "float32", 1, False, TOLERANCE),
        ("moe", "float32", 2, False, TOLERANCE),
        ("moe", "float32", 2, True, TOLERANCE),
    ],
    ids=str,
)
def test_there_and_back(
    kind: Kind, dtype: str, tensor_parallel: int, expert_parallel: bool, tolerance: float, tmp_path: Path
) -> None:
    with running(tmp_path, kind, dtype, tensor_parallel, expert_parallel) as engine:
        engine.check(0, tolerance)
        first = engine.log_probs()
        for version in (1, 2):
            report = engine.swap(version)
            engine.check(version, tolerance)
        np.testing.assert_array_equal(engine.log_probs(), first)
        assert report.bytes == engine.learner.transfer.stream.nbytes
        if kind == "moe":
            incomplete_update_raises_and_the_next_recovers(engine)
        if dtype == "bfloat16":
            a_stale_layer_is_found_out_within_the_tolerance(engine)


def test_there_and_back_over_pipeline_stages(tmp_path: Path) -> None:
    """A tied model: the embedding is in the first stage and, as head, in the last."""
    with running(tmp_path, "tied", pipeline_parallel=2) as engine:
        engine.check(0)
        for version in (1, 2):
            engine.swap(version)
            engine.check(version)


def a_stale_layer_is_found_out_within_the_tolerance(engine: Engine) -> None:
    """Version 1 is one AdamW step from version 0, towards another model; one layer of it is not taken. The first layer
    is found by what the update lacks or by the jump, the last, which changes less, after a larger step."""
    learner = engine.learner
    old = learner.models[0]
    ids = torch.as_tensor(PROBE, dtype=torch.int64)[None].flip(-1)
    with torch.no_grad():
        target = make_model(learner.kind, seed=2)(ids).logits.softmax(-1)

    def updated(learning_rate: float) -> Any:
        model = make_model(learner.kind, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        torch.nn.functional.cross_entropy(model(ids).logits[0], target[0]).backward()
        optimizer.step()
        return model.requires_grad_(False)

    def probe(version: int, stale: str = "") -> ProbeResult:
        learner.holds(version % 2)
        if stale:
            new = learner.models[1]
            mixed = ((n, (old if n.startswith(stale) else new).get_parameter(n)) for n, _ in new.named_parameters())
            stream = CheckpointStream(new, lambda: mixed, learner.dtype)
            learner.transfer = SharedMemoryTransfer(stream, rank=0)
        engine.run(publish(learner, engine.receivers, version))
        previous = None if version == 60 else learner.log_probs((version - 1) % 2)
        reference = learner.log_probs(version % 2)
        return compare(engine.log_probs(), reference, previous, usual, name="engine 0", version=version, tolerance=0.25)

    usual = np.inf
    usual = probe(60).median
    for number, (stale, learning_rate) in enumerate((("model.layers.0.", 2e-3), ("model.layers.1.", 6e-3))):
        learner.models[1] = updated(learning_rate)
        with pytest.raises(ProbeError, match="engine 0 computes with some weights from before version"):
            probe(61 + 2 * number, stale)
        probe(61 + 2 * number)
        probe(62 + 2 * number)


def incomplete_update_raises_and_the_next_recovers(engine: Engine) -> None:
    engine.learner.holds(1, without="model.layers.1.self_attn.k_proj")
    with pytest.raises(SwapError, match=r"misses weights of model\.layers\.1\.self_attn\.qkv_proj") as failure:
        engine.run(publish(engine.learner, engine.receivers, 9))
    assert failure.value.engines.keys() == {0}
    # Weights of two versions are in it: it must not go on.
    assert engine.run(engine.llm.is_paused())
    for version in (11, 12):
        engine.swap(version)
        engine.check(version)
    assert not engine.run(engine.llm.is_paused())


def test_tied_there_and_back(tied: Engine) -> None:
    tied.check(0)
    first = tied.log_probs()
    held = []
    for version in (1, 2):
        tied.swap(version)
        tied.check(version)
        held.append(open_segments())
    np.testing.assert_array_equal(tied.log_probs(), first)
    assert held[1] == held[0]


def test_incomplete_update_of_one_worker(tied: Engine) -> None:
    incomplete_update_raises_and_the_next_recovers(tied)


def test_requests_in_flight_go_on_with_the_new_weights(tied: Engine) -> None:
    tied.swap(20)
    prompts = {f"flight-{'x' * i}": [(11 * i + 3 * j * j) % VOCAB_SIZE for j in range(20 + 9 * i)] for i in range(6)}
    length = 160

    async def fly() -> list[Any]:
        progress: dict[str, int] = {}
        requests = [asyncio.create_task(tied.generate(name, p, length, progress)) for name, p in prompts.items()]
        while len(progress) < len(prompts) or min(progress.values()) < 20:
            await asyncio.sleep(0.005)
        tied.learner.holds(1)
        await publish(tied.learner, tied.receivers, 21)
        return await asyncio.gather(*requests)

    for output, prompt in zip(tied.run(fly()), prompts.values(), strict=True):
        completion = output.outputs[0]
        assert completion.finish_reason == "length"
        assert len(completion.token_ids) == length
        old, new = completion.weight_versions
        assert (old.version, old.start, new.version, new.end) == ("20", 0, "21", length)
        assert 20 <= old.end == new.start < length
        sampled = np.array([row[t].logprob for row, t in zip(completion.logprobs, completion.token_ids, strict=True)])
        ids = np.array([*prompt, *completion.token_ids], dtype=np.int32)
        # Each token under the whole context by one set of weights: nothing of the old KV cache is left.
        references = [tied.learner.log_probs(version, ids)[len(prompt) - 1 :] for version in (0, 1)]
        np.testing.assert_allclose(sampled[: old.end], references[0][: old.end], atol=TOLERANCE)
        np.testing.assert_allclose(sampled[new.start :], references[1][new.start :], atol=TOLERANCE)


def test_the_probe_of_a_swap_waits_for_no_response(tied: Engine) -> None:
    """More responses than the engine has slots (8): the probe is computed before any that still waits begins."""
    tied.swap(22)
    prompts = {f"long-{'x' * i}": [(7 * i + 3 * j * j) % VOCAB_SIZE for j in range(20)] for i in range(14)}

    async def fly() -> tuple[np.ndarray, int, int]:
        progress: dict[str, int] = {}
        requests = [asyncio.create_task(tied.generate(name, p, 200, progress)) for name, p in prompts.items()]
        while len(progress) < 8 or min(progress.values()) < 10:
            await asyncio.sleep(0.005)
        tied.learner.holds(1)
        await publish(tied.learner, tied.receivers, 23, PROBE)
        probe = await tied.receivers[0].probed()
        begun, done = len(progress), sum(request.done() for request in requests)
        await asyncio.gather(*requests)
        return probe, begun, done

    probe, begun, done = tied.run(fly())
    assert (begun, done) == (8, 0)
    np.testing.assert_allclose(probe, tied.learner.log_probs(1), atol=TOLERANCE)


def test_prefixes_of_the_old_weights_are_not_reused(tied: Engine) -> None:
    prompt = [(13 * j * j + j) % VOCAB_SIZE for j in range(300)]
    tied.swap(30)
    tied.run(tied.generate("fills", prompt, 1))
    # Whole blocks of 128 tokens, but not the last token.
    assert tied.run(tied.generate("hits", prompt, 1)).num_cached_tokens == 256
    tied.swap(31)
    output = tied.run(tied.generate("misses", prompt, 1))
    assert output.num_cached_tokens == 0
    [token] = output.outputs[0].token_ids
    expected = tied.learner.log_probs(1, np.array([*prompt, token], dtype=np.int32))[-1]
    assert output.outputs[0].logprobs[0][token].logprob == pytest.approx(float(expected), abs=TOLERANCE)


def test_probe_catches_a_wrong_weight(tied: Engine) -> None:
    tied.swap(40)
    result = tied.check(40)
    assert result.mean <= result.max <= TOLERANCE
    weight = tied.learner.models[0].model.layers[1].self_attn.o_proj.weight
    right = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.05)
    try:
        with pytest.raises(ProbeError, match=r"engine 0 does not compute with the learner's weights of version 40"):
            tied.check(40, tolerance=1e-3)
    finally:
        with torch.no_grad():
            weight.copy_(right)


def test_failures_leave_the_engine_at_work(tied: Engine) -> None:
    gc.collect()  # what earlier errors hold
    tied.swap(50)
    held = open_segments()
    model = tied.learner.models[1]

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(model.named_parameters())
        raise ConnectionError("a rank is gone")

    # The learner fails while it gathers: no engine has been touched.
    tied.learner.transfer = SharedMemoryTransfer(CheckpointStream(model, broken, torch.float32), rank=0)
    with pytest.raises(ConnectionError):
        tied.run(publish(tied.learner, tied.receivers, 51))
    tied.check(50)
    # An engine that is gone: the other resumes as it was.
    tied.receivers[7] = GoneReceiver()
    try:
        with pytest.raises(SwapError, match="failed to pause: engine 7") as failure:
            tied.swap(51)
    finally:
        del tied.receivers[7]
    assert failure.value.engines.keys() == {7}
    assert not tied.run(tied.llm.is_paused())
    tied.check(50)
    gc.collect()  # the errors above are parts of cycles
    assert open_segments() == held
