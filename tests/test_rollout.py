"""Rollout engines: what they sample is what they say they sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from tiny_models import VOCAB_SIZE, make_checkpoint
from transformers import AutoModelForCausalLM

from s2w.config import RolloutConfig
from s2w.records import Prompt, Rollout
from s2w.rollout.pool import RolloutPool

CANDIDATES = 8
EOS = VOCAB_SIZE - 4
STOP_IDS = tuple(range(20))
CONFIG = RolloutConfig(
    engines=2, max_tokens=24, temperature=0.7, max_sequences=16, enforce_eager=True, cpus=0.1, kv_cache_gib=1
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tied", "tied", 0)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One loop for the module: the pool's actors answer to the loop that called them."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def pool(model_path: Path, loop: asyncio.AbstractEventLoop) -> Iterator[RolloutPool]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    pool = RolloutPool(
        CONFIG,
        model=str(model_path),
        device="cpu",
        dtype="float32",
        max_model_len=128,
        candidates=CANDIDATES,
        stop_token_ids=STOP_IDS,
    )
    loop.run_until_complete(pool.start(3, timeout_s=300))
    yield pool
    loop.run_until_complete(pool.shutdown())
    ray.shutdown()


def make_prompts(count: int) -> list[Prompt]:
    draw = np.random.default_rng(0)
    return [
        Prompt(
            uid=f"test/train/{i}",
            messages=(),
            token_ids=draw.integers(0, VOCAB_SIZE - 10, 10 + i, dtype=np.int32),
            mode="no_think",
            seed=1000 * i,
        )
        for i in range(count)
    ]


async def sample_all(pool: RolloutPool, requests: list[tuple[Prompt, int]]) -> list[Rollout]:
    return await asyncio.gather(*(pool.generate(prompt, sample) for prompt, sample in requests))


def test_log_probs_are_those_of_the_sampled_distribution(
    pool: RolloutPool, model_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    requests = [(prompt, sample) for prompt in make_prompts(3) for sample in range(2)]
    rollouts = loop.run_until_complete(sample_all(pool, requests))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for (prompt, sample), rollout in zip(requests, rollouts, strict=True):
        assert (rollout.prompt.uid, rollout.sample) == (prompt.uid, sample)
        n = len(rollout.token_ids)
        ended = rollout.token_ids[-1] in (*STOP_IDS, EOS)
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert ended or n == CONFIG.max_tokens
        assert [(span.start, span.stop, span.version) for span in rollout.versions] == [(0, n, 3)]
        with torch.no_grad():
            logits = model(torch.from_numpy(rollout.input_ids).long()[None]).logits[0, -n - 1 : -1]
        expected = (logits / CONFIG.temperature).log_softmax(-1)
        own = expected.gather(-1, torch.from_numpy(rollout.token_ids).long()[:, None])[:, 0]
        # float32 on both sides: what differs is the order of sums.
        torch.testing.assert_close(torch.from_numpy(rollout.log_probs), own, atol=2e-4, rtol=0)
        assert rollout.candidates is not None
        candidates = torch.from_numpy(np.array(ray.get(rollout.candidates))).long()
        assert candidates.shape == (n, CANDIDATES)
        torch.testing.assert_close(expected.gather(-1, candidates), expected.topk(CANDIDATES)[0], atol=2e-4, rtol=0)


def test_samples_of_a_prompt_differ_and_seeds_repeat_them(pool: RolloutPool, loop: asyncio.AbstractEventLoop) -> None:
    requests = [(make_prompts(1)[0], sample) for sample in range(6)]
    first = loop.run_until_complete(pool.generate_batch(requests))
    again = loop.run_until_complete(pool.generate_batch(requests))
    assert len({tuple(rollout.token_ids) for rollout in first}) == 6
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert np.array_equal(one.log_probs, other.log_probs)


def test_stop_ids_end_a_response(pool: RolloutPool, loop: asyncio.AbstractEventLoop) -> None:
    requests = [(prompt, sample) for prompt in make_prompts(4) for sample in range(8)]
    rollouts = loop.run_until_complete(sample_all(pool, requests))
    stopped = [rollout for rollout in rollouts if rollout.token_ids[-1] in STOP_IDS]
    # Each token is one of 20 of 512 ids.
    assert stopped and all(rollout.finish_reason == "stop" for rollout in stopped)
    assert all(not np.isin(rollout.token_ids[:-1], STOP_IDS).any() for rollout in rollouts)


def test_load_is_shared(pool: RolloutPool, loop: asyncio.AbstractEventLoop) -> None:
    requests = [(prompt, 0) for prompt in make_prompts(8)]
    rollouts = loop.run_until_complete(sample_all(pool, requests))
    engines = [rollout.engine for rollout in rollouts]
    assert engines.count(0) == engines.count(1) == 4


def test_engines_compute_log_probs_of_given_tokens(
    pool: RolloutPool, model_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    ids = make_prompts(5)[4].token_ids
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long()[None]).logits[0, :-1].log_softmax(-1)
    expected = expected.gather(-1, torch.from_numpy(ids).long()[1:, None])[:, 0]
    for engine in loop.run_until_complete(pool.log_probs(ids)):
        np.testing.assert_allclose(engine, expected.numpy(), atol=2e-4)
