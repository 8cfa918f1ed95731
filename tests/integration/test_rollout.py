"""Rollout engines: what they sample is what they say they sampled, and thinking ends at its budget."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from tiny_models import VOCAB_SIZE, add_to_hub_cache, make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2w.actors.failures import reason
from s2w.config.schema import RolloutConfig
from s2w.errors import ConfigError, RequestRefusedError
from s2w.models.checkpoint import ModelReference, resolve_path
from s2w.records import Mode, Prompt, Request, Rollout, Sampling
from s2w.rollout.engine import ATTEMPTS
from s2w.rollout.pool import RolloutPool

CANDIDATES = 8
ROWS = VOCAB_SIZE + 70
"""Of the head: those past the vocabulary are the likeliest of all, and never to be sampled, listed or counted."""
EOS, THINK_CLOSE_ID = VOCAB_SIZE - 4, VOCAB_SIZE - 2
STOP_IDS = tuple(range(20))
BUDGET = 6
CONFIG = RolloutConfig(
    engines=2,
    max_tokens=36,
    temperature=0.7,
    thinking_budget=BUDGET,
    stop_thinking="Time is up.\n</think>\n\n",
    max_sequences=16,
    enforce_eager=True,
    cpus=0.1,
    kv_cache_gib=1,
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template opens the think block, and that closes it every now and then by itself."""
    path = make_checkpoint(tmp_path_factory.mktemp("models") / "untied", "untied", 0, vocab_size=ROWS)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- endif %}\n{%- endif %}", "{%- else %}\n{{- '<think>\\n' }}\n{%- endif %}\n{%- endif %}"
    )
    tokenizer.save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    # A logit of three times the usual spread: the largest of all at about one position in ten.
    model.lm_head.weight.data[THINK_CLOSE_ID] *= 3
    model.lm_head.weight.data[VOCAB_SIZE:] *= 3
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One loop for the module: the pool's actors answer to the loop that called them."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def pool(
    model_path: Path, loop: asyncio.AbstractEventLoop, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RolloutPool]:
    """The engines' nodes have another hub cache than this process, which knows no such model."""
    cache = tmp_path_factory.mktemp("hub")
    add_to_hub_cache(cache, "tiny/student", model_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(cache))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with pytest.raises(ConfigError, match="Cannot get 'tiny/student'"):
        resolve_path("tiny/student")
    pool = RolloutPool(
        CONFIG,
        model=ModelReference.of("tiny/student", "main"),
        device="cpu",
        dtype="float32",
        max_model_len=128,
        vocab_size=VOCAB_SIZE,
        candidates=CANDIDATES,
        stop_token_ids=STOP_IDS,
    )
    loop.run_until_complete(pool.start(3, timeout_s=300))
    yield pool
    loop.run_until_complete(pool.shutdown())
    ray.shutdown()


def make_prompts(count: int, mode: Mode = "no_think") -> list[Prompt]:
    draw = np.random.default_rng(0)
    return [
        Prompt(
            uid=f"test/train/{i}",
            messages=(),
            token_ids=draw.integers(0, VOCAB_SIZE - 10, 10 + i, dtype=np.int32),
            mode=mode,
            seed=1000 * i,
        )
        for i in range(count)
    ]


def test_an_engine_and_its_core_tell_what_they_do(pool: RolloutPool) -> None:
    stages = ray.get([member.actor.stage.remote() for member in pool.pool.members])
    assert [stage.name for stage in stages] == ["up", "up"]
    # The actor: starting, importing vLLM, downloading, starting vLLM, up. Its core: loading weights, profiling memory,
    # warming up.
    assert [stage.number for stage in stages] == [8, 8]


async def sample_all(pool: RolloutPool, requests: list[Request]) -> list[Rollout]:
    return await asyncio.gather(*(pool.generate(request) for request in requests))


