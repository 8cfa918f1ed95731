"""The on-policy loop: generate -> score -> KL update -> hot swap. The only place that knows the order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from s2w.actors.calls import each
from s2w.actors.stopping import uninterrupted
from s2w.config.schema import LoopConfig
from s2w.data.stream import PromptStream
from s2w.eval.grading import Graded, Grader
from s2w.eval.heldout import heldout_responses, heldout_samples
from s2w.eval.scores import mode_scores
from s2w.learner.group import LearnerGroup, LearnerStep
from s2w.learner.saver import Saver, due
from s2w.objectives import Objective
from s2w.objectives.objective import TRAINED
from s2w.objectives.reliability import Reliability
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder
from s2w.observe.step_report import StepReporter, StepTimes
from s2w.records import Heldout, Prompt, Request, Rollout, Scored
from s2w.rollout.pool import RolloutPool
from s2w.teacher.routing import Teachers
from s2w.teacher_data.batches import ResponseStream
from s2w.weights.probe import ProbeResult, compare
from s2w.weights.publish import SwapReport, publish


@dataclass(frozen=True, slots=True)
class Batch:
    """What one update trains on."""

    samples: list[Scored]
    graded: list[Graded]
    position: dict[str, Any]
    """Where the prompt stream stands after this batch."""


class Controller:
    """Runs the loop over the three parts.

    Policy version ``v`` is the student after ``v`` updates. Batch ``v`` updates version ``v``; it is launched once
    version ``v - max_staleness`` is in the engines. With ``max_staleness=0`` each batch is sampled from the weights
    that train on it; with ``n`` up to ``n`` further batches are generated and scored while one is trained on.

    Args:
        loop: steps, batch size, staleness.
        deterministic: batches are generated, then scored, each as a whole: reproducible bit for bit.
        stream: training prompts, positioned where the run begins.
        teacher_responses: the teacher's part of each batch; None if there is none.
        heldout: prompts of the held-out evaluation.
        objective: what is minimised; says what each sample counts for, and whether teachers score training batches.
        reliability: down-weights prompts that the teacher itself gets wrong; None does not.
        longest: ``rollout.max_tokens``.
        length_limit: for the first batch's responses: ``longest``, or as an earlier part of the run left it (resume).
        probe_ids: int32, tokens whose log-probs in engines and learner are compared after a swap.
        probe_tolerance: see :func:`s2w.weights.probe.compare`.
        step: updates that the learner's weights have already had (resume).
        checkpoints: directory of the checkpoints.
        on_batch: called with every batch once it is scored, the held-out ones too.
    """

    def __init__(
        self,
        loop: LoopConfig,
        *,
        deterministic: bool,
        stream: PromptStream,
        teacher_responses: ResponseStream | None,
        heldout: list[Prompt],
        rollouts: RolloutPool,
        teachers: Teachers,
        learner: LearnerGroup,
        grader: Grader,
        objective: Objective,
        reliability: Reliability | None,
        longest: int,
        length_limit: int,
        recorder: Recorder,
        progress: Progress,
        reporter: StepReporter,
        probe_ids: np.ndarray,
        probe_tolerance: float,
        step: int,
        checkpoints: Path,
        on_batch: Callable[[list[Scored]], None] | None = None,
    ) -> None:
        self.loop, self.deterministic = loop, deterministic
        self.stream, self.teacher_responses, self.heldout = stream, teacher_responses, heldout
        self.rollouts, self.teachers, self.learner, self.grader = rollouts, teachers, learner, grader
        self.objective, self.reliability = objective, reliability
        self.longest, self.length_limit = longest, length_limit
        self.recorder, self.progress, self.reporter = recorder, progress, reporter
        self.step = step
        self.saver = Saver(learner, checkpoints, loop.keep_checkpoints, step, progress.say)
        self.position = stream.state_dict()
        self.on_batch = on_batch
        self.probe_tolerance, self.probe_ids = probe_tolerance, probe_ids
        self.probed: np.ndarray | None = None
        self.usual: list[float] = []  # the median difference at each swap
        self.grading = asyncio.Lock()

    async def run(self) -> None:
        """Runs the remaining steps; saves after the last, and saves what there is if it is cancelled or fails."""
        ahead: deque[asyncio.Task[Batch]] = deque()
        try:
            await self.swap()
            if self.evaluation_is_due():
                await self.evaluate()
            while self.step < self.loop.steps:
                self.reporter.begin()
                while len(ahead) <= self.loop.max_staleness and self.step + len(ahead) < self.loop.steps:
                    ahead.append(self.launch(self.step + len(ahead)))
                await self.train_on(await ahead.popleft())
                if self.evaluation_is_due():
                    await self.evaluate()
                if due(self.step, self.loop.checkpoint_every) or self.step == self.loop.steps:
                    await self.saver.save(self.step, self.state)
        except BaseException:
            await self.saver.rescue(self.step, self.state)
            raise
        finally:
            for batch in ahead:
                batch.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    def launch(self, number: int) -> asyncio.Task[Batch]:
        """Starts batch ``number``: the next one of the prompt stream, and the teacher's part of it."""
        given = self.teacher_responses.batch(number) if self.teacher_responses else []
        prompts = self.stream.next_batch()
        requests = [
            Request(prompt, sample, self.length_limit)
            for prompt in prompts
            for sample in range(self.loop.samples_per_prompt)
        ]
        batch = self.make_batch(requests, [response.as_rollout() for response in given], self.stream.state_dict())
        return asyncio.create_task(batch)

    async def make_batch(
        self, requests: Sequence[Request], given: Sequence[Rollout], position: dict[str, Any]
    ) -> Batch:
        """A training batch: generated, scored, graded, and credited with what its samples count for."""
        samples = await self.generate_and_score(requests, given, ask_teacher=bool(self.objective.signals))
        graded = await self.graded(samples)
        samples = self.objective.credit(samples, graded)
        if self.reliability is not None:
            samples = self.reliability.apply(samples)
        if self.on_batch is not None:
            self.on_batch(samples)
        return Batch(samples, graded, position)

    @uninterrupted
    async def train_on(self, batch: Batch) -> None:
        """KL update -> hot swap. The update, the position in the data and the step's report stay together: if the
        loop is cancelled, all of them are there or none."""
        learning = time.time()
        update = await self.learner.step(batch.samples, self.step)
        self.step, self.position = self.step + 1, batch.position
        self.follow(update)
        times = StepTimes(learning, time.time())
        swapped = None
        try:
            swapped = await self.swap()
        finally:  # An update whose swap fails is saved too.
            line = self.reporter.finish(
                self.step, batch.samples, batch.graded, update, swapped, times, self.length_limit
            )
            self.recorder.step(line)
            self.progress.step(line)
            if update.skipped:
                self.progress.say(update.skipped)

    def follow(self, update: LearnerStep) -> None:
        """The length limit of the next batches, where the objective moves it."""
        if (trained := update.sums.get(TRAINED.name)) is not None:
            self.length_limit = self.objective.next_length_limit(trained.tolist(), self.longest)

    async def generate_and_score(
        self, requests: Sequence[Request], given: Sequence[Rollout] = (), *, ask_teacher: bool = True
    ) -> list[Scored]:
        """Rollouts with their signals, in the order of ``requests``, then the ``given`` ones with theirs; each is
        scored the moment it is finished."""
        if self.deterministic:
            rollouts = [*await self.rollouts.generate_batch(requests), *given]
            if not ask_teacher:
                return [Scored(rollout, None) for rollout in rollouts]
            signals, references = await self.teachers.score_batch(rollouts), await self.teachers.refer_batch(rollouts)
            return [
                Scored(rollout, signal, reference=reference)
                for rollout, signal, reference in zip(rollouts, signals, references, strict=True)
            ]

        generated, scored = len(given), 0

        async def sample(work: Request | Rollout) -> Scored:
            nonlocal generated, scored
            rollout = work
            if isinstance(rollout, Request):
                rollout = await self.rollouts.generate(rollout)
                generated += 1
                self.progress.under_way(generated, scored, len(requests) + len(given))
            signal, reference = None, None
            if ask_teacher:
                signal, reference = await asyncio.gather(self.teachers.score(rollout), self.teachers.refer(rollout))
            scored += 1
            self.progress.under_way(generated, scored, len(requests) + len(given))
            return Scored(rollout, signal, reference=reference)

        work: list[Request | Rollout] = [*requests, *given]
        return await each(work, sample)

    async def graded(self, samples: Sequence[Scored]) -> list[Graded]:
        """Checks the answers in a thread, so that the loop goes on. One batch at a time: there is one verifier."""
        async with self.grading:
            return await asyncio.to_thread(self.grader.grade, [sample.rollout for sample in samples])

    @uninterrupted
    async def swap(self) -> tuple[SwapReport, ProbeResult]:
        """Puts the learner's weights into the engines as version ``step`` and compares log-probs to prove it."""
        swap = await publish(self.learner, self.rollouts.receivers(), self.step, self.probe_ids)
        engines, model = await asyncio.gather(self.rollouts.probed(), self.learner.probe(self.probe_ids))
        probes = [
            compare(
                engine,
                model,
                self.probed,
                max(self.usual, default=np.inf),
                name=f"rollout engine {i}",
                version=self.step,
                tolerance=self.probe_tolerance,
            )
            for i, engine in enumerate(engines)
        ]
        self.probed = model
        self.usual.append(max(probe.median for probe in probes))
        return swap, max(probes, key=lambda probe: probe.mean)

    def evaluation_is_due(self) -> bool:
        """Whether the held-out evaluation of this version is due and not done yet (after an interruption it may be)."""
        if self.step and self.step < self.loop.steps and not due(self.step, self.loop.eval_every):
            return False
        return all(result.version != self.step for result in self.recorder.evaluations())

    async def evaluate(self) -> None:
        """Held-out KL, accuracy and mode adherence of the current version, on fresh rollouts."""
        samples = await self.generate_and_score([Request(prompt) for prompt in self.heldout])
        if self.on_batch is not None:
            self.on_batch(samples)
        rollouts = [sample.rollout for sample in samples]
        sums, graded = await asyncio.gather(
            self.learner.evaluate_samples(samples, ["forward_kl", "reverse_kl"]),
            self.graded(samples),
        )
        tokens = sum(len(rollout.sampled_rows) for rollout in rollouts)
        forward_kl, reverse_kl = sums.sum(0) / tokens
        result = Heldout(
            version=self.step,
            forward_kl=float(forward_kl),
            reverse_kl=float(reverse_kl),
            tokens=tokens,
            response_length=sum(len(rollout.token_ids) for rollout in rollouts) / len(rollouts),
            by_mode=mode_scores(graded),
        )
        self.recorder.heldout(
            result,
            heldout_responses(self.step, rollouts, graded, sums),
            heldout_samples(self.step, rollouts, graded, self.grader.text),
        )
        self.progress.heldout(result)

    @property
    def state(self) -> dict[str, Any]:
        """State of the run after the last update, besides the learner's: position in the prompts, and length limit."""
        return {"stream": self.position, "length_limit": self.length_limit}
