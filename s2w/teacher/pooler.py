"""Scores the rows of a prefill inside vLLM: the pooler of a teacher model.

A request has, in ``PoolingParams.extra_kwargs``:

- ``start``: first wanted row; rows ``start`` to the end of the input come back, one tensor per request;
- ``kind``, ``top_k``, ``temperature``: see :mod:`s2w.teacher.signal`;
- ``ids``: int32 [rows, k] as bytes (kinds ``ids`` and ``sampled``, the latter with k = 1: the next token);
- ``next``: int32 [rows] as bytes, the next tokens, where their log-probs are wanted besides a signal of another kind.

and gets back a tensor of its n rows:

- ``hidden``: [n, d], model dtype;
- ``topk``: int32 [n, 2 k + 1]: ids, then the bits of float32 log-probs and log tail mass;
- ``ids``: float32 [n, k + 1]: log-probs, then log tail mass;
- ``sampled``: float32 [n, 1];

and with ``next`` a float32 log-prob of the next token after the others, its bits as numbers of the tensor's dtype.

It runs on every tensor-parallel rank of the last pipeline stage, with the same requests in the same order, so
collectives are safe; each rank holds the logits of its own vocabulary shard and only [rows, k] is gathered.
Model runners V1 (CPU) and V2 (GPU) call it alike: it needs only the hidden states and the pooling cursor, never
the prompt's token ids, and V2 accepts it because its task is ``token_embed``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.tasks import PoolingTask
from vllm.v1.outputs import PoolerOutput
from vllm.v1.pool.metadata import PoolingMetadata

from s2w.actors.vocabulary_mask import vocabulary_of
from s2w.models.logits import LOGITS_BYTES, float32_product

_NEXT = ("next", 1)
"""Group of the log-probs of next tokens besides another signal."""
# vLLM's memory profiling sends no extra_kwargs: it must see the head's peak.
_PROFILING: dict[str, Any] = {"kind": "topk", "start": 0, "top_k": 64, "temperature": 1.0}


class ShardedHead:
    """A causal LM's own ``compute_logits``, left sharded over the vocabulary.

    Bias, soft cap and scale are the model's: its LogitsProcessor gathers nothing here, and multiplies in float32.

    Args:
        vocab_size: ids of the vocabulary; rows of the head from there on are padding.
    """

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
        if not processors:
            raise TypeError(f"{type(model).__name__} has no LogitsProcessor: it cannot be a teacher")
        for processor in processors:
            processor.forward = functools.partial(self._project, processor.forward)  # type: ignore[method-assign]
            processor._apply_head = functools.partial(_apply_head, processor._apply_head)  # type: ignore[method-assign]
        self._compute_logits = cast(Callable[[torch.Tensor], torch.Tensor], model.compute_logits)
        self._lm_head: VocabParallelEmbedding | None = None
        self._vocab_size = vocab_size

    def _project(
        self,
        forward: Callable[..., torch.Tensor | None],
        lm_head: VocabParallelEmbedding,
        hidden_states: torch.Tensor,
        embedding_bias: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        self._lm_head = lm_head  # which module it is differs from model to model (tied heads)
        return forward(lm_head, hidden_states, embedding_bias, skip_gather=True)

    def logits(self, hidden: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        """float32 [rows, shard], divided by ``temperature`` [rows, 1]; -inf at the shard's padding."""
        logits = self._compute_logits(hidden).float().div_(temperature)
        logits[:, self.stop - self.start :] = -torch.inf
        return logits

    @property
    def start(self) -> int:
        """First vocabulary id of this rank's shard; known once :meth:`logits` has run."""
        assert self._lm_head is not None
        return self._lm_head.shard_indices.org_vocab_start_index

    @property
    def stop(self) -> int:
        """The id after the shard's last one; ``start`` where the whole shard is padding."""
        assert self._lm_head is not None
        return max(self.start, min(self._lm_head.shard_indices.org_vocab_end_index, self._vocab_size))

    def gather(self, columns: torch.Tensor) -> torch.Tensor:
        """[rows, w] of each rank to [rows, ranks, w]."""
        assert self._lm_head is not None
        ranks = self._lm_head.tp_size
        gathered = tensor_model_parallel_all_gather(columns, dim=-1) if ranks > 1 else columns
        return gathered.view(len(columns), ranks, -1)