@pytest.mark.parametrize("mode", ["no_think", "think"])
def test_log_probs_are_those_of_the_sampled_distribution(
    pool: RolloutPool, model_path: Path, loop: asyncio.AbstractEventLoop, mode: Mode
) -> None:
    requests = [Request(prompt, sample) for prompt in make_prompts(3, mode) for sample in range(4)]
    rollouts = loop.run_until_complete(sample_all(pool, requests))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for request, rollout in zip(requests, rollouts, strict=True):
        assert (rollout.prompt.uid, rollout.sample, rollout.uid) == (request.prompt.uid, request.sample, request.uid)
        n = len(rollout.token_ids)
        ended = rollout.token_ids[-1] in (*STOP_IDS, EOS)
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert ended or n == CONFIG.max_tokens
        sampled = np.ones(n, bool)
        for start, stop in rollout.forced:
            sampled[start:stop] = False
        # Every sampled token has its version, and no other has one.
        written = np.zeros(n, bool)
        for span in rollout.versions:
            assert span.version == 3 and not written[span.start : span.stop].any()
            written[span.start : span.stop] = True
        assert np.array_equal(written, sampled)
        assert mode == "think" or (rollout.forced == () and len(rollout.versions) == 1)
        with torch.no_grad():
            logits = model(torch.from_numpy(rollout.input_ids).long()[None]).logits[0, -n - 1 : -1, :VOCAB_SIZE]
        expected = (logits / CONFIG.temperature).log_softmax(-1)
        own = expected.gather(-1, torch.from_numpy(rollout.token_ids).long()[:, None])[:, 0]
        # float32 on both sides: what differs is the order of sums.
        torch.testing.assert_close(torch.from_numpy(rollout.log_probs)[sampled], own[sampled], atol=2e-4, rtol=0)
        assert not rollout.log_probs[~sampled].any()
        assert rollout.candidates is not None
        candidates = torch.from_numpy(np.array(ray.get(rollout.candidates))).long()
        assert candidates.shape == (n, CANDIDATES)
        torch.testing.assert_close(
            expected.gather(-1, candidates)[sampled], expected.topk(CANDIDATES)[0][sampled], atol=2e-4, rtol=0
        )


