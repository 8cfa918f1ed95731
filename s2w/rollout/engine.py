"""One vLLM engine that runs the student, in a Ray actor."""

from __future__ import annotations

import asyncio
import time
from itertools import count
from typing import Any

import numpy as np
import ray

from s2w.config import RolloutConfig
from s2w.records import Prompt, Rollout, VersionSpan
from s2w.vllm_actor import prepare_process
from s2w.weights.publish import ReceiveStep


class RolloutEngine:
    """An asyncio actor: every call is one request, vLLM batches them.

    Args:
        config: the pool's settings.
        index: this engine's number in the pool.
        model: path of the student's first checkpoint.
        device: ``cuda`` or ``cpu``.
        dtype: of the weights and products, resolved.
        max_model_len: longest prompt plus response, in tokens.
        candidates: top-k ids of the student to keep for each position; 0 for none (signal ``ids`` needs them).
    """

    def __init__(
        self,
        config: RolloutConfig,
        index: int,
        model: str,
        device: str,
        dtype: str,
        max_model_len: int,
        candidates: int,
    ) -> None:
        self.config, self.index, self.candidates = config, index, candidates
        self.max_model_len = max_model_len
        prepare_process(device, config.tensor_parallel, config.threads, config.kv_cache_gib)

        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        from s2w.weights.publish import WeightReceiver
        from s2w.weights.transfer import TRANSFERS

        batched = config.max_batched_tokens
        options: dict[str, Any] = {}
        if device == "cpu":
            # vLLM's CPU runner cannot rewind a request's seeded generator when it splits a prefill, so a batch
            # must hold the longest sequence whole.
            batched = max(batched or 2048, max_model_len)
            options["enable_chunked_prefill"] = False
        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=model,
                dtype=dtype,  # type: ignore[arg-type]  # a Literal of vLLM's
                tensor_parallel_size=config.tensor_parallel,
                max_model_len=max_model_len,
                max_num_seqs=config.max_sequences,
                max_num_batched_tokens=batched,
                gpu_memory_utilization=config.gpu_memory_utilization,
                enforce_eager=config.enforce_eager,
                enable_prefix_caching=True,
                max_logprobs=max(20, candidates),
                # Log-probs of the distribution that was sampled from: after temperature, top-p and top-k.
                logprobs_mode="processed_logprobs",
                weight_transfer_config=WeightTransferConfig(backend=TRANSFERS[device].backend),
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **options,
            )
        )
        self.weights = WeightReceiver(self.llm)
        self._requests = count()

    async def start(self, version: int) -> None:
        """Marks the loaded weights as policy ``version``; returns when the engine takes requests."""
        await self.llm.update_weight_version(str(version))

    async def generate(self, prompt: Prompt, sample: int, max_tokens: int | None = None) -> Rollout:
        """Samples response ``sample`` of ``prompt`` with seed ``prompt.seed + sample``."""
        from vllm import SamplingParams
        from vllm.logprobs import FlatLogprobs
        from vllm.sampling_params import RequestOutputKind

        config = self.config
        started = time.time()
        limit = self.max_model_len - len(prompt.token_ids)
        parameters = SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_tokens=min(max_tokens or config.max_tokens, limit),
            seed=prompt.seed + sample,
            logprobs=self.candidates,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request = f"{prompt.uid}#{sample}/{next(self._requests)}"
        stream = self.llm.generate({"prompt_token_ids": prompt.token_ids.tolist()}, parameters, request)
        [output] = [output async for output in stream]
        completion = output.outputs[0]
        flat = completion.logprobs
        assert isinstance(flat, FlatLogprobs) and completion.weight_versions
        first = np.asarray(flat.start_indices)
        # The sampled token comes first at each position, then the k most likely ones.
        candidates = None
        if self.candidates:
            ids = np.asarray(flat.token_ids, dtype=np.int32)
            candidates = ray.put(ids[first[:, None] + 1 + np.arange(self.candidates)])
        return Rollout(
            prompt=prompt,
            sample=sample,
            token_ids=np.asarray(completion.token_ids, dtype=np.int32),
            log_probs=np.asarray(flat.logprobs, dtype=np.float32)[first],
            versions=tuple(VersionSpan(span.start, span.end, int(span.version)) for span in completion.weight_versions),
            finish_reason=str(completion.finish_reason),
            engine=self.index,
            started=started,
            finished=time.time(),
            candidates=candidates,
        )

    async def generate_batch(self, requests: list[tuple[Prompt, int]]) -> list[Rollout]:
        """Samples all ``(prompt, sample)`` in batches whose composition is the same in every run.

        Float products depend in their last bits on what else is in the batch, and requests that arrive one by
        one meet different batches; so scheduling stops until all are queued in order, with an empty prefix cache.
        """
        await self.llm.pause_generation(mode="keep", clear_cache=True)
        queued = self.llm.get_num_unfinished_requests()
        tasks = []
        for prompt, sample in requests:
            tasks.append(asyncio.create_task(self.generate(prompt, sample)))
            queued += 1
            while self.llm.get_num_unfinished_requests() < queued and not tasks[-1].done():
                await asyncio.sleep(0)
        await self.llm.resume_generation()
        return await asyncio.gather(*tasks)

    async def receive_weights(self, step: ReceiveStep, *args: Any) -> None:
        """One step of a swap, see :class:`s2w.weights.publish.WeightReceiver`."""
        await getattr(self.weights, step)(*args)

    async def log_probs(self, token_ids: np.ndarray) -> np.ndarray:
        """float32 [n - 1]: what the engine's weights say of each of the n tokens but the first, in nats."""
        from s2w.weights.probe import engine_log_probs

        return await engine_log_probs(self.llm, token_ids)

    async def shutdown(self) -> None:
        """Ends vLLM's processes."""
        self.llm.shutdown()
