"""Teacher engines and their pool against a transformers forward pass in float32.

Budgets of tokens are small, so that prefills are split into chunks and requests share batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import ObjectRef
from tiny_models import Kind, make_checkpoint
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

from s2w.actors.vllm import actor_options
from s2w.config.schema import SignalConfig, TeacherConfig
from s2w.models.head import load_head
from s2w.records import Prompt, Rollout, TeacherSignal, VersionSpan
from s2w.teacher.engine import TeacherEngine
from s2w.teacher.pool import TeacherPool
from s2w.teacher.signal import SignalRequest, bytes_per_row, decode

VOCAB = 520
"""Ids of the vocabulary; the heads have more rows, as likely as the others."""
ROWS = 600
"""No multiple of 64: vLLM pads it to 640, and the second shard of two holds ids, the head's padding and vLLM's."""
ROWS_TWICE = 1100
"""The second shard of two holds padding alone."""
TOP_K = 16
MAX_LEN = 512


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def make_rollout(seed: int, prompt: int, response: int, sample: int = 0, candidates: int = 0) -> Rollout:
    """Random tokens; the prompt depends on ``seed`` alone, the response on ``sample`` too."""
    prompts, responses = np.random.default_rng(seed), np.random.default_rng([seed, sample + 1])
    ids = None
    if candidates:
        ids = ray.put(np.stack([responses.permutation(VOCAB)[:candidates] for _ in range(response)]).astype(np.int32))
    return Rollout(
        prompt=Prompt(f"p{seed}", (), prompts.integers(0, VOCAB, prompt, dtype=np.int32), "think", 0),
        sample=sample,
        token_ids=responses.integers(0, VOCAB, response, dtype=np.int32),
        log_probs=np.zeros(response, np.float32),
        versions=(VersionSpan(0, response, 0),),
        finish_reason="stop",
        engine=0,
        started=0.0,
        finished=0.0,
        candidates=ids,
    )


def arrays(signal: TeacherSignal) -> dict[str, torch.Tensor]:
    return decode(ray.get(signal.payload))


class Reference:
    """The same checkpoint in transformers, one sequence at a time."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, rollout: Rollout, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden rows float32 [n, d] after the final norm; log-probs float64 [n, VOCAB] of each response token."""
        ids = torch.from_numpy(rollout.input_ids.astype(np.int64))[None]
        output = self.model(ids, output_hidden_states=True)
        rows = slice(len(rollout.prompt.token_ids) - 1, -1)
        return output.hidden_states[-1][0, rows], (output.logits[0, rows, :VOCAB].double() / temperature).log_softmax(
            -1
        )


