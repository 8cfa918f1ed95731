"""Numeric proof of a swap: log-probs of fixed tokens from an engine against those of the learner's model.

A swap can go wrong without an error (weights that a kernel keeps in a packed copy, a name that no loader takes), so
what the engine computes is compared, not what it was told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector


PROBE_PRIORITY = -1
"""Before that of other requests, 0, in engines that schedule by priority."""
STALE = 0.1
"""An engine this much nearer to the old weights than the update moved them has not taken the update."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """|log-prob difference| over the probe's tokens, in nats."""

    mean: float
    max: float


class ProbeError(RuntimeError):
    """An engine does not compute with the learner's weights."""


async def engine_log_probs(llm: AsyncLLM, token_ids: np.ndarray) -> np.ndarray:
    """Log-probs that the engine gives tokens 1 to n-1 of ``token_ids`` (int32 [n]), each after those before it.

    Returns:
        float32 [n-1], in nats. Computed afresh: vLLM does not read its prefix cache for prompt log-probs.
    """
    return await (await EngineProbe.enqueue(llm, token_ids)).result()


@dataclass(frozen=True, slots=True)
class EngineProbe:
    """A probe that waits in an engine, before all requests that are not running yet."""

    token_ids: list[int]
    output: RequestOutputCollector

    @classmethod
    async def enqueue(cls, llm: AsyncLLM, token_ids: np.ndarray) -> EngineProbe:
        """Hands ``token_ids`` (int32 [n]) to the engine, which may be paused."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ids = [int(token) for token in token_ids]
        parameters = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        request = {"prompt_token_ids": ids}
        return cls(ids, await llm.add_request(f"probe-{uuid4()}", request, parameters, priority=PROBE_PRIORITY))  # type: ignore[arg-type]

    async def result(self) -> np.ndarray:
        """As of :func:`engine_log_probs`."""
        output: Any = await self.output.get()
        values = [output.prompt_logprobs[i][token].logprob for i, token in enumerate(self.token_ids) if i]
        return np.array(values, dtype=np.float32)


@torch.no_grad()
def model_log_probs(model: PreTrainedModel, token_ids: np.ndarray, chunk_rows: int = 256) -> np.ndarray:
    """The same from a transformers model; under ZeRO-3 every rank must call it.

    Logits are made for ``chunk_rows`` positions at a time, so [n, V] in float32 is never whole.

    Returns:
        float32 [n-1], in nats.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.int64, device=model.device)
    chunks = []
    # The model's own forward, so that logit scales and caps are those of its architecture.
    for start in range(0, len(ids) - 1, chunk_rows):
        stop = min(start + chunk_rows, len(ids) - 1)
        logits = model(ids[None, :stop], use_cache=False, logits_to_keep=stop - start).logits[0]
        chunks.append(logits.float().log_softmax(-1).gather(-1, ids[start + 1 : stop + 1, None])[:, 0])
    return torch.cat(chunks).cpu().numpy()


def compare(
    engine: np.ndarray,
    learner: np.ndarray,
    previous: np.ndarray | None = None,
    *,
    name: str,
    version: int,
    tolerance: float,
) -> ProbeResult:
    """Compares the two, both float32 [n-1].

    Args:
        previous: the learner's log-probs before this update. An update may move them by less than ``tolerance``; an
            engine that still gives the old ones is found out all the same.
        name: of the engine, for the error's text.
        tolerance: largest allowed mean |difference|, in nats.

    Raises:
        ProbeError: the mean is larger, or not a number, or the engine computes with the previous weights.
    """
    difference = _distance(engine, learner)
    result = ProbeResult(float(difference.mean()), float(difference.max()))
    if not result.mean <= tolerance:
        raise ProbeError(
            f"{name} does not compute with the learner's weights of version {version}: log-probs of the probe differ "
            f"by {result.mean:.4g} nats on average ({result.max:.4g} at most), tolerance {tolerance:.4g}"
        )
    if previous is not None:
        moved, behind = float(_distance(learner, previous).mean()), float(_distance(engine, previous).mean())
        if behind < STALE * moved:
            raise ProbeError(
                f"{name} still computes with the weights before version {version}: log-probs of the probe differ by "
                f"{behind:.4g} nats from the old ones and by {result.mean:.4g} from the new ones"
            )
    return result


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.float64) - b)
