"""The whole system on tiny models: real engines, real learner ranks, real swaps, as `s2w train` runs them."""

from __future__ import annotations

import asyncio
import gc
import json
import pickle
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray._private import worker
from stop_signals import stop_during
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2w.actors.stopping import INTERRUPTED
from s2w.cli import main
from s2w.config.compose import compose
from s2w.config.schema import Config
from s2w.errors import ConfigError
from s2w.launch.run_directory import ENTRIES
from s2w.launch.train import train
from s2w.learner.group import LearnerGroup, LearnerStep
from s2w.records import Request, Rollout, Scored
from s2w.rollout import publisher
from s2w.rollout.pool import RemoteReceiver, RolloutPool
from s2w.weights.publish import SwapReport

COMMON = [
    "student.init=fresh", "student.overrides={num_hidden_layers: 1}",
    "data.tasks=[chain_sum, spell_backward]", "data.train_prompts=10", "data.heldout_prompts=4",
    "data.max_prompt_tokens=256", "rollout.max_tokens=12", "rollout.enforce_eager=true", "teacher.enforce_eager=true",
    "rollout.cpus=0.2", "teacher.cpus=0.2", "learner.cpus=0.2", "learner.tokens_per_micro_batch=512",
    "learner.learning_rate=3e-3", "learner.warmup_steps=2", "learner.schedule=cosine",
    "loop.prompts_per_step=4", "loop.samples_per_prompt=2", "cluster.device=cpu", "run.tensorboard=true",
    "teacher.dtype=float32", "rollout.dtype=float32", "learner.dtype=float32",
]  # fmt: skip