def log_tail(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log of the mass outside of ``ids``."""
    return log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)


@contextlib.contextmanager
def engine(path: Path, dtype: str = "float32", **settings: Any) -> Iterator[Any]:
    """One engine in its actor."""
    config = TeacherConfig(model=str(path), max_batched_tokens=64, enforce_eager=True, cpus=0.5, **settings)
    options = actor_options("cpu", config.cpus, config.tensor_parallel * config.pipeline_parallel)
    remote: Any = ray.remote(TeacherEngine)
    actor = remote.options(**options).remote(config, 0, "cpu", dtype, MAX_LEN, VOCAB)
    facts = ray.get(actor.start.remote())
    assert facts["dtype"] == dtype and facts["architecture"].endswith("ForCausalLM")
    yield actor
    ray.get(actor.shutdown.remote())
    ray.kill(actor)


REQUESTS = [
    SignalRequest("hidden"),
    SignalRequest("topk", TOP_K),
    SignalRequest("topk", TOP_K, temperature=1.7),
    SignalRequest("topk", 500),  # more than one of two shards holds
    SignalRequest("topk", VOCAB),  # all of them
    SignalRequest("ids"),
    SignalRequest("ids", temperature=0.6),
    SignalRequest("sampled", temperature=1.7),
]


def check_against_reference(actor: Any, path: Path, tolerance: float) -> None:
    """Every request of every rollout, all in the engine at once, against the reference and the teacher's head."""
    reference, head = Reference(path), load_head(str(path))
    # A whole prompt in one chunk, a response of one token, and sequences that are split between and inside chunks.
    shapes = [(40, 1), (1, 70), (50, 14), (90, 33), (97, 130)]
    rollouts = [make_rollout(i, *shape, candidates=TOP_K) for i, shape in enumerate(shapes)]
    jobs = [(rollout, request) for rollout in rollouts for request in REQUESTS]
    signals = ray.get([actor.score.remote(*job) for job in jobs])
    for (rollout, request), signal in zip(jobs, signals, strict=True):
        hidden, log_probs = reference(rollout, request.temperature)
        got = arrays(signal)
        n = len(rollout.token_ids)
        assert signal.rows == n and signal.kind == request.kind
        assert signal.nbytes == sum(tensor.nbytes for tensor in got.values())
        if request.kind == "hidden":
            torch.testing.assert_close(got["hidden"].float(), hidden, atol=tolerance * 4, rtol=0)
            logits = got["hidden"].double() @ head.weight[:VOCAB].double().T * head.scale
            torch.testing.assert_close(logits.log_softmax(-1), log_probs, atol=tolerance, rtol=0)
        elif request.kind == "sampled":
            expected = log_probs.gather(-1, torch.from_numpy(rollout.token_ids).long()[:, None])[:, 0]
            torch.testing.assert_close(got["log_probs"].double(), expected, atol=tolerance, rtol=0)
        else:
            ids = got["ids"].long()
            if request.kind == "ids":
                assert rollout.candidates is not None
                assert np.array_equal(ids, ray.get(rollout.candidates))
            else:
                assert ids.shape == (n, request.top_k)
                # Near ties may swap; what they hold may not be less likely than the reference's.
                top = log_probs.topk(request.top_k).values
                torch.testing.assert_close(log_probs.gather(-1, ids), top, atol=tolerance, rtol=0)
            torch.testing.assert_close(got["log_probs"].double(), log_probs.gather(-1, ids), atol=tolerance, rtol=0)
            torch.testing.assert_close(got["log_tail"].double(), log_tail(log_probs, ids), atol=tolerance, rtol=0)
            mass = got["log_probs"].double().exp().sum(-1) + got["log_tail"].double().exp()
            # Both come from one logsumexp in float32; in it the rounding of 520 terms.
            torch.testing.assert_close(mass, torch.ones(n, dtype=torch.float64), atol=1e-5, rtol=0)


# float32 rounding through two layers and 128 wide products: 1e-5 was seen.
FLOAT32 = 1e-4


@pytest.mark.parametrize(
    ("kind", "rows", "settings"),
    [
        ("tied", ROWS, {"tensor_parallel": 2}),
        ("moe", ROWS_TWICE, {"tensor_parallel": 2, "expert_parallel": True}),
        ("untied", ROWS, {"pipeline_parallel": 2}),
    ],
    ids=["tied-tp2", "moe-tp2-ep", "untied-pp2"],
)
def test_every_kind_matches_transformers_in_parallel(
    tmp_path: Path, kind: Kind, rows: int, settings: dict[str, Any]
) -> None:
    make_checkpoint(tmp_path, kind, seed=3, vocab_size=rows)
    with engine(tmp_path, **settings) as actor:
        check_against_reference(actor, tmp_path, FLOAT32)


def test_every_kind_matches_transformers_in_bfloat16_with_a_logit_scale(tmp_path: Path) -> None:
    config = GraniteConfig(
        vocab_size=ROWS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=2.0,
        attention_multiplier=32**-0.5,  # of a head's width, as usual: the default of 1 makes attention a hard choice
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    with engine(tmp_path, dtype="bfloat16") as actor:
        # bfloat16 keeps 8 bits: 0.4% of weights, of each layer's output and of the logits.
        check_against_reference(actor, tmp_path, 0.05)
        # The logits themselves are float32: log-probs of one engine from the hidden states of the same step.
        rollout, weight = make_rollout(9, 30, 20), load_head(str(tmp_path)).weight[:VOCAB].bfloat16()
        hidden, topk = (
            arrays(ray.get(actor.score_batch.remote([rollout], request))[0])
            for request in (SignalRequest("hidden"), SignalRequest("topk", VOCAB))
        )
        log_probs = (hidden["hidden"].double() @ weight.double().T / config.logits_scaling).log_softmax(-1)
        expected = log_probs.gather(-1, topk["ids"].long())
        torch.testing.assert_close(topk["log_probs"].double(), expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("untied"), "untied", seed=5, vocab_size=ROWS)


@pytest.fixture(scope="module")
def alone(untied: Path) -> Iterator[Any]:
    with engine(untied) as actor:
        yield actor


def test_every_kind_matches_transformers(alone: Any, untied: Path) -> None:
    check_against_reference(alone, untied, FLOAT32)


@pytest.mark.parametrize("request_", [SignalRequest("hidden"), SignalRequest("topk", TOP_K)], ids=["hidden", "topk"])
def test_samples_share_the_prompts_prefix_and_lose_no_row(alone: Any, untied: Path, request_: SignalRequest) -> None:
    seed = 100 + len(request_.kind)  # a prompt of its own
    samples = [make_rollout(seed, prompt=97, response=40, sample=i) for i in range(3)]
    cold, *warm = [ray.get(alone.score.remote(rollout, request_)) for rollout in samples]
    again = ray.get(alone.score.remote(samples[0], request_))
    assert cold.cached_tokens == 0
    # Three blocks of 32: the hit ends at row 96, the first one wanted, though the cache holds what follows it.
    assert [signal.cached_tokens for signal in [*warm, again]] == [96, 96, 96]
    reference = Reference(untied)
    for rollout, signal in zip([*samples, samples[0]], [cold, *warm, again], strict=True):
        hidden, log_probs = reference(rollout)
        got = arrays(signal)
        if signal.kind == "hidden":
            torch.testing.assert_close(got["hidden"], hidden, atol=FLOAT32, rtol=0)
        else:
            expected = log_probs.gather(-1, got["ids"].long())
            torch.testing.assert_close(got["log_probs"].double(), expected, atol=FLOAT32, rtol=0)


def test_a_cancelled_call_takes_its_request_out_of_the_engine(alone: Any) -> None:
    request = SignalRequest("sampled")
    before = ray.get(alone.stats.remote())
    ray.get(alone.pause.remote())
    cancelled = alone.score.remote(make_rollout(200, 60, 60), request)
    ready, _ = ray.wait([cancelled], timeout=1.0)
    assert not ready
    ray.cancel(cancelled)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(cancelled)
    ray.get(alone.resume.remote())
    ray.get(alone.score.remote(make_rollout(201, 60, 60), request))
    after = ray.get(alone.stats.remote())
    assert after["rollouts"] == before["rollouts"] + 1
    assert after["rows"] == before["rows"] + 60
    assert after["busy_s"] > before["busy_s"]


def test_impossible_rollouts_are_refused_by_name(alone: Any) -> None:
    def error(rollout: Rollout, request: SignalRequest) -> str:
        with pytest.raises(ValueError) as caught:
            ray.get(alone.score.remote(rollout, request))
        return str(caught.value)

    bad = make_rollout(300, 5, 5)
    bad.token_ids[2] = VOCAB
    assert "p300#0: token ids from" in error(bad, SignalRequest("hidden"))
    assert "p301#0: the prompt or the response is empty" in error(make_rollout(301, 5, 0), SignalRequest("hidden"))
    assert "p302#0: signal kind ids needs" in error(make_rollout(302, 5, 5), SignalRequest("ids"))
    assert "exceeds the vocabulary" in error(make_rollout(303, 5, 5), SignalRequest("topk", VOCAB + 1))
    assert "p304#0: 517 tokens, but the teacher's limit is 512" in error(
        make_rollout(304, MAX_LEN, 5), SignalRequest("hidden")
    )


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def make_pool(model: Path, replicas: int, **settings: Any) -> TeacherPool:
    config = TeacherConfig(
        model=str(model), replicas=replicas, max_batched_tokens=64, enforce_eager=True, threads=1, **settings
    )
    signal = SignalConfig(kind="topk", top_k=TOP_K)
    return TeacherPool(config, signal, 1.5, device="cpu", dtype="float32", max_model_len=MAX_LEN, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def pool(untied: Path, runner: asyncio.Runner) -> Iterator[TeacherPool]:
    pool = make_pool(untied, replicas=2)
    facts = runner.run(pool.start(timeout_s=300))
    assert facts == {"architecture": "Qwen3ForCausalLM", "hidden_size": 128, "dtype": "float32"}
    yield pool
    runner.run(pool.shutdown())


async def score_all(pool: TeacherPool, rollouts: list[Rollout]) -> list[TeacherSignal]:
    return list(await asyncio.gather(*(pool.score(rollout) for rollout in rollouts)))


def test_the_pool_returns_references_from_every_replica(
    pool: TeacherPool, runner: asyncio.Runner, untied: Path
) -> None:
    rollouts = [make_rollout(400 + i // 4, 60, 100, sample=i % 4) for i in range(16)]
    signals = runner.run(score_all(pool, rollouts))
    reference = Reference(untied)
    for rollout, signal in zip(rollouts, signals, strict=True):
        assert isinstance(signal.payload, ObjectRef)
        assert signal.nbytes == 100 * bytes_per_row("topk", top_k=TOP_K)
        assert len(ray.cloudpickle.dumps(signal)) < 2000 < signal.nbytes
        _, log_probs = reference(rollout, 1.5)
        got = arrays(signal)
        expected = log_probs.gather(-1, got["ids"].long())
        torch.testing.assert_close(got["log_probs"].double(), expected, atol=FLOAT32, rtol=0)
    assert {signal.teacher for signal in signals} == {0, 1}
    totals = runner.run(pool.stats())
    assert sum(stats["rollouts"] for stats in totals) == 16
    assert sum(stats["bytes"] for stats in totals) == sum(signal.nbytes for signal in signals)


def test_score_batch_repeats_bit_for_bit(pool: TeacherPool, runner: asyncio.Runner) -> None:
    rollouts = [make_rollout(500 + i // 2, 40 + i // 2, 20 + 7 * i, sample=i % 2) for i in range(12)]
    first = runner.run(pool.score_batch(rollouts))
    runner.run(score_all(pool, [make_rollout(600, 50, 50), *rollouts[3:5]]))  # other prefixes in the caches
    second = runner.run(pool.score_batch(rollouts))
    assert [signal.rows for signal in first] == [len(rollout.token_ids) for rollout in rollouts]
    assert [signal.teacher for signal in first] == [signal.teacher for signal in second]
    assert {signal.teacher for signal in first} == {0, 1}
    for one, other in zip(first, second, strict=True):
        assert one.cached_tokens == other.cached_tokens
        for name, tensor in arrays(one).items():
            assert torch.equal(tensor, arrays(other)[name])


def test_a_dead_engine_loses_no_rollout_and_is_replaced(pool: TeacherPool, runner: asyncio.Runner) -> None:
    def process_id() -> int:
        return ray.get(pool.pool.members[0].actor.__ray_call__.remote(lambda _: os.getpid()))

    dead = process_id()
    rollouts = [make_rollout(700 + i, 100, 200) for i in range(20)]

    async def kill_while_scoring() -> list[TeacherSignal]:
        tasks = [asyncio.create_task(pool.score(rollout)) for rollout in rollouts]
        await tasks[0]
        os.kill(dead, 9)
        return list(await asyncio.gather(*tasks))

    async def replaced() -> None:
        while len(pool.pool.serving) < 2:
            await asyncio.sleep(0.1)

    signals = runner.run(kill_while_scoring())
    assert [signal.rows for signal in signals] == [200] * 20
    assert runner.run(pool.alive())[0] == 1
    runner.run(asyncio.wait_for(replaced(), 120))
    assert runner.run(pool.alive()) == [1, 2]
    repeated = runner.run(pool.score_batch(rollouts))
    assert {signal.teacher for signal in repeated} == {1, 2}
    assert process_id() != dead


def test_a_teacher_that_cannot_start_says_why(tmp_path: Path, untied: Path, runner: asyncio.Runner) -> None:
    missing = make_pool(tmp_path / "nothing", replicas=1, cpus=0.1)
    with pytest.raises(RuntimeError, match=r"(?s)teacher 0 did not start: .*nothing"):
        runner.run(missing.start(timeout_s=300))
    runner.run(missing.shutdown())
    too_big = make_pool(untied, replicas=1, cpus=64)
    with pytest.raises(RuntimeError, match="1 of 1 teachers were not up after 1 s"):
        runner.run(too_big.start(timeout_s=1))
    runner.run(too_big.shutdown())
