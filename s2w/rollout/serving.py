"""Engines that run one checkpoint, for as long as they are needed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from s2w.actors.hardware import resolve_dtype
from s2w.actors.place import Places, anywhere
from s2w.config.schema import ClusterConfig, RolloutConfig
from s2w.models.checkpoint import ModelReference
from s2w.rollout.pool import RolloutPool


@asynccontextmanager
async def serving(
    config: RolloutConfig,
    model: ModelReference,
    *,
    name: str,
    device: str,
    max_model_len: int,
    vocab_size: int,
    stop_token_ids: tuple[int, ...],
    cluster: ClusterConfig,
    place: Places = anywhere,
) -> AsyncIterator[RolloutPool]:
    """Engines that :meth:`RolloutPool.start` loads; they end with the context.

    Args:
        config, name, cluster, place: as of :class:`RolloutPool`.
        model, device, max_model_len, vocab_size, stop_token_ids: see :class:`s2w.rollout.engine.RolloutEngine`.
    """
    pool = RolloutPool(
        config,
        name=name,
        model=model,
        device=device,
        dtype=resolve_dtype(config.dtype, device),
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        candidates=0,
        stop_token_ids=stop_token_ids,
        cluster=cluster,
        place=place,
    )
    try:
        yield pool
    finally:
        await pool.shutdown()