@dataclass
class Run:
    """A finished run and what its controller saw."""

    directory: Path
    batches: list[list[Scored]] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    """Of the samples before each batch, those that something still refers to when it is complete."""
    unpacked: set[str] = field(default_factory=set)
    """Ray's ids of the objects that became values in the controller's process."""
    inline: list[str] = field(default_factory=list)
    """uids of samples whose signal came into the controller's process with a call's result."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "teacher", "untied", 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def job(teacher: Path, runs: Path) -> Callable[..., Run]:
    """Runs a job to its end and keeps the batches that its controller held, or copies without their signals."""

    def run(name: str, *overrides: str, stop: tuple[str, int] | None = None, copies: bool = False) -> Run:
        config: Config = compose(
            [*COMMON, f"teacher.model={teacher}", f"student.model={teacher}", f"run.dir={runs / name}", *overrides]
        )
        result = Run(runs / name)
        arrays: list[weakref.ref[np.ndarray]] = []
        unpack = worker.Worker.deserialize_objects

        def watched(self: worker.Worker, objects: Any, references: Any, *rest: Any, **options: Any) -> Any:
            result.unpacked.update(reference.hex() for reference in references)
            return unpack(self, objects, references, *rest, **options)

        def keep(samples: list[Scored]) -> None:
            exists = worker.global_worker.core_worker.object_exists  # type: ignore[attr-defined]
            result.inline += [
                s.rollout.uid for s in samples if s.signal and exists(s.signal.payload, memory_store_only=True)
            ]
            if copies:
                gc.collect()
                result.held.append(sum(array() is not None for array in arrays))
                arrays.extend(weakref.ref(sample.rollout.token_ids) for sample in samples)
                samples = [Scored(replace(s.rollout, token_ids=s.rollout.token_ids.copy()), None) for s in samples]
            result.batches.append(samples)

        with pytest.MonkeyPatch.context() as patch:
            # What ray.get and await both go through.
            patch.setattr(worker.Worker, "deserialize_objects", watched)
            if stop is not None:
                stop_during(patch, *stop)
            assert train(config, keep) == (0 if stop is None else INTERRUPTED)
        return result

    return run


DETERMINISTIC = [
    "run.deterministic=true", "learner.ranks=2", "learner.zero_stage=2", "loop.checkpoint_every=2",
    "loop.keep_checkpoints=3", "signal.bias_every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(job: Callable[..., Run]) -> Run:
    """Four steps without interruption."""
    return job("whole", "loop.steps=4", *DETERMINISTIC)


@pytest.fixture(scope="module")
def parts(job: Callable[..., Run]) -> list[Run]:
    """The same run, stopped in its first update, resumed, stopped in its second save, resumed."""
    interrupted = [
        job("parts", "loop.steps=4", "run.resume=auto", *DETERMINISTIC, stop=("step", 1)),
        job("parts", "loop.steps=4", "run.resume=auto", *DETERMINISTIC, stop=("save", 1)),
    ]
    return [*interrupted, job("parts", "loop.steps=4", "run.resume=true", *DETERMINISTIC, copies=True)]


def test_the_run_directory(whole: Run) -> None:
    names = {path.name for path in whole.directory.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "heldout.jsonl", "tensorboard", "checkpoints", "summary.json"} <= names
    assert names <= set(ENTRIES)
    assert [line["step"] for line in whole.metrics] == [1, 2, 3, 4]
    summary = whole.summary
    assert [summary["heldout"][moment]["version"] for moment in ("before", "after")] == [0, 4]
    assert set(summary["tokens_per_second"]) == {"generate", "score", "learn"}
    assert summary["probe_error"] == max(line["probe_error"] for line in whole.metrics) < 1e-5
    assert summary["swap_ms"] == sorted(line["swap_ms"] for line in whole.metrics)[2]
    assert summary["wall_seconds"] > sum(line["seconds"] for line in whole.metrics)
    events = EventAccumulator(str(whole.directory / "tensorboard")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("divergence")]
    expected = [(line["step"], line["divergence"]) for line in whole.metrics]
    assert [step for step, _ in logged] == [step for step, _ in expected]
    np.testing.assert_allclose([v for _, v in logged], [v for _, v in expected], rtol=1e-6)


def test_signals_are_measured(whole: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for line in whole.metrics:
        assert set(line["signal_seconds"]) == {"put", "fetch", "wait"}
        assert line["signal_seconds"]["put"] > 0 and line["signal_seconds"]["fetch"] > 0
        assert line["signal_bytes_per_token"] == 4 * 128
        assert bool(line["signal_bias"]) == (line["step"] % 2 == 0)
    bias = whole.metrics[1]["signal_bias"]
    assert bias["topk_16"]["bias"] < bias["topk_256"]["bias"] < 0 < bias["ids_256"]["cosine"] < 1
    events = EventAccumulator(str(whole.directory / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("signal_bias/topk_16/cosine")] == [2, 4]

    assert main(["signals", str(whole.directory)]) == 0
    assert "| `signal.kind=topk signal.top_k=16` | 132 |" in capsys.readouterr().out
    assert (whole.directory / "signals.png").read_bytes().startswith(b"\x89PNG")


def test_it_learns(whole: Run, teacher: Path) -> None:
    """Held-out KL before and after are those of the checkpoints by transformers, and the second is smaller."""
    summary = whole.summary["heldout"]
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    for moment, path, samples in (
        ("before", whole.directory / "student", whole.batches[0]),
        ("after", whole.directory / "checkpoints" / "latest", whole.batches[-1]),
    ):
        student = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        rows = [[log_probs(one, sample.rollout) for sample in samples] for one in (model, student)]
        log_p, log_q = (torch.cat(each) for each in rows)
        # float32 against float64.
        forward, reverse = kl(log_p, log_q), kl(log_q, log_p)
        assert summary[moment]["forward_kl"] == pytest.approx(forward, abs=1e-5)
        assert summary[moment]["reverse_kl"] == pytest.approx(reverse, abs=1e-5)
    for direction in ("forward_kl", "reverse_kl"):
        assert summary["after"][direction] < summary["before"][direction]


def log_probs(model: Any, rollout: Rollout) -> torch.Tensor:
    """[n, V] at the response tokens."""
    ids = torch.from_numpy(rollout.input_ids).long()
    with torch.no_grad():
        return model(ids[None]).logits[0, len(rollout.prompt.token_ids) - 1 : -1].log_softmax(-1)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """KL(p || q), mean over rows."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def test_at_staleness_zero_each_batch_is_written_by_the_weights_that_learn_from_it(whole: Run) -> None:
    # The first and the last batch are the held-out evaluations.
    for step, samples in enumerate(whole.batches[1:-1]):
        assert {span.version for sample in samples for span in sample.rollout.versions} == {step}
    assert all(line["staleness_max"] == 0 for line in whole.metrics)