def _apply_head(
    apply_head: Callable[..., torch.Tensor],
    lm_head: VocabParallelEmbedding,
    hidden_states: torch.Tensor,
    embedding_bias: torch.Tensor | None,
) -> torch.Tensor:
    """The head's product, in float32 unless the head is quantised; vLLM's own is in the model's dtype."""
    quantised = not isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
    if quantised or hidden_states.dtype == torch.float32:
        return apply_head(lm_head, hidden_states, embedding_bias)
    logits = float32_product(hidden_states, cast(torch.Tensor, lm_head.weight))
    return logits if embedding_bias is None else logits + embedding_bias


def top_log_probs(
    head: ShardedHead, hidden: torch.Tensor, temperature: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k most likely ids int32 [rows, k], their log-probs and the log tail mass, float32 [rows, k] and [rows, 1]."""
    logits = head.logits(hidden, temperature)
    k = min(top_k, logits.shape[1])
    values, ids = logits.topk(k, dim=-1)
    tail = logits.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    # Ids travel as float32, exact below 2^24: the CPU all-gather has no integers.
    gathered = head.gather(torch.cat([values, (ids + head.start).float(), tail], -1))
    values, ids, tails = gathered[..., :k].flatten(1), gathered[..., k : 2 * k].flatten(1), gathered[..., -1]
    top, chosen = values.topk(top_k, dim=-1)
    rest = values.scatter(-1, chosen, -torch.inf)
    tail = torch.cat([rest, tails], -1).logsumexp(-1, keepdim=True)
    total = torch.cat([top, tail], -1).logsumexp(-1, keepdim=True)
    return ids.gather(-1, chosen).int(), top - total, tail - total


def sharded_log_probs(
    head: ShardedHead, hidden: torch.Tensor, temperature: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs at ``ids`` (int64 [rows, k]) and log mass of all others: float32 [rows, k] and [rows, 1]."""
    logits = head.logits(hidden, temperature)
    mine = (ids >= head.start) & (ids < head.stop)
    local = (ids - head.start).clamp_(0, logits.shape[1] - 1)
    picked = logits.gather(-1, local).masked_fill_(~mine, -torch.inf)
    total = logits.logsumexp(-1, keepdim=True)
    # The minimum with -inf takes an id out of the tail; with +inf, for another rank's id, it changes nothing.
    removed = torch.where(mine, -torch.inf, torch.inf)
    tail = logits.scatter_reduce_(-1, local, removed, "amin").logsumexp(-1, keepdim=True)
    gathered = head.gather(torch.cat([picked, total, tail], -1))
    total = gathered[..., -2].logsumexp(1, keepdim=True)
    tail = gathered[..., -1].logsumexp(1, keepdim=True)
    return gathered[..., :-2].amax(1) - total, tail - total


@dataclass
class _Piece:
    """The wanted rows of one request in this step."""

    request: int
    hidden: torch.Tensor
    temperature: float
    ids: torch.Tensor


def _ids(given: bytes, columns: int, rows: slice) -> torch.Tensor:
    """int64 [rows, columns] of a request's int32 ids."""
    return torch.from_numpy(np.frombuffer(given, np.int32).reshape(-1, columns)[rows].astype(np.int64))


class TeacherPooler(Pooler):
    """Turns hidden states of a prefill chunk into the signals that its requests asked for."""

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        super().__init__()
        rows = vllm_config.model_config.get_vocab_size()
        self._head = ShardedHead(model, vocabulary_of(vllm_config) or rows)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        # vLLM copies what each rank returns to the host, and takes the first one's.
        self._replies = ranks == 1 or get_tensor_model_parallel_rank() == 0
        shard = rows / ranks
        self._chunk_rows = max(1, int(LOGITS_BYTES / (4 * shard)))

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {"token_embed"}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> PoolerOutput:
        """One tensor for each request that ends in this step, None for the others."""
        cursor = pooling_metadata.get_pooling_cursor()
        counts, ends = cursor.num_scheduled_tokens_cpu.tolist(), cursor.seq_lens_cpu.tolist()
        rows: dict[int, torch.Tensor] = {}
        groups: dict[tuple[str, int], list[_Piece]] = {}
        offset = 0
        for i, params in enumerate(pooling_metadata.pooling_params):
            wanted = params.extra_kwargs or _PROFILING
            start, first, end = wanted["start"], ends[i] - counts[i], ends[i]
            low = max(start, first)
            hidden = hidden_states[offset + min(low, end) - first : offset + counts[i]]
            offset += counts[i]
            if first <= start:
                # Its first rows, or, after a preemption, its first rows again: prefix hits end at `start`.
                pooling_metadata.pooling_states[i].hidden_states_cache.clear()
            if not len(hidden):
                continue
            kind, temperature = wanted["kind"], wanted["temperature"]
            here = slice(low - start, end - start)
            if kind == "hidden":
                rows[i] = hidden.clone() if self._replies else hidden  # the next step writes to the same buffer
            else:
                top_k, ids = wanted["top_k"], torch.empty(len(hidden), 0, dtype=torch.int64)
                if kind != "topk":
                    ids = _ids(wanted["ids"], top_k, here)
                groups.setdefault((kind, top_k), []).append(_Piece(i, hidden, temperature, ids))
            if "next" in wanted:
                groups.setdefault(_NEXT, []).append(_Piece(i, hidden, temperature, _ids(wanted["next"], 1, here)))
        beside = self._score("sampled", 1, groups.pop(_NEXT)) if _NEXT in groups else {}
        for (kind, top_k), pieces in groups.items():
            rows |= self._score(kind, top_k, pieces)
        rows |= {i: torch.cat([rows[i], log_probs.view(rows[i].dtype)], -1) for i, log_probs in beside.items()}
        return [
            self._collect(state.hidden_states_cache, rows.get(i), finished)
            for i, (state, finished) in enumerate(
                zip(pooling_metadata.pooling_states, cursor.get_finished_mask(), strict=True)
            )
        ]

    def _score(self, kind: str, top_k: int, pieces: list[_Piece]) -> dict[int, torch.Tensor]:
        """Rows of every piece, by request: one pass over the head for all of them, in row chunks."""
        hidden = torch.cat([piece.hidden for piece in pieces])
        sizes = [len(piece.hidden) for piece in pieces]
        temperatures = np.repeat(np.array([piece.temperature for piece in pieces], np.float32), sizes)
        temperature = torch.from_numpy(temperatures)[:, None].to(hidden.device)
        ids = torch.cat([piece.ids for piece in pieces]).to(hidden.device)
        chunks = []
        for first in range(0, len(hidden), self._chunk_rows):
            chunk = slice(first, first + self._chunk_rows)
            if kind == "topk":
                top, log_probs, tail = top_log_probs(self._head, hidden[chunk], temperature[chunk], top_k)
                chunks.append(torch.cat([top, log_probs.view(torch.int32), tail.view(torch.int32)], -1))
            else:
                log_probs, tail = sharded_log_probs(self._head, hidden[chunk], temperature[chunk], ids[chunk])
                chunks.append(log_probs if kind == "sampled" else torch.cat([log_probs, tail], -1))
        return {piece.request: rows for piece, rows in zip(pieces, torch.cat(chunks).split(sizes), strict=True)}

    def _collect(self, parts: list[torch.Tensor], rows: torch.Tensor | None, finished: bool) -> torch.Tensor | None:
        """Adds ``rows`` to the parts of earlier chunks; returns all of them once the request is finished, on the rank
        that replies.

        The scheduler finishes the prefill that it began before it starts another, so only about one request's
        parts wait on the device.
        """
        if rows is not None and self._replies:
            parts.append(rows)
        if not finished:
            return None
        if not self._replies:
            return torch.empty(0)
        result = torch.cat(parts)
        parts.clear()
        return result
