"""One vLLM engine that runs the student, in a Ray actor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from s2w.actors import stages
from s2w.actors.stages import Stage
from s2w.actors.vllm import fail_with_engine_core, prepare_process, telling_engine_death, telling_start_failure
from s2w.config.schema import RolloutConfig
from s2w.data.tasks import derive_seed
from s2w.errors import RequestRefusedError
from s2w.models.checkpoint import ModelReference
from s2w.records import Request, Rollout, Sampling, VersionSpan
from s2w.rollout.thinking import ThinkingStop

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput

ATTEMPTS = 3
"""How often a response that vLLM aborts is asked for."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of a response: what one request sampled, or what was inserted."""

    token_ids: np.ndarray
    """int32 [n]."""
    log_probs: np.ndarray
    """float32 [n], nats."""
    candidates: np.ndarray
    """int32 [n, k]."""
    versions: tuple[VersionSpan, ...]
    """Counted from the start of the part; empty if it was inserted."""
    finish_reason: str


def _inserted(token_ids: np.ndarray, candidates: int) -> _Part:
    # Distinct ids, as a teacher that scores candidates expects them.
    ids = np.tile(np.arange(candidates, dtype=np.int32), (len(token_ids), 1))
    return _Part(token_ids, np.zeros(len(token_ids), np.float32), ids, versions=(), finish_reason="length")


