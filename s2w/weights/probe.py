"""Numeric proof of a swap: log-probs of fixed tokens from an engine against those of the learner's model.

A swap can go wrong without an error (weights that a kernel keeps in a packed copy, a name that no loader takes), so
what the engine computes is compared, not what it was sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
"""Ahead of other requests' 0, in engines that schedule by priority."""
TOKENS = 256
"""Most tokens of a probe."""
STALE = 0.1
"""An engine that has moved by less than this part of the update has not taken it."""
JUMP, PART = 3.0, 0.05
"""A median difference JUMP times as large as any before, and a mean of this part of the update, is not rounding."""
LACK, SIGMAS = 0.01, 6.0
"""Nor is a lack of this part of the update, by this many standard errors."""
FLOOR = 1e-3
"""Part of the tolerance: rounding is taken to be at least that."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """|log-prob difference| over the probe's tokens, in nats."""

    mean: float
    median: float
    max: float


class ProbeError(RuntimeError):
    """An engine does not compute with the learner's weights."""


def probe_tokens(prompts: Sequence[np.ndarray], longest: int) -> np.ndarray:
    """A probe from ``prompts``, int32 each: one after the other, up to :data:`TOKENS` and ``longest`` tokens."""
    return np.concatenate(prompts)[: min(TOKENS, longest)]


async def engine_log_probs(llm: AsyncLLM, token_ids: np.ndarray) -> np.ndarray:
    """Log-probs that the engine gives tokens 1 to n-1 of ``token_ids`` (int32 [n]), each after those before it.

    Returns:
        float32 [n-1], in nats. Always computed: vLLM does not read its prefix cache for prompt log-probs.
    """
    return await (await EngineProbe.enqueue(llm, token_ids)).result()


@dataclass(frozen=True, slots=True)
class EngineProbe:
    """A probe that waits in an engine, ahead of all requests that are not running yet."""

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
        """As in :func:`engine_log_probs`."""
        output: Any = await self.output.get()
        values = [output.prompt_logprobs[i][token].logprob for i, token in enumerate(self.token_ids) if i]
        return np.array(values, dtype=np.float32)


@torch.no_grad()
def model_log_probs(model: PreTrainedModel, token_ids: np.ndarray, chunk_rows: int = 256) -> np.ndarray:
    """The same from a transformers model; under ZeRO-3 every rank must call it.

    Logits are computed for ``chunk_rows`` positions at a time, so [n, V] in float32 never exists.

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
    usual: float = np.inf,
    *,
    name: str,
    version: int,
    tolerance: float,
) -> ProbeResult:
    """Compares the two, both float32 [n-1].

    In bfloat16 the tolerance must allow for rounding of the size of an update, so an engine with some of the old
    weights is told apart from rounding in two ways: its difference is far larger than at any earlier swap (JUMP,
    PART), or it falls short of the learner in the direction of the update, where rounding goes either way and
    averages out over the tokens (LACK, SIGMAS). With 256 tokens the second needs a lack of about 0.4 of
    the rounding at a token; a weight that is never taken falls behind by more at every swap.

    Measured in bfloat16 over 255 tokens, another attention kernel of transformers in the engine's place. A model of
    2 layers, six updates that moved the log-probs by 0.97 to 0.16 nats: good swaps differ by 0.4 to 0.7 times the
    first one's 0.011 nats and lack at most 0.15 % of the update (0.4 standard errors); with the last layer stale
    they differ by 3.9 to 11 times that, and lack 2 to 23 %. SmolLM2's 10-layer copy, an update of 6.8 nats: a good
    swap 0.6 times 0.10 nats and 0.03 % (0.2 standard errors); with the MLP of one layer stale 1.4 times that, which
    is within the tolerance, and 2.2 % (7.7). 168 good swaps of seven other models and learning rates, 1e-6 to 1e-2,
    from fresh and from large weights: at most 1.6 times and 2.1 standard errors.

    Args:
        previous: the learner's log-probs before this update. An update may move them by less than ``tolerance``; an
            engine that still gives the old ones, or has not taken all of the update, is found all the same.
        usual: the largest median |difference| of the run's earlier swaps, which is what rounding makes; infinite if
            there was none.
        name: the engine's, for the error message.
        tolerance: largest allowed mean |difference|, in nats.

    Raises:
        ProbeError: the mean is larger, or not a number, or the engine computes with weights of the previous version.
    """
    difference = _distance(engine, learner)
    result = ProbeResult(float(difference.mean()), float(np.median(difference)), float(difference.max()))
    if not result.mean <= tolerance:
        raise ProbeError(
            f"{name} does not compute with the learner's weights of version {version}: log-probs of the probe differ "
            f"by {result.mean:.4g} nats on average ({result.max:.4g} at most), tolerance {tolerance:.4g}"
        )
    if previous is None:
        return result
    moved, behind = float(_distance(learner, previous).mean()), float(_distance(engine, previous).mean())
    if behind < STALE * moved:
        raise ProbeError(
            f"{name} still computes with the weights before version {version}: log-probs of the probe differ by "
            f"{behind:.4g} nats from the old ones and by {result.mean:.4g} from the new ones"
        )
    usual = max(usual, FLOOR * tolerance)
    jumped = result.median > JUMP * usual and result.mean > PART * moved
    if jumped or _falls_short(engine, learner, previous, usual):
        raise ProbeError(
            f"{name} computes with some weights from before version {version}: log-probs of the probe differ by "
            f"{result.median:.4g} nats in the median, where {usual:.4g} was the most before, and the update moved "
            f"them by {moved:.4g} on average"
        )
    return result


def _falls_short(engine: np.ndarray, learner: np.ndarray, previous: np.ndarray, usual: float) -> bool:
    """The engine has not gone all the way from ``previous`` to ``learner``, beyond what rounding explains."""
    if not np.isfinite(usual):
        return False
    moved, difference = learner.astype(np.float64) - previous, engine.astype(np.float64) - learner
    short = -moved * difference
    # The learner's own rounding is in both factors; a standard deviation is 1.5 medians, and may have doubled.
    rounding = min((difference**2).mean(), (3 * usual) ** 2)
    error = short.std(ddof=1) / math.sqrt(len(short))
    return short.mean() > LACK * (moved**2).mean() and short.mean() - rounding > SIGMAS * error


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.float64) - b)