def test_the_same_seed_repeats_rollouts_and_losses(whole: Run, parts: list[Run]) -> None:
    for one, other in zip(whole.batches[:2], parts[0].batches, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.rollout.uid == b.rollout.uid
            assert np.array_equal(a.rollout.token_ids, b.rollout.token_ids)
            assert np.array_equal(a.rollout.log_probs, b.rollout.log_probs)
    for name in ("loss", "divergence", "grad_norm", "student_entropy", "teacher_entropy"):
        assert [line[name] for line in whole.metrics] == [line[name] for line in parts[-1].metrics]


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(whole: Run, parts: list[Run]) -> None:
    """Bit for bit, although a signal came while the ranks updated, and another while they saved."""
    directory = parts[-1].directory
    assert [line["step"] for line in parts[-1].metrics] == [1, 2, 3, 4]
    # The summary is over all of its starts.
    summary, segments = parts[-1].summary, json.loads((directory / "segments.json").read_text())
    assert summary["swap_ms"] == sorted(line["swap_ms"] for line in parts[-1].metrics)[2]
    assert summary["probe_error"] == max(line["probe_error"] for line in parts[-1].metrics)
    assert len(segments) == 3
    assert summary["wall_seconds"] == pytest.approx(sum(one["until"] - one["began"] for one in segments), abs=1.0)
    for name in ("loss", "grad_norm", "learning_rate", "response_tokens"):
        assert [line[name] for line in parts[-1].metrics] == [line[name] for line in whole.metrics]
    models = [
        AutoModelForCausalLM.from_pretrained(run.directory / "checkpoints" / "latest", dtype=torch.float32)
        for run in (whole, parts[-1])
    ]
    for (name, a), (_, b) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(a, b), name
    # What the first signal found under way ended, and was saved: no update was made twice, and no save.
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [
        "latest", "step_000001", "step_000002", "step_000004",
    ]  # fmt: skip


def test_every_prompt_is_used_once_an_epoch(whole: Run, parts: list[Run]) -> None:
    # The held-out evaluations come first and last.
    trained = [batch for part in parts for batch in part.batches][1:-1]
    for batches in (whole.batches[1:-1], trained):
        used = [sample.rollout.prompt.uid for samples in batches for sample in samples if sample.rollout.sample == 0]
        assert len(used) == 16
        epoch = Counter(used[:10])
        assert len(epoch) == 10 and set(epoch.values()) == {1}


def test_a_batch_is_let_go_when_its_step_is_done(parts: list[Run]) -> None:
    """Before the next one is complete: its signals leave the object store."""
    assert parts[-1].held == [0, 0, 0]


def test_the_controller_holds_no_tensor(whole: Run) -> None:
    tokens = signal_bytes = record_bytes = 0
    for samples in whole.batches:
        for sample in samples:
            tokens += len(sample.rollout.token_ids) + len(sample.rollout.prompt.token_ids)
            assert sample.signal is not None
            signal_bytes += sample.signal.nbytes
            arrays = [sample.rollout.token_ids, sample.rollout.log_probs, sample.rollout.prompt.token_ids]
            record_bytes += sum(array.nbytes for array in arrays)
            # A reference is all there is of the signal.
            assert type(sample.signal.payload).__name__ == "ObjectRef"
            others = [getattr(sample.signal, name) for name in sample.signal.__slots__ if name != "payload"]
            assert len(pickle.dumps(others)) < 400
            # And it was never resolved.
            assert sample.signal.payload.hex() not in whole.unpacked
    assert len(whole.unpacked) > 20 and not whole.inline
    assert signal_bytes > 10 * record_bytes
    assert record_bytes <= 8 * tokens


def test_the_checkpoint_loads_in_transformers(whole: Run) -> None:
    path = whole.directory / "checkpoints" / "latest"
    assert path.resolve().name == "step_000004"
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.num_hidden_layers == 1
    assert len(AutoTokenizer.from_pretrained(path)) == model.config.vocab_size


STALE_STEPS = 4


def hold_half_of_each_batch(patch: pytest.MonkeyPatch, size: int, longest: int) -> None:
    """Makes sure of what overlapping only makes likely: of batch n + 1 one response is requested when learning batch n
    begins, and three just before the swap after it, which comes when one of them has begun and is far from its end."""
    begun: defaultdict[tuple[str, int], asyncio.Event] = defaultdict(asyncio.Event)
    calls = 0
    generate, update, publish = RolloutPool.generate, LearnerGroup.step, publisher.publish

    async def held(self: RolloutPool, request: Request) -> Rollout:
        nonlocal calls
        if "/train/" in request.prompt.uid:
            batch, position = divmod(calls, size)
            calls += 1
            if batch and position % 2:
                await begun["learn" if position == 1 else "swap", batch].wait()
        return await generate(self, request)

    async def telling(self: LearnerGroup, samples: list[Scored], step: int) -> LearnerStep:
        begun["learn", step + 1].set()
        return await update(self, samples, step)

    def lengths(engine: Any) -> list[int]:
        """Tokens so far of the responses under way."""
        return [state.detokenizer.num_output_tokens() for state in engine.llm.output_processor.request_states.values()]

    async def timely(learner: LearnerGroup, engines: dict[int, RemoteReceiver], version: int, *rest: Any) -> SwapReport:
        begun["swap", version].set()
        while 0 < version < STALE_STEPS:
            under_way = [await engine.actor.__ray_call__.remote(lengths) for engine in engines.values()]
            if any(0 < tokens < longest // 2 for own in under_way for tokens in own):
                break
            await asyncio.sleep(0.01)
        return await publish(learner, engines, version, *rest)

    patch.setattr(RolloutPool, "generate", held)
    patch.setattr(LearnerGroup, "step", telling)
    patch.setattr(publisher, "publish", timely)


def test_staleness_one_overlaps_and_stays_within_its_bound(
    job: Callable[..., Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 192
    hold_half_of_each_batch(monkeypatch, size=8, longest=longest)
    run = job(
        "stale", f"loop.steps={STALE_STEPS}", "loop.max_staleness=1", "rollout.engines=2", "signal.kind=topk",
        "signal.top_k=16", "loss.divergence=reverse_kl", "learner.zero_stage=3", "loop.eval_every=2",
        f"rollout.max_tokens={longest}", "run.preflight=divergence",
    )  # fmt: skip
    assert "preflight: a student equal to teacher has a divergence of" in capsys.readouterr().out
    assert main(["signals", str(run.directory)]) == 2
    assert "has not measured its signals: train with" in capsys.readouterr().err
    assert max(line["staleness_max"] for line in run.metrics) == 1
    assert run.metrics[0]["staleness_max"] == 0
    assert {sample.rollout.engine for samples in run.batches for sample in samples} == {0, 1}
    assert {sample.signal and sample.signal.kind for samples in run.batches for sample in samples} == {"topk"}
    heldout = [json.loads(line)["version"] for line in (run.directory / "heldout.jsonl").read_text().splitlines()]
    assert heldout == [0, 2, 4]

    timeline = [json.loads(line) for line in (run.directory / "timeline.jsonl").read_text().splitlines()]
    work = {
        stage: {step: [(o["start"], o["stop"]) for o in timeline if (o["stage"], o["step"]) == (stage, step)]
                for step in range(1, STALE_STEPS + 1)}
        for stage in ("generate", "learn", "swap")
    }  # fmt: skip
    for step in range(1, STALE_STEPS):
        [(begin, end)] = work["learn"][step]
        # The next batch was generated in the time of the update, and over the swap that followed it.
        assert any(start < end and stop > begin for start, stop in work["generate"][step + 1])
        [(swap, _)] = work["swap"][step]
        assert any(start < swap < stop for start, stop in work["generate"][step + 1])
    assert sum(crosses_a_swap(sample.rollout) for samples in run.batches for sample in samples) >= STALE_STEPS - 1
    versions = [{span.version for s in samples for span in s.rollout.versions} for samples in training_batches(run)]
    assert versions == [{0}, {0, 1}, {1, 2}, {2, 3}]


def crosses_a_swap(rollout: Rollout) -> bool:
    """Two versions wrote the response, one after the other and all of it."""
    if len(rollout.versions) == 1:
        return False
    first, second = rollout.versions
    assert (first.start, first.stop, second.stop) == (0, second.start, len(rollout.token_ids))
    assert second.version == first.version + 1
    return True


def training_batches(run: Run) -> list[list[Scored]]:
    """Without the held-out ones, in the order in which they were learned."""
    return [samples for samples in run.batches if "/train/" in samples[0].rollout.prompt.uid]


def test_too_few_cpus_are_said_before_a_model_loads(job: Callable[..., Run], runs: Path) -> None:
    with pytest.raises(ConfigError, match=r"^on-policy: the run asks for 1000\.4 CPUs .* and the cluster has \d+"):
        job("greedy", "rollout.cpus=1000", "loop.steps=1")
    assert not (runs / "greedy").exists()