@dataclass(slots=True)
class _Draft:
    """A response in progress."""

    request: Request
    limit: int
    """Most tokens that it may have."""
    budget: int | None
    """Tokens after which an open think block is closed."""
    started: float
    watch: Callable[[np.ndarray], None] | None = None
    """Called with the tokens so far, int32 [n], whenever there are more."""
    finished: float = 0.0
    parts: list[_Part] = field(default_factory=list)

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [n], all parts."""
        return np.concatenate([np.empty(0, np.int32), *(part.token_ids for part in self.parts)])

    @property
    def unfinished(self) -> bool:
        """The last request ended at the thinking budget."""
        return self.parts[-1].finish_reason == "length" and len(self.token_ids) < self.limit

    def versions(self) -> tuple[VersionSpan, ...]:
        """Spans of the whole response; adjacent ones of one version are one span."""
        spans: list[VersionSpan] = []
        for start, part in self._starts():
            for span in part.versions:
                moved = VersionSpan(start + span.start, start + span.stop, span.version)
                if spans and (spans[-1].stop, spans[-1].version) == (moved.start, moved.version):
                    moved = VersionSpan(spans.pop().start, moved.stop, moved.version)
                spans.append(moved)
        return tuple(spans)

    def forced(self) -> tuple[tuple[int, int], ...]:
        """Where the inserted parts are."""
        return tuple((start, start + len(part.token_ids)) for start, part in self._starts() if not part.versions)

    def _starts(self) -> Iterator[tuple[int, _Part]]:
        start = 0
        for part in self.parts:
            yield start, part
            start += len(part.token_ids)


class RolloutEngine:
    """An asyncio actor: every call is one request, vLLM batches them.

    Args:
        config: the pool's settings.
        index: this engine's number in the pool.
        model: the student's first checkpoint.
        device: ``cuda`` or ``cpu``.
        dtype: dtype of weights and matrix products, resolved.
        max_model_len: longest prompt plus response, in tokens.
        vocab_size: ids of the vocabulary; rows of the head from there on are padding, which is never sampled.
        candidates: top-k ids of the student to keep for each position; 0 for none (signal ``ids`` needs them).
        stop_token_ids: end-of-sequence ids of the student's checkpoint; vLLM itself knows only those of its files.
        spans_nodes: as of :class:`s2w.actors.place.Place`.
    """

    def __init__(
        self,
        config: RolloutConfig,
        index: int,
        model: ModelReference,
        device: str,
        dtype: str,
        max_model_len: int,
        vocab_size: int,
        candidates: int,
        stop_token_ids: tuple[int, ...],
        spans_nodes: bool = False,
    ) -> None:
        stages.open_board()
        self.config, self.index, self.candidates = config, index, candidates
        self.stop_token_ids = stop_token_ids
        self.max_model_len = max_model_len
        self._checkpoint, self._device, self._dtype, self._vocab_size = model, device, dtype, vocab_size
        self._spans_nodes = spans_nodes
        self._requests = count()

    async def start(self, version: int) -> None:
        """Loads the model as policy ``version``; returns when the engine takes requests."""
        config, device = self.config, self._device
        world = config.tensor_parallel * config.pipeline_parallel
        options = prepare_process(device, world, config.threads, config.kv_cache_gib, self._spans_nodes)
        stages.enter("importing vLLM")

        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        from s2w.actors.vocabulary_mask import engine_option
        from s2w.weights.backends import backend_of
        from s2w.weights.publish import EngineWeights

        batched = config.max_batched_tokens
        if device == "cpu":
            # vLLM's CPU runner cannot rewind a request's seeded generator when it splits a prefill, so a batch
            # must hold the longest sequence whole.
            batched = max(batched or 2048, self.max_model_len)
            options["enable_chunked_prefill"] = False
        path = self._checkpoint.resolve()
        stages.enter("starting vLLM")
        arguments: dict[str, Any] = dict(
            model=str(path),
            dtype=self._dtype,
            tensor_parallel_size=config.tensor_parallel,
            pipeline_parallel_size=config.pipeline_parallel,
            enable_expert_parallel=config.expert_parallel,
            max_model_len=self.max_model_len,
            max_num_seqs=config.max_sequences,
            max_num_batched_tokens=batched,
            gpu_memory_utilization=config.gpu_memory_utilization * config.gpus,
            enforce_eager=config.enforce_eager,
            scheduling_policy="priority",  # Only probes have one; all else is first come, first served.
            enable_prefix_caching=True,
            max_logprobs=max(20, self.candidates),
            # Log-probs of the distribution that was sampled from: after temperature, top-p and top-k.
            logprobs_mode="processed_logprobs",
            additional_config=engine_option(self._vocab_size),
            weight_transfer_config=WeightTransferConfig(backend=backend_of(device, config.gpus)),
            disable_log_stats=True,
        )
        with telling_start_failure():
            self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**(arguments | options | config.engine_args)))
        self.weights = EngineWeights(self.llm)
        fail_with_engine_core(self.llm)
        with telling_engine_death(self.llm):
            await self.llm.update_weight_version(str(version))
        stages.enter(stages.UP)

    async def stage(self) -> Stage:
        """What it does while it starts; see :mod:`s2w.actors.starting`."""
        return stages.current()

    @cached_property
    def thinking_stop(self) -> ThinkingStop:
        """Closes think blocks when the thinking budget is spent."""
        return ThinkingStop(self.config.stop_thinking, self.llm.get_tokenizer())  # type: ignore[arg-type]

    async def generate(self, request: Request) -> Rollout:
        """Samples a response.

        Raises:
            RequestRefusedError: vLLM rejects the request.
        """
        return await self._finish(self._draft(request))

    async def stream(self, request: Request) -> AsyncIterator[np.ndarray | Rollout]:
        """Like :meth:`generate`; yields the tokens so far, int32 [n], as they come, and the response at last."""
        draft, news = self._draft(request), asyncio.Event()
        seen: list[np.ndarray] = []

        def watch(token_ids: np.ndarray) -> None:
            seen[:] = [token_ids]
            news.set()

        draft.watch = watch
        task = asyncio.create_task(self._finish(draft))
        task.add_done_callback(lambda _: news.set())
        try:
            while not task.done():
                await news.wait()
                news.clear()
                while seen:
                    yield seen.pop()
            yield await task
        finally:
            task.cancel()

    async def _finish(self, draft: _Draft) -> Rollout:
        with telling_engine_death(self.llm):
            await self._extend(draft)
            if draft.unfinished:
                await self._extend(draft)
        return self._rollout(draft)

    async def generate_batch(self, requests: list[Request]) -> list[Rollout]:
        """Samples all of them in batches composed in the same way in every run; errors as above."""
        drafts = [self._draft(request) for request in requests]
        with telling_engine_death(self.llm):
            await self._extend_together(drafts)
            if unfinished := [draft for draft in drafts if draft.unfinished]:
                await self._extend_together(unfinished)
        return [self._rollout(draft) for draft in drafts]

    def _draft(self, request: Request) -> _Draft:
        prompt, config = request.prompt, self.config
        longest = config.max_tokens if request.max_tokens is None else min(request.max_tokens, config.max_tokens)
        limit = min(longest, self.max_model_len - len(prompt.token_ids))
        budget = config.thinking_budget if request.thinking_budget is None else request.thinking_budget
        if prompt.mode != "think" or (budget is not None and budget >= limit):
            budget = None
        if budget is not None and budget + len(self.thinking_stop.token_ids) >= limit:
            budget = None
        return _Draft(request, limit, budget, started=time.time())

    async def _extend(self, draft: _Draft) -> None:
        """One request: the response up to its thinking budget, or what follows it."""
        seed = draft.request.prompt.seed + draft.request.sample
        if draft.parts:
            # The generator starts over: the same seed would draw the same numbers again.
            seed = derive_seed("after the thinking budget", seed)
        stop = draft.limit if draft.parts or draft.budget is None else draft.budget
        part = await self._sample(draft, stop - len(draft.token_ids), seed)
        draft.parts.append(part)
        spent = len(draft.parts) == 1 and draft.unfinished
        if spent and self.thinking_stop.is_open(draft.token_ids):
            draft.parts.append(_inserted(self.thinking_stop.token_ids, self.candidates))
        draft.finished = time.time()

    async def _sample(self, draft: _Draft, max_tokens: int, seed: int) -> _Part:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.logprobs import FlatLogprobs
        from vllm.sampling_params import RequestOutputKind

        config = self.config
        sampling = draft.request.sampling or Sampling(config.temperature, config.top_p, config.top_k)
        try:
            parameters = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=max_tokens,
                seed=seed,
                stop_token_ids=list(self.stop_token_ids),
                logprobs=self.candidates,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.CUMULATIVE if draft.watch else RequestOutputKind.FINAL_ONLY,
            )
            completion = await self._complete(draft, parameters)
        except (VLLMClientError, ValueError) as error:
            raise RequestRefusedError(f"rollout engine {self.index} rejected {draft.request.uid!r}: {error}") from error
        flat = completion.logprobs
        assert isinstance(flat, FlatLogprobs) and completion.weight_versions
        first = np.asarray(flat.start_indices)
        # The sampled token comes first at each position, then the k most likely ones.
        top = np.asarray(flat.token_ids, dtype=np.int32)[first[:, None] + 1 + np.arange(self.candidates)]
        return _Part(
            token_ids=np.asarray(completion.token_ids, dtype=np.int32),
            log_probs=np.asarray(flat.logprobs, dtype=np.float32)[first],
            candidates=top,
            versions=tuple(VersionSpan(span.start, span.end, int(span.version)) for span in completion.weight_versions),
            finish_reason=str(completion.finish_reason),
        )

    async def _complete(self, draft: _Draft, parameters: SamplingParams) -> CompletionOutput:
        """The output of a completed request; asks again if vLLM aborted it.

        Raises:
            RuntimeError: vLLM aborted it :data:`ATTEMPTS` times.
        """
        uid, before = draft.request.uid, draft.token_ids
        ids = np.concatenate([draft.request.prompt.token_ids, before]).tolist()
        for _ in range(ATTEMPTS):
            name = f"{uid}/{next(self._requests)}"
            async for output in self.llm.generate({"prompt_token_ids": ids}, parameters, name):
                completion = output.outputs[0]
                if draft.watch is not None:
                    draft.watch(np.concatenate([before, np.asarray(completion.token_ids, np.int32)]))
            # Not "abort" or "error": such a response would pass for a complete one.
            if completion.finish_reason in ("stop", "length"):
                return completion
        raise RuntimeError(
            f"rollout engine {self.index} aborted the response {uid} {ATTEMPTS} times, the last with "
            f"finish_reason={completion.finish_reason!r} after {len(completion.token_ids)} tokens"
        )

    async def _extend_together(self, drafts: list[_Draft]) -> None:
        """:meth:`_extend` for all of them, repeatably.

        The last bits of matrix products depend on what else is in the batch, and requests that arrive one by one
        end up in different batches; so scheduling stops until all are queued in order, with an empty prefix cache.
        """
        await self.llm.pause_generation(mode="keep", clear_cache=True)
        tasks: list[asyncio.Task[None]] = []
        try:
            for draft in drafts:
                queued = self.llm.get_num_unfinished_requests()
                tasks.append(asyncio.create_task(self._extend(draft)))
                # While scheduling is stopped, only a rejected request ends.
                while self.llm.get_num_unfinished_requests() == queued and not tasks[-1].done():
                    await asyncio.sleep(0)
        finally:
            await self.llm.resume_generation()
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # those still running when another has failed

    def _rollout(self, draft: _Draft) -> Rollout:
        candidates = np.concatenate([part.candidates for part in draft.parts])
        return Rollout(
            prompt=draft.request.prompt,
            sample=draft.request.sample,
            token_ids=draft.token_ids,
            log_probs=np.concatenate([part.log_probs for part in draft.parts]),
            versions=draft.versions(),
            finish_reason=draft.parts[-1].finish_reason,
            engine=self.index,
            started=draft.started,
            finished=draft.finished,
            candidates=ray.put(candidates) if self.candidates else None,
            forced=draft.forced(),
        )

    async def connect_weights(self, info: dict[str, Any]) -> None:
        """A step of a swap, see :class:`s2w.weights.publish.EngineWeights`; so are the next four."""
        with telling_engine_death(self.llm):
            await self.weights.connect(info)

    async def pause(self) -> None:
        with telling_engine_death(self.llm):
            await self.weights.pause()

    async def load_weights(self, info: dict[str, Any]) -> None:
        with telling_engine_death(self.llm):
            await self.weights.load(info)

    async def finish_weights(self, version: int, probe_ids: np.ndarray | None) -> None:
        with telling_engine_death(self.llm):
            await self.weights.finish(version, probe_ids)

    async def resume(self) -> None:
        with telling_engine_death(self.llm):
            await self.weights.resume()

    async def log_probs(self, token_ids: np.ndarray) -> np.ndarray:
        """float32 [n - 1]: log-probs of the n tokens but the first under the engine's weights, in nats."""
        from s2w.weights.probe import engine_log_probs

        with telling_engine_death(self.llm):
            return await engine_log_probs(self.llm, token_ids)

    async def probed(self) -> np.ndarray:
        """Like :meth:`log_probs`, for the last swap's probe."""
        with telling_engine_death(self.llm):
            return await self.weights.probed()

    async def beat(self) -> None:
        """A sign of life, which the engine core gives between two steps."""
        with telling_engine_death(self.llm):
            await self.llm.is_sleeping()

    async def shutdown(self) -> None:
        """Ends vLLM's processes."""
        self.llm.shutdown()
