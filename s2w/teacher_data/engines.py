"""The vLLM engines that generate with a teacher's checkpoint: their settings, their start and their end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from s2w.actors.place import Reserve
from s2w.actors.starting import Watcher
from s2w.config.schema import Config, RolloutConfig
from s2w.models.checkpoint import ModelReference
from s2w.rollout.pool import RolloutPool
from s2w.rollout.serving import serving


def engine_settings(config: Config) -> RolloutConfig:
    """Settings of the pool of engines that generate with the teacher: off-policy responses, and held-out ones of the
    length of the student's."""
    teacher, off = config.teacher, config.off_policy
    return RolloutConfig(
        engines=off.engines or teacher.replicas,
        tensor_parallel=teacher.tensor_parallel,
        pipeline_parallel=teacher.pipeline_parallel,
        expert_parallel=teacher.expert_parallel,
        max_tokens=max(off.max_tokens, config.rollout.max_tokens),
        temperature=off.temperature,
        top_p=off.top_p,
        top_k=off.top_k,
        stop_thinking=config.rollout.stop_thinking,
        dtype=teacher.dtype,
        max_sequences=teacher.max_sequences,
        max_batched_tokens=teacher.max_batched_tokens,
        gpus=teacher.gpus,
        gpu_memory_utilization=teacher.gpu_memory_utilization,
        kv_cache_gib=teacher.kv_cache_gib,
        enforce_eager=teacher.enforce_eager,
        cpus=teacher.cpus,
        threads=teacher.threads,
        engine_args=teacher.engine_args,
    )


@asynccontextmanager
async def generating_engines(
    config: Config,
    settings: RolloutConfig,
    model: ModelReference,
    *,
    device: str,
    max_model_len: int,
    vocab_size: int,
    stop_token_ids: tuple[int, ...],
    name: str,
    watcher: Watcher | None,
    reserve: Reserve,
) -> AsyncIterator[RolloutPool]:
    """Engines that generate with a teacher, from their start to their end.

    Args:
        settings: from :func:`engine_settings`.
        model: the teacher's checkpoint.
        device, max_model_len, vocab_size, stop_token_ids: as in :class:`~s2w.rollout.engine.RolloutEngine`.
        name: of an engine in messages, before its number.
        watcher: shows how they start.
        reserve: finds their places.
    """
    async with (
        reserve(name, settings) as place,
        serving(
            settings,
            model,
            name=name,
            device=device,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            stop_token_ids=stop_token_ids,
            cluster=config.cluster,
            place=place,
        ) as pool,
    ):
        await pool.start(0, config.cluster.start_timeout_s, watcher)
        yield pool
