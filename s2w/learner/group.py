"""The learner as the controller sees it: places the ranks, distributes the work, gathers what they report."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from s2w.actors.failures import PROCESS_DEATHS, reason
from s2w.actors.hardware import cpu_environment, resolve_dtype
from s2w.actors.place import Place
from s2w.actors.stages import describe
from s2w.actors.starting import Watcher, answering, watched
from s2w.config.schema import Config
from s2w.learner import checkpoint
from s2w.learner.batching import MicroBatch, plan_micro_batches
from s2w.learner.messages import (
    MicroBatchWork,
    NonFiniteError,
    RankSpec,
    RankStep,
    StepRefusedError,
    sequence_length,
)
from s2w.learner.metrics import DIVERGENCE, STUDENT_ENTROPY
from s2w.learner.schedule import learning_rate
from s2w.learner.signal_bias import summarise
from s2w.models.checkpoint import ModelReference
from s2w.objectives import OBJECTIVES
from s2w.objectives.divergences import divergence_of
from s2w.records import Scored
from s2w.teacher.routing import REFERENCE, teacher_settings
from s2w.weights.transfer import Update

logger = logging.getLogger(__name__)

FAILING_S = 5
"""Seconds that the other ranks have to fail once one has."""
ABANDONED_S = 600
"""Seconds that ranks may continue a call whose caller was cancelled."""


@dataclass(frozen=True, slots=True)
class LearnerStep:
    """What one optimizer step did."""

    tokens: int
    """Sampled response tokens that were trained on."""
    loss: float
    """The objective, mean over these tokens: the divergence, times temperature^2 where that is set."""
    metrics: dict[str, float]
    """Metrics over tokens (:mod:`s2w.learner.metrics`, and the objective's own): means over these tokens."""
    by_mode: dict[str, dict[str, float]]
    """The same for the samples of each mode."""
    sums: dict[str, np.ndarray]
    """The same as sums over the tokens of each sample that counts, float64 [samples], in their order."""
    left_out: float
    """Share of the samples that the objective has left out."""
    grad_norm: float
    """Norm of the whole gradient, before clipping."""
    learning_rate: float
    seconds: float
    signal_bytes: int
    """Bytes taken out of the object store."""
    fetch_seconds: float
    """Time to get and join signals, alongside the work; summed over the ranks."""
    wait_seconds: float
    """Idle time, waiting for signals; of the rank that waited longest."""
    micro_batches: int
    """Micro-batches of each rank."""
    signal_bias: dict[str, dict[str, float]]
    """See :func:`s2w.learner.signal_bias.summarise`; empty unless signal.bias_every asks for it in this step."""
    skipped: str
    """Why the weights are unchanged: one sentence that names the samples; empty after an ordinary update."""


class LearnerError(RuntimeError):
    """The group can no longer be used: a rank failed alone, so all were ended; start another group."""


@dataclass
class LearnerGroup:
    """DeepSpeed ranks in Ray actors. One call at a time: a call made while another runs waits for it.

    Made by :meth:`start`.
    """

    config: Config
    device: str
    ranks: list[Any]
    placement: PlacementGroup | None
    """Its own; None where it was given its places."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    skipped_in_a_row: int = 0
    vocab_size: int = 0

    @classmethod
    async def start(
        cls,
        config: Config,
        student: ModelReference,
        device: str,
        vocab_size: int,
        watcher: Watcher | None = None,
        places: Sequence[Place] = (),
    ) -> LearnerGroup:
        """Places the ranks, loads the student and the teacher's head.

        Args:
            student: the checkpoint to start from.
            device: cuda or cpu.
            vocab_size: ids that student and teacher share.
            watcher: shows what the ranks do meanwhile.
            places: of the ranks, in their order; none, and they are packed on as few nodes as Ray finds.

        Raises:
            TimeoutError: the ranks were not placed within ``cluster.start_timeout_s``, or not up.
            LearnerError: a rank failed to start.
        """
        # DeepSpeed is imported here to name the actor's class, and only here: a refused run should not wait for it.
        # It need not look for accelerators in this process; the ranks have their own setting.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from s2w.learner.worker import LearnerRank

        learner = config.learner
        bundle = {"CPU": learner.cpus} | ({"GPU": learner.gpus} if device == "cuda" else {})
        placement = None
        if not places:
            placement = placement_group([bundle] * learner.ranks, strategy="PACK")
            if not await asyncio.to_thread(placement.wait, config.cluster.start_timeout_s):
                remove_placement_group(placement)
                raise TimeoutError(
                    f"no room for {learner.ranks} learner ranks of {bundle} within {config.cluster.start_timeout_s} s; "
                    f"free in the cluster: {ray.available_resources()}"
                )
            places = [
                Place({"scheduling_strategy": PlacementGroupSchedulingStrategy(placement, rank)})
                for rank in range(learner.ranks)
            ]
        ranks = [
            answering(LearnerRank)
            .options(
                num_cpus=learner.cpus,
                num_gpus=learner.gpus if device == "cuda" else 0,
                runtime_env={"env_vars": _environment(device)},
                **places[rank].options,
            )
            .remote(rank, learner.ranks, config.cluster.log_to_driver)
            for rank in range(learner.ranks)
        ]
        group = cls(config, device, ranks, placement)
        try:
            async with watched("learner rank", dict(enumerate(ranks)), watcher) as stages:
                try:
                    async with asyncio.timeout(config.cluster.start_timeout_s):
                        await group._connect()
                        await group.build(student, vocab_size)
                except TimeoutError:
                    raise TimeoutError(
                        f"the learner was not up after {config.cluster.start_timeout_s} s "
                        f"({describe('learner rank', stages())}): give it more time (cluster.start_timeout_s)"
                    ) from None
        except BaseException:
            group.shutdown()
            raise
        return group

    async def build(self, student: ModelReference, vocab_size: int) -> None:
        """Rebuilds the engines from ``config``, with the weights of ``student`` and a fresh optimizer.

        Args:
            student: the checkpoint to start from.
            vocab_size: ids that student and teacher share.
        """
        config = self.config
        self.vocab_size = vocab_size
        objective = OBJECTIVES[config.loss.objective].make(config)
        teachers = {name: (teacher.model, teacher.revision) for name, teacher in teacher_settings(config).items()}
        if objective.needs_reference:
            teachers[REFERENCE] = (student.reference, student.revision)
        spec = RankSpec(
            learner=config.learner,
            loss=objective.loss_settings(config.loss),
            objective=objective,
            signal=config.signal.kind,
            student=student,
            teachers=teachers,
            vocab_size=vocab_size,
            device=self.device,
            dtype=resolve_dtype(config.learner.dtype, self.device),
            engine_dtype=resolve_dtype(config.rollout.dtype, self.device),
            seed=config.run.seed,
            run_dir=Path(config.run.dir).absolute(),
        )
        await self._call("build", lambda rank, _: rank.build.remote(spec))

    async def step(self, samples: Sequence[Scored], step: int) -> LearnerStep:
        """One optimizer step on all of ``samples``; ``step`` is 0 for the first.

        Raises:
            ValueError: no samples, one without sampled tokens, or an id past the vocabulary.
            SignalLostError, NonFiniteError: the message names the samples; weights and optimizer are unchanged.
                NonFiniteError also after more than ``learner.max_skipped_steps`` steps without a finite gradient.
            LearnerError: a rank failed alone.
        """
        began = time.perf_counter()
        rate = learning_rate(self.config.learner, step, self.config.loop.steps)
        counted = [sample for sample in samples if sample.counts]
        if samples and not counted:
            return self._nothing(len(samples), step, rate)
        plan = self._plan(counted)
        work = _share_out(counted, plan)
        tokens = _tokens(counted)
        every = self.config.signal.bias_every
        measure_bias = every > 0 and (step + 1) % every == 0
        reports: list[RankStep] = await self._call(
            "step", lambda rank, i: rank.step.remote(work[i], tokens, rate, step, measure_bias)
        )
        sums = _in_order(plan, [report.sums for report in reports])
        by_mode: dict[str, dict[str, float]] = {}
        for mode in sorted({sample.rollout.prompt.mode for sample in counted}):
            own = [i for i, sample in enumerate(counted) if sample.rollout.prompt.mode == mode]
            by_mode[mode] = _means(sums, own, counted)
        return LearnerStep(
            tokens=tokens,
            loss=math.fsum(report.loss_sum for report in reports) / tokens,
            metrics=_means(sums, range(len(counted)), counted),
            by_mode=by_mode,
            sums=sums,
            left_out=1 - len(counted) / len(samples),
            grad_norm=reports[0].grad_norm,
            learning_rate=rate,
            seconds=time.perf_counter() - began,
            signal_bytes=sum(report.signal_bytes for report in reports),
            fetch_seconds=math.fsum(report.fetch_seconds for report in reports),
            wait_seconds=max(report.wait_seconds for report in reports),
            micro_batches=len(plan[0]),
            signal_bias=summarise([report.signal_bias for report in reports]),
            skipped=self._skipped(reports, step),
        )

    def _nothing(self, samples: int, step: int, rate: float) -> LearnerStep:
        """The report of a step in which the objective has left out all samples."""
        sentence = f"step {step + 1}: the objective leaves out all {samples} samples, so the update is skipped"
        self._count_skipped(sentence)
        unknown = {DIVERGENCE.name: math.nan, STUDENT_ENTROPY.name: math.nan}
        return LearnerStep(0, math.nan, unknown, {}, {}, 1.0, 0.0, rate, 0.0, 0, 0.0, 0.0, 0, {}, sentence)

    def _skipped(self, reports: Sequence[RankStep], step: int) -> str:
        """``LearnerStep.skipped``; also counts it."""
        if math.isfinite(reports[0].grad_norm):
            self.skipped_in_a_row = 0
            return ""
        uids = [uid for report in reports for uid in report.flawed]
        whose = f"that of {', '.join(uids)}" if uids else "that of the sum, not of any single sample"
        sentence = f"step {step + 1}: the gradient is not finite ({whose}), so the update is skipped"
        self._count_skipped(sentence)
        return sentence

    def _count_skipped(self, sentence: str) -> None:
        """Raises NonFiniteError after too many consecutive steps without an update."""
        self.skipped_in_a_row += 1
        limit = self.config.learner.max_skipped_steps
        if self.skipped_in_a_row > limit:
            raise NonFiniteError(
                f"{sentence}: {self.skipped_in_a_row} in a row, more than learner.max_skipped_steps={limit}; look at "
                "these samples, or write a lower learner.learning_rate"
            )

    async def evaluate(self, samples: Sequence[Scored], divergences: Sequence[str]) -> dict[str, float]:
        """Means of divergences over the sampled tokens of all ``samples``; see :meth:`evaluate_samples`."""
        sums = await self.evaluate_samples(samples, divergences)
        return {name: math.fsum(column) / _tokens(samples) for name, column in zip(divergences, sums.T, strict=True)}

    async def evaluate_samples(self, samples: Sequence[Scored], divergences: Sequence[str]) -> np.ndarray:
        """Divergences summed over the sampled tokens of each sample, in nats, at the temperature of the loss.

        With signals ``topk`` and ``ids`` they are those of the coarsened distributions, lower bounds on the exact
        ones; with ``sampled`` only ``reverse_kl`` is known, as an estimate, and the others are NaN.

        Returns:
            float64 [samples, divergences], in the order of the arguments.

        Raises:
            ValueError: unknown divergence, no samples, or one without sampled tokens.
            SignalLostError, NonFiniteError: the message names the sample.
        """
        named = [(name, divergence_of(replace(self.config.loss, divergence=name))) for name in divergences]
        plan = self._plan(samples)
        work = _share_out(samples, plan)
        shares = await self._call("evaluate", lambda rank, i: rank.evaluate.remote(work[i], named))
        sums = np.empty((len(samples), len(divergences)))
        sums[_order(plan)] = np.concatenate(shares)
        return sums

    async def teacher_log_probs(self, samples: Sequence[Scored]) -> list[np.ndarray]:
        """Log-probs of the sampled tokens decoded from the signals, for each sample float32 [m], in nats.

        At temperature 1 with signal ``hidden``, at the loss's with the others; NaN where the token is not among the
        ids of a ``topk`` or ``ids`` signal.

        Raises:
            ValueError: no samples, or one without sampled tokens.
            SignalLostError, NonFiniteError: the message names the sample.
        """
        plan = self._plan(samples)
        work = _share_out(samples, plan)
        shares = await self._call("teacher_log_probs", lambda rank, i: rank.teacher_log_probs.remote(work[i]))
        by_sample = dict(zip(_order(plan), (values for share in shares for values in share), strict=True))
        return [by_sample[i] for i in range(len(samples))]

    async def probe(self, token_ids: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Log-prob of each token but the first, given those before it: float32 [n - 1], in nats."""
        return (await self._call("probe", lambda rank, _: rank.probe.remote(token_ids, temperature)))[0]

    async def prepare_weights(self, workers: dict[int, int]) -> Update:
        """See :class:`s2w.weights.publish.WeightSource`, also for the next two."""
        return (await self._call("prepare_weights", lambda rank, _: rank.prepare_weights.remote(workers)))[0]

    async def connect_weights(self) -> None:
        await self._call("connect_weights", lambda rank, _: rank.connect_weights.remote())

    async def send_weights(self) -> None:
        await self._call("send_weights", lambda rank, _: rank.send_weights.remote())

    async def save(
        self, root: Path, step: int, data: dict[str, Any], keep: int, texts: Mapping[str, str] = checkpoint.NO_TEXTS
    ) -> Path:
        """Writes the checkpoint after ``step`` optimizer steps under ``root``; see :mod:`s2w.learner.checkpoint`.

        Args:
            data: JSON values that :meth:`load` returns, such as the position in the data.
            keep: checkpoints to keep, this one included.
            texts: further files of the checkpoint by name, in place of its own of that name.

        Returns:
            The checkpoint's directory.
        """
        root = root.absolute()
        partial = await asyncio.to_thread(checkpoint.begin, root, step)
        await self._call("save", lambda rank, _: rank.save.remote(partial))
        state = {"step": step, "shape": self._shape(), "config_hash": self._config_hash(), "data": data}
        return await asyncio.to_thread(checkpoint.commit, partial, state, keep, texts)

    async def load(self, directory: Path) -> tuple[int, dict[str, Any]]:
        """Continues from a checkpoint; call it before the first step.

        Returns:
            Optimizer steps done, and the ``data`` that :meth:`save` was given.

        Raises:
            FileNotFoundError: ``directory`` is not a complete checkpoint.
            ValueError: it was written by a group of another shape.
        """
        directory = directory.absolute()
        state = checkpoint.read_state(directory)
        if state["shape"] != self._shape():
            raise ValueError(
                f"{directory} was written with {_describe(state['shape'])} and cannot continue with "
                f"{_describe(self._shape())}: set them as they were, or start a new run from the student in it"
            )
        if state["config_hash"] != self._config_hash():
            logger.warning(
                "the student, learner, loss, reward or signal settings differ from those %s was made with", directory
            )
        await self._call("load", lambda rank, _: rank.load.remote(directory))
        return state["step"], state["data"]

    def shutdown(self) -> None:
        """Ends the ranks and releases their resources."""
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []
        if self.placement is not None:
            remove_placement_group(self.placement)

    async def _connect(self) -> None:
        places = await self._call("place", lambda rank, _: rank.place.remote())
        on_node = Counter(node for node, *_ in places)
        _, address, port, _ = places[0]
        given = self.config.learner.threads
        threads = [given or max(1, cores // on_node[node]) for node, _, _, cores in places]
        await self._call("connect", lambda rank, i: rank.connect.remote(address, port, self.device, threads[i]))

    async def _call(self, what: str, call: Callable[[Any, int], Any]) -> list[Any]:
        """Calls every rank; results in the order of the ranks.

        Args:
            what: the call, for the text of an error.
            call: makes the call, given a rank and its number.

        A cancelled caller returns at once; the next call waits until the ranks have finished this one.
        """
        await self.lock.acquire()
        calls = asyncio.create_task(self._on_all_ranks(what, call))
        calls.add_done_callback(self._ended)
        try:
            return await asyncio.shield(calls)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(ABANDONED_S, self._give_up, calls)
            raise

    def _ended(self, call: asyncio.Task[list[Any]]) -> None:
        self.lock.release()
        if not call.cancelled():
            call.exception()  # Of a call whose caller was cancelled nobody else asks for it.

    def _give_up(self, call: asyncio.Task[list[Any]]) -> None:
        """Ends ranks still in a call that nobody waits for, such as a collective without a partner."""
        if not call.done():
            self.shutdown()

    async def _on_all_ranks(self, what: str, call: Callable[[Any, int], Any]) -> list[Any]:
        """One call to all ranks, which are idle.

        A rank that fails alone leaves the others waiting in a collective, so the first failure ends them all. A step
        that the ranks refuse together leaves them as they were.
        """
        if not self.ranks:
            raise LearnerError("the learner group has been shut down")
        calls = [asyncio.ensure_future(call(rank, i)) for i, rank in enumerate(self.ranks)]
        try:
            return await asyncio.gather(*calls)
        except StepRefusedError:
            # Every rank raises it; the next call must find them idle.
            await asyncio.gather(*calls, return_exceptions=True)
            raise
        except Exception:
            # A rank that died breaks the connections of the others, which may report it first.
            await asyncio.wait(calls, timeout=FAILING_S)
            failed = {i: error for i, one in enumerate(calls) if one.done() and (error := one.exception())}
            died = [i for i, error in failed.items() if isinstance(error, PROCESS_DEATHS)]
            self.shutdown()
            await asyncio.gather(*calls, return_exceptions=True)
            rank = (died or list(failed))[0]
            who = f"learner rank {rank}"
            text = f"{who} died in {what}" if died else f"{what} failed on {who}"
            raise LearnerError(f"{text}: {reason(failed[rank], who)}") from failed[rank]

    def _plan(self, samples: Sequence[Scored]) -> list[list[MicroBatch]]:
        """Which samples are in each rank's micro-batches."""
        for rollout in (sample.rollout for sample in samples):
            if len(rollout.sampled_rows) == 0:
                raise ValueError(f"rollout {rollout.uid} has no sampled tokens")
            # On a GPU such an id fails an assertion in a kernel, after which the process cannot compute anything.
            if (largest := rollout.input_ids.max()) >= self.vocab_size:
                raise ValueError(
                    f"rollout {rollout.uid} has the token id {largest}, and the vocabulary that teacher and student "
                    f"share ends at {self.vocab_size - 1}"
                )
        plan: list[list[MicroBatch]] = [[] for _ in self.ranks]
        # A micro-batch has one teacher, since it is multiplied by that teacher's head.
        names = [sample.signal.name if sample.signal else "" for sample in samples]
        for name in sorted(set(names)):
            own = [index for index, owner in enumerate(names) if owner == name]
            lengths = [sequence_length(samples[index]) for index in own]
            part = plan_micro_batches(lengths, self.config.learner.tokens_per_micro_batch, len(self.ranks))
            for rank, batches in zip(plan, part, strict=True):
                rank += [replace(batch, samples=tuple(own[i] for i in batch.samples)) for batch in batches]
        return plan

    def _shape(self) -> dict[str, Any]:
        """What DeepSpeed's files depend on."""
        learner = self.config.learner
        return {
            "ranks": learner.ranks,
            "zero_stage": learner.zero_stage,
            "dtype": resolve_dtype(learner.dtype, self.device),
        }

    def _config_hash(self) -> str:
        sections = ("student", "learner", "loss", "reward", "signal")
        parts = {name: asdict(getattr(self.config, name)) for name in sections}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _share_out(samples: Sequence[Scored], plan: list[list[MicroBatch]]) -> list[list[MicroBatchWork]]:
    """Each rank's work."""
    return [[MicroBatchWork([samples[i] for i in batch.samples], batch.weighted) for batch in rank] for rank in plan]


def _order(plan: list[list[MicroBatch]]) -> list[int]:
    """The samples in the order of the ranks' results for them, one rank after the other."""
    return [index for rank in plan for batch in rank if batch.weighted for index in batch.samples]


def _in_order(plan: list[list[MicroBatch]], reports: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The ranks' sums as arrays over all samples, in the samples' order."""
    order = _order(plan)
    names = [name for report in reports for name in report]
    sums: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(names):
        sums[name] = np.empty(len(order))
        # As within a rank: 0 where an objective has nothing to say.
        sums[name][order] = np.concatenate(
            [report.get(name, np.zeros(len(report[DIVERGENCE.name]))) for report in reports if report]
        )
    return sums


def _tokens(samples: Sequence[Scored]) -> int:
    """Sampled response tokens."""
    return sum(len(sample.rollout.sampled_rows) for sample in samples)


def _means(sums: dict[str, np.ndarray], own: Sequence[int], samples: Sequence[Scored]) -> dict[str, float]:
    """Means over the tokens of the samples with the indices ``own``."""
    tokens = _tokens([samples[i] for i in own])
    return {name: float(values[own].sum() / tokens) for name, values in sums.items()}


def _describe(shape: dict[str, Any]) -> str:
    return ", ".join(f"learner.{name}={value}" for name, value in shape.items())


def _environment(device: str) -> dict[str, str]:
    environment = {"DS_ACCELERATOR": device, "TOKENIZERS_PARALLELISM": "false"}
    return environment | cpu_environment() if device == "cpu" else environment