def test_open_think_blocks_are_closed_at_the_budget(
    pool: RolloutPool, model_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    inserted = AutoTokenizer.from_pretrained(model_path)(CONFIG.stop_thinking)["input_ids"]
    requests = [Request(prompt, sample) for prompt in make_prompts(4, "think") for sample in range(16)]
    seen = {"ended": 0, "closed": 0, "forced": 0}
    for rollout in loop.run_until_complete(sample_all(pool, requests)):
        ids, thinking = rollout.token_ids, rollout.token_ids[:BUDGET]
        assert len(ids) <= CONFIG.max_tokens
        if THINK_CLOSE_ID in thinking:
            seen["closed"] += 1
            assert rollout.forced == ()
            # Nothing was inserted, so nothing ends at the budget: one span from start to end.
            assert [(span.start, span.stop) for span in rollout.versions] == [(0, len(ids))]
        elif np.isin(thinking, (*STOP_IDS, EOS)).any():
            seen["ended"] += 1
            assert len(ids) <= BUDGET and rollout.forced == ()
        else:
            seen["forced"] += 1
            stop = BUDGET + len(inserted)
            assert rollout.forced == ((BUDGET, stop),)
            assert ids[BUDGET:stop].tolist() == inserted and len(ids) > stop
    assert all(seen.values()), seen


def test_a_call_may_set_its_own_budget(pool: RolloutPool, loop: asyncio.AbstractEventLoop) -> None:
    prompts = make_prompts(8, "think")

    async def sample(budget: int) -> list[Rollout]:
        return await sample_all(pool, [Request(prompt, thinking_budget=budget) for prompt in prompts])

    starts = {start for rollout in loop.run_until_complete(sample(3)) for start, _ in rollout.forced}
    assert starts == {3}
    # A budget that leaves no room for an answer is none.
    assert all(rollout.forced == () for rollout in loop.run_until_complete(sample(CONFIG.max_tokens)))


def test_a_stream_is_the_response_as_it_grows(pool: RolloutPool, loop: asyncio.AbstractEventLoop) -> None:
    """With what the thinking budget inserts; the same response as one that is not streamed."""
    prompts = make_prompts(4, "think")

    async def stream(prompt: Prompt) -> tuple[list[np.ndarray], Rollout]:
        *parts, last = [part async for part in pool.stream(Request(prompt, thinking_budget=BUDGET))]
        assert isinstance(last, Rollout)
        return [part for part in parts if isinstance(part, np.ndarray)], last

    forced = 0
    for prompt in prompts:
        rollout = loop.run_until_complete(pool.generate(Request(prompt, thinking_budget=BUDGET)))
        parts, last = loop.run_until_complete(stream(prompt))
        assert np.array_equal(last.token_ids, rollout.token_ids) and last.finish_reason == rollout.finish_reason
        lengths = [len(part) for part in parts]
        assert lengths == sorted(set(lengths)) and len(lengths) > 2
        assert all(np.array_equal(part, rollout.token_ids[: len(part)]) for part in parts)
        forced += bool(rollout.forced)
    assert forced


def test_a_call_may_set_its_own_sampling(pool: RolloutPool, loop: asyncio.AbstractEventLoop) -> None:
    greedy = [Request(make_prompts(1)[0], sample, sampling=Sampling(0.0, 1.0, -1)) for sample in range(4)]
    rollouts = loop.run_until_complete(pool.generate_batch(greedy))
    assert len({tuple(rollout.token_ids) for rollout in rollouts}) == 1


def test_a_stream_that_is_refused_says_why(pool: RolloutPool, loop: asyncio.AbstractEventLoop) -> None:
    async def stream() -> None:
        async for _ in pool.stream(Request(replace(make_prompts(1)[0], token_ids=np.ones(128, np.int32)))):
            pass

    with pytest.raises(RequestRefusedError, match="max_tokens must be at least 1, got 0"):
        loop.run_until_complete(asyncio.wait_for(stream(), 60))


def test_a_call_may_set_its_own_length(pool: RolloutPool, loop: asyncio.AbstractEventLoop) -> None:
    requests = [Request(prompt, max_tokens=5) for prompt in make_prompts(8)]
    rollouts = loop.run_until_complete(sample_all(pool, requests))
    assert {rollout.finish_reason for rollout in rollouts if len(rollout.token_ids) == 5} >= {"length"}
    assert max(len(rollout.token_ids) for rollout in rollouts) == 5


@pytest.mark.parametrize("mode", ["no_think", "think"])
def test_samples_of_a_prompt_differ_and_seeds_repeat_them(
    pool: RolloutPool, loop: asyncio.AbstractEventLoop, mode: Mode
) -> None:
    requests = [Request(make_prompts(1, mode)[0], sample) for sample in range(6)]
    first = loop.run_until_complete(pool.generate_batch(requests))
    again = loop.run_until_complete(pool.generate_batch(requests))
    assert len({tuple(rollout.token_ids) for rollout in first}) == 6
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert np.array_equal(one.log_probs, other.log_probs)


def test_refused_requests_fail_at_once_and_alone(pool: RolloutPool, loop: asyncio.AbstractEventLoop) -> None:
    """A prompt that leaves no room for a response, alone and among others that the engine takes."""
    good = make_prompts(3)
    bad = replace(good[0], uid="too long", token_ids=np.ones(128, np.int32))
    sentence = r"engine \d rejected 'too long#0': max_tokens must be at least 1, got 0"
    with pytest.raises(RequestRefusedError, match=sentence) as caught:
        loop.run_until_complete(asyncio.wait_for(pool.generate(Request(bad)), 60))
    assert reason(caught.value).startswith("rollout engine")
    requests = [Request(prompt) for prompt in (good[0], good[1], bad, bad, good[2])]
    with pytest.raises(RequestRefusedError, match=sentence):
        loop.run_until_complete(asyncio.wait_for(pool.generate_batch(requests), 60))
    rollouts = loop.run_until_complete(asyncio.wait_for(pool.generate_batch([Request(good[0]), Request(good[1])]), 60))
    assert [rollout.prompt.uid for rollout in rollouts] == [good[0].uid, good[1].uid]


def test_stop_ids_end_a_response(pool: RolloutPool, loop: asyncio.AbstractEventLoop) -> None:
    requests = [Request(prompt, sample) for prompt in make_prompts(4) for sample in range(8)]
    rollouts = loop.run_until_complete(sample_all(pool, requests))
    stopped = [rollout for rollout in rollouts if rollout.token_ids[-1] in STOP_IDS]
    # Each token is one of 20 of 512 ids.
    assert stopped and all(rollout.finish_reason == "stop" for rollout in stopped)
    assert all(not np.isin(rollout.token_ids[:-1], STOP_IDS).any() for rollout in rollouts)


def test_load_is_shared(pool: RolloutPool, loop: asyncio.AbstractEventLoop) -> None:
    requests = [Request(prompt) for prompt in make_prompts(8)]
    rollouts = loop.run_until_complete(sample_all(pool, requests))
    engines = [rollout.engine for rollout in rollouts]
    assert engines.count(0) == engines.count(1) == 4


def test_a_response_that_an_engine_gives_up_is_sampled_again(
    pool: RolloutPool, loop: asyncio.AbstractEventLoop
) -> None:
    engine, prompt = pool.pool.members[0].actor, make_prompts(1)[0]

    def abort(engine: Any) -> int:
        requests = list(engine.llm.output_processor.request_states)
        loop = engine.llm.output_handler.get_loop()
        engine.aborting = asyncio.run_coroutine_threadsafe(engine.llm.abort(requests, internal=True), loop)
        return len(requests)

    async def generate(aborts: int) -> Rollout:
        """With so many requests given up one after the other, before they have begun."""
        await pool.receivers()[0].pause()
        try:
            call = asyncio.ensure_future(engine.generate.remote(Request(prompt)))
            for _ in range(aborts):
                while not await engine.__ray_call__.remote(abort):
                    await asyncio.sleep(0.01)
        finally:
            await pool.receivers()[0].resume()
        return await call

    expected, again = (loop.run_until_complete(generate(aborts)) for aborts in (0, ATTEMPTS - 1))
    assert expected.finish_reason in ("stop", "length")
    assert np.array_equal(again.token_ids, expected.token_ids)
    with pytest.raises(RuntimeError, match=rf"engine 0 aborted the response {prompt.uid}#0 3 times, .*'abort' after 0"):
        loop.run_until_complete(generate(ATTEMPTS))


def test_engines_compute_log_probs_of_given_tokens(
    pool: RolloutPool, model_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    ids = make_prompts(5)[4].token_ids
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids).long()[None]).logits[0, :-1, :VOCAB_SIZE].log_softmax(-1)
    expected = expected.gather(-1, torch.from_numpy(ids).long()[1:, None])[:, 0]
    for engine in loop.run_until_complete(pool.log_probs(ids)):
        np.testing.assert_allclose(engine, expected.numpy(), atol=2e-4)


