"""One teacher engine in a Ray actor: vLLM's pooling runner with the scoring plugin."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import ray

from s2w.actors import stages
from s2w.actors.stages import Stage
from s2w.actors.vllm import fail_with_engine_core, prepare_process, telling_engine_death, telling_start_failure
from s2w.config.schema import TeacherConfig
from s2w.errors import RequestRefusedError
from s2w.models.checkpoint import ModelReference
from s2w.records import Rollout, TeacherSignal
from s2w.teacher.scoring import PREFIX, as_teacher
from s2w.teacher.signal import Payload, SignalRequest, check_finite, encode, nbytes

if TYPE_CHECKING:
    from vllm import PoolingParams, PoolingRequestOutput
    from vllm.v1.engine.output_processor import RequestOutputCollector


@dataclass
class _Job:
    """One rollout on its way through the engine."""

    rollout: Rollout
    request: SignalRequest
    candidates: np.ndarray | None
    """int32 [rows, k]: ids whose log-probs are wanted."""
    input_ids: list[int]
    params: PoolingParams
    started: float = 0.0
    collector: RequestOutputCollector | None = None


class TeacherEngine:
    """Scores rollouts; an asyncio actor, made and dispatched to by :class:`s2w.teacher.pool.TeacherPool`.

    Args:
        config: The teacher's settings.
        index: This replica's number in its pool.
        device: ``cuda`` or ``cpu``.
        dtype: ``bfloat16``, ``float16`` or ``float32``: of weights, matrix products and hidden states.
        max_model_len: Longest prompt plus response, in tokens.
        vocab_size: Ids that teacher and student share; rows of the head from there on are padding, and left out of the
            normalisation.
        spans_nodes: As of :class:`s2w.actors.place.Place`.
    """

    def __init__(
        self,
        config: TeacherConfig,
        index: int,
        device: str,
        dtype: str,
        max_model_len: int,
        vocab_size: int,
        spans_nodes: bool = False,
    ) -> None:
        stages.open_board()
        self._config = config
        self._index = index
        self._device = device
        self._dtype = dtype
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._spans_nodes = spans_nodes
        self._request_ids = itertools.count()
        self._running = 0
        self._busy_since = 0.0
        self._totals = {"busy_s": 0.0, "rollouts": 0, "rows": 0, "tokens": 0, "cached_tokens": 0, "bytes": 0}

    async def start(self) -> dict[str, Any]:
        """Loads the model; returns ``architecture``, ``hidden_size`` and ``dtype``."""
        config = self._config
        world = config.tensor_parallel * config.pipeline_parallel
        options = prepare_process(self._device, world, config.threads, config.kv_cache_gib, self._spans_nodes)
        stages.enter("importing vLLM")
        from vllm import AsyncEngineArgs
        from vllm.config import PoolerConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        from s2w.actors.vocabulary_mask import engine_option

        path = ModelReference.of(config.model, config.revision).resolve()
        stages.enter("starting vLLM")
        arguments: dict[str, Any] = dict(
            model=str(path),
            dtype=self._dtype,
            max_model_len=self._max_model_len,
            runner="pooling",
            pooler_config=PoolerConfig(task="token_embed"),
            hf_overrides=as_teacher,
            additional_config=engine_option(self._vocab_size),
            skip_tokenizer_init=True,
            tensor_parallel_size=config.tensor_parallel,
            pipeline_parallel_size=config.pipeline_parallel,
            enable_expert_parallel=config.expert_parallel,
            max_num_batched_tokens=config.max_batched_tokens,
            max_num_seqs=config.max_sequences,
            enable_chunked_prefill=True,
            enable_prefix_caching=True,
            # vLLM's default on CPU is 128: few prompts would share a whole block.
            block_size=32 if self._device == "cpu" else None,
            gpu_memory_utilization=config.gpu_memory_utilization * config.gpus,
            enforce_eager=config.enforce_eager,
            disable_log_stats=True,
        )
        with telling_start_failure():
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**(arguments | options | config.engine_args)))
        fail_with_engine_core(self._engine)
        model = self._engine.model_config
        stages.enter(stages.UP)
        return {
            "architecture": model.architecture.removeprefix(PREFIX),
            "hidden_size": model.get_hidden_size(),
            "dtype": str(model.dtype).removeprefix("torch."),
        }

    async def stage(self) -> Stage:
        """What it does while it starts; see :mod:`s2w.actors.starting`."""
        return stages.current()

    async def score(self, rollout: Rollout, request: SignalRequest) -> TeacherSignal:
        """Scores one rollout; the payload stays in the object store of this actor's node.

        A cancelled call takes its request out of the engine.

        Raises:
            RequestRefusedError: for an empty response, ids outside the vocabulary, or too long an input.
            FloatingPointError: if a signal other than ``hidden`` is not finite.
            EngineDiedError: if the engine is gone.
        """
        job = await self._prepare(rollout, request)
        await self._enqueue(job)
        return await self._finish(job)

    async def score_batch(self, rollouts: list[Rollout], request: SignalRequest) -> list[TeacherSignal]:
        """Scores ``rollouts`` so that the same call gives the same bits.

        Matrix products depend on what shares their batch, so the scheduler sees nothing until it can see everything,
        in this order, with an empty prefix cache. Nothing else may be in the engine meanwhile.
        """
        jobs = await asyncio.gather(*(self._prepare(rollout, request) for rollout in rollouts))
        await self.pause()
        try:
            for job in jobs:
                await self._enqueue(job)
        except RequestRefusedError:
            await self._engine.abort([job.collector.request_id for job in jobs if job.collector], internal=True)
            raise
        finally:
            await self.resume()
        tasks = [asyncio.create_task(self._finish(job)) for job in jobs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # those still waiting when another has failed

    async def pause(self) -> None:
        """Stops scheduling and empties the prefix cache; requests that arrive wait for :meth:`resume`."""
        with telling_engine_death(self._engine):
            await self._engine.pause_generation(mode="keep", clear_cache=True)

    async def resume(self) -> None:
        """Schedules what waits, in its order of arrival."""
        with telling_engine_death(self._engine):
            await self._engine.resume_generation()

    async def stats(self) -> dict[str, float]:
        """Totals since the start.

        ``busy_s`` (seconds with a request in the engine), ``rollouts``, ``rows`` (response tokens scored), ``tokens``
        (prompt and response tokens), ``cached_tokens`` (those of them that the prefix cache held), ``bytes`` (of
        payloads).
        """
        running = time.perf_counter() - self._busy_since if self._running else 0.0
        return {**self._totals, "busy_s": self._totals["busy_s"] + running}

    async def beat(self) -> None:
        """A sign of life, which the engine core gives between two steps."""
        with telling_engine_death(self._engine):
            await self._engine.is_sleeping()

    async def shutdown(self) -> None:
        """Ends the engine's processes."""
        self._engine.shutdown()

    async def _prepare(self, rollout: Rollout, request: SignalRequest) -> _Job:
        from vllm import PoolingParams

        input_ids, rows = rollout.input_ids, len(rollout.token_ids)
        if not rows or not len(rollout.prompt.token_ids):
            raise RequestRefusedError(f"{rollout.uid}: the prompt or the response is empty")
        if len(input_ids) > self._max_model_len:
            raise RequestRefusedError(
                f"{rollout.uid}: {len(input_ids)} tokens, but the teacher's limit is {self._max_model_len}"
            )
        self._check_ids(input_ids, rollout, "token ids")
        wanted: dict[str, Any] = {
            "kind": request.kind,
            "start": len(rollout.prompt.token_ids) - 1,
            "top_k": request.top_k,
            "temperature": request.temperature,
        }
        candidates = None
        if request.kind == "ids":
            if rollout.candidates is None:
                raise RequestRefusedError(f"{rollout.uid}: signal kind ids needs the student's candidates")
            candidates = np.ascontiguousarray(await rollout.candidates, np.int32)
            if candidates.ndim != 2 or len(candidates) != rows:
                raise RequestRefusedError(
                    f"{rollout.uid}: candidates of shape {candidates.shape} for {rows} response tokens"
                )
            self._check_ids(candidates, rollout, "candidates")
        elif request.kind == "sampled":
            candidates = np.ascontiguousarray(rollout.token_ids, np.int32)[:, None]
        elif request.kind == "topk" and request.top_k > self._vocab_size:
            raise RequestRefusedError(f"top_k {request.top_k} exceeds the vocabulary of {self._vocab_size}")
        if request.sampled and request.kind != "sampled":
            wanted["next"] = np.ascontiguousarray(rollout.token_ids, np.int32).tobytes()
        if candidates is not None:
            wanted |= {"top_k": candidates.shape[1], "ids": candidates.tobytes()}
        # By default vLLM keeps token_embed requests out of the prefix cache.
        params = PoolingParams(task="token_embed", skip_reading_prefix_cache=False, extra_kwargs=wanted)
        # No row is wanted after the last token, so it is not computed.
        return _Job(rollout, request, candidates, input_ids[:-1].tolist(), params)

    def _check_ids(self, ids: np.ndarray, rollout: Rollout, what: str) -> None:
        if ids.size and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise RequestRefusedError(
                f"{rollout.uid}: {what} from {ids.min()} to {ids.max()}, the shared vocabulary has "
                f"{self._vocab_size} tokens"
            )

    async def _enqueue(self, job: _Job) -> None:
        """Adds the request to the engine, after those that were added before."""
        from vllm.exceptions import VLLMClientError

        job.started = time.time()
        request_id = f"{job.rollout.uid}-{next(self._request_ids)}"
        try:
            with telling_engine_death(self._engine):
                job.collector = await self._engine.add_request(
                    request_id, {"prompt_token_ids": job.input_ids}, job.params
                )
        except (VLLMClientError, ValueError) as error:
            raise RequestRefusedError(f"teacher {self._index} rejected {job.rollout.uid!r}: {error}") from error

    async def _finish(self, job: _Job) -> TeacherSignal:
        """Waits for the rows of an enqueued request and stores them."""
        collector = job.collector
        assert collector is not None
        if not self._running:
            self._busy_since = time.perf_counter()
        self._running += 1
        try:
            with telling_engine_death(self._engine):
                output = cast("PoolingRequestOutput", await collector.get())
        except asyncio.CancelledError:
            await self._engine.abort(collector.request_id, internal=True)
            raise
        finally:
            self._running -= 1
            if not self._running:
                self._totals["busy_s"] += time.perf_counter() - self._busy_since
        return await self._store(job, output)

    async def _store(self, job: _Job, output: PoolingRequestOutput) -> TeacherSignal:
        uid, rows, kind = job.rollout.uid, len(job.rollout.token_ids), job.request.kind
        if output.error is not None:
            raise RuntimeError(f"{uid}: teacher {self._index}: {output.error}")
        data = output.outputs.data
        if len(data) != rows:
            raise RuntimeError(f"{uid}: teacher {self._index} returned {len(data)} rows for {rows} response tokens")

        def put() -> tuple[Payload, ray.ObjectRef]:
            payload = encode(kind, data, job.candidates, job.request.dtype, job.request.sampled)
            if kind != "hidden":
                # No NaN or infinity in hidden states gets past the loss; a pass over them here would take half as
                # long as the copy.
                check_finite(payload, uid)
            return payload, ray.put(payload)

        # A long response is 100 MB of hidden states: the event loop serves the other requests meanwhile.
        began = time.perf_counter()
        payload, reference = await asyncio.to_thread(put)
        put_seconds = time.perf_counter() - began
        size = nbytes(payload)
        self._totals["rollouts"] += 1
        self._totals["rows"] += rows
        self._totals["tokens"] += len(job.input_ids)
        self._totals["cached_tokens"] += output.num_cached_tokens
        self._totals["bytes"] += size
        return TeacherSignal(
            kind=kind,
            rows=rows,
            payload=reference,
            nbytes=size,
            teacher=self._index,
            started=job.started,
            finished=time.time(),
            cached_tokens=output.num_cached_tokens,
            put_seconds=put_seconds,
        )