def test_calls_of_an_engine_that_dies_end_within_seconds(pool: RolloutPool, loop: asyncio.AbstractEventLoop) -> None:
    """Last of the file: the engine is gone afterwards. vLLM itself would let the pause wait for ever."""
    engine = pool.pool.members[1].actor

    def core(engine: Any) -> int:
        return engine.llm.engine_core.resources.engine_manager.processes[0].pid

    async def kill() -> list[Any]:
        pid = await engine.__ray_call__.remote(core)
        os.kill(pid, signal.SIGSTOP)
        calls = [
            asyncio.ensure_future(call)
            for call in (
                pool.receivers()[1].pause(),
                engine.generate.remote(Request(make_prompts(1)[0])),
                engine.log_probs.remote(make_prompts(1)[0].token_ids),
            )
        ]
        await asyncio.wait(calls, timeout=1)
        assert not any(call.done() for call in calls)
        os.kill(pid, signal.SIGKILL)
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 15)
        return [pid, *results]

    pid, *errors = loop.run_until_complete(kill())
    # Who collects the exit code first, vLLM or Ray, is open.
    said = rf"its EngineCore process {pid} was killed (by SIGKILL|or crashed)"
    assert [bool(re.fullmatch(said, reason(error))) for error in errors] == [True] * 3, errors
