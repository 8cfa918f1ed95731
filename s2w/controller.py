"""The on-policy loop: generate -> score -> KL update -> hot swap. The only place that knows the order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from s2w.actors.calls import each
from s2w.actors.stopping import uninterrupted
from s2w.config.schema import LoopConfig
from s2w.data.stream import PromptStream
from s2w.errors import LeftOutError
from s2w.eval.grading import Graded, Grader
from s2w.eval.heldout import heldout_responses, heldout_samples, make_heldout
from s2w.learner.group import LearnerGroup, LearnerStep
from s2w.learner.messages import SignalLostError
from s2w.learner.saver import Saver, due
from s2w.objectives import Objective
from s2w.objectives.objective import TRAINED
from s2w.objectives.reliability import Reliability
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder
from s2w.observe.step_report import StepReporter, StepTimes
from s2w.records import Prompt, Request, Rollout, Scored
from s2w.rollout.pool import RolloutPool
from s2w.rollout.publisher import Publisher
from s2w.teacher.routing import Teachers
from s2w.teacher_data.batches import ResponseStream

T = TypeVar("T")

ATTEMPTS = 3
"""How often signals are made again for one step."""


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
        saver: for the checkpoints.
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
        saver: Saver,
        on_batch: Callable[[list[Scored]], None] | None = None,
    ) -> None:
        self.loop, self.deterministic = loop, deterministic
        self.stream, self.teacher_responses, self.heldout = stream, teacher_responses, heldout
        self.rollouts, self.teachers, self.learner, self.grader = rollouts, teachers, learner, grader
        self.objective, self.reliability = objective, reliability
        self.longest, self.length_limit = longest, length_limit
        self.recorder, self.progress, self.reporter = recorder, progress, reporter
        self.step, self.saver = step, saver
        self.position = stream.state_dict()
        self.on_batch = on_batch
        self.publisher = Publisher(learner, rollouts, step, probe_ids, probe_tolerance)
        self.grading = asyncio.Lock()

    async def run(self) -> None:
        """Runs the remaining steps; saves after the last, and saves what there is if it is cancelled or fails."""
        async with asyncio.TaskGroup() as group:
            welcoming = group.create_task(self.publisher.welcome())
            await self.train()
            welcoming.cancel()

    async def train(self) -> None:
        """The loop."""
        ahead: deque[asyncio.Task[Batch]] = deque()
        try:
            async with self.publisher.updating:
                await self.publisher.swap(self.step)
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
                    self.progress.now(f"saving step {self.step}")
                    await self.saver.save(self.step, self.state)
                    self.progress.now(None)
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
        batch = self.make_batch(
            f"step {number + 1}/{self.loop.steps}",
            requests,
            [response.as_rollout() for response in given],
            self.stream.state_dict(),
        )
        return asyncio.create_task(batch)

    async def make_batch(
        self, name: str, requests: Sequence[Request], given: Sequence[Rollout], position: dict[str, Any]
    ) -> Batch:
        """A training batch: generated, scored, graded, and credited with what its samples count for."""
        samples = await self.generate_and_score(name, requests, given, ask_teacher=bool(self.objective.signals))
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
        async with self.publisher.updating:
            await self.update_and_swap(batch)

    async def update_and_swap(self, batch: Batch) -> None:
        """One step, while nobody else takes the learner's weights."""
        learning = time.time()
        name = f"step {self.step + 1}/{self.loop.steps}"
        self.progress.now(f"{name} updating the student on {len(batch.samples)} responses")
        samples, update = await self.with_signals(batch.samples, partial(self.learner.step, step=self.step))
        self.step, self.position = self.step + 1, batch.position
        self.follow(update)
        times = StepTimes(learning, time.time())
        swapped = None
        self.progress.now(f"{name} swapping the weights")
        try:
            swapped = await self.publisher.swap(self.step)
        finally:  # An update whose swap fails is saved too.
            self.progress.now(None)
            line = self.reporter.finish(self.step, samples, batch.graded, update, swapped, times, self.length_limit)
            self.recorder.step(line)
            self.progress.step(line)
            if update.skipped:
                self.progress.warn(update.skipped)

    def follow(self, update: LearnerStep) -> None:
        """The length limit of the next batches, where the objective moves it."""
        if (trained := update.sums.get(TRAINED.name)) is not None:
            self.length_limit = self.objective.next_length_limit(trained.tolist(), self.longest)

    async def generate_and_score(
        self, name: str, requests: Sequence[Request], given: Sequence[Rollout] = (), *, ask_teacher: bool = True
    ) -> list[Scored]:
        """Rollouts with their signals, in the order of ``requests``, then the ``given`` ones with theirs; each is
        scored the moment it is finished. A person sees them counted under ``name``."""
        if self.deterministic:
            rollouts = [*await self.rollouts.generate_batch(requests), *given]
            return await self.scored_batch(rollouts) if ask_teacher else [Scored(rollout, None) for rollout in rollouts]

        work: list[Request | Rollout] = [*requests, *given]

        async def sample(work: Request | Rollout) -> Scored | None:
            try:
                rollout = await self.rollouts.generate(work) if isinstance(work, Request) else work
                count.generated()
                if not ask_teacher:
                    return Scored(rollout, None)
                scored = await self.scored(rollout)
            except LeftOutError as error:
                self.progress.warn(str(error))
                return None
            count.scored(scored.signal.name if scored.signal else "")
            return scored

        with self.progress.batch(name, len(work)) as count:
            return [scored for scored in await each(work, sample) if scored is not None]

    async def scored(self, rollout: Rollout) -> Scored:
        """A rollout with its signals."""
        signal, reference = await asyncio.gather(self.teachers.score(rollout), self.teachers.refer(rollout))
        return Scored(rollout, signal, reference=reference)

    async def scored_batch(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """The same for a batch, repeatable bit for bit."""
        signals, references = await self.teachers.score_batch(rollouts), await self.teachers.refer_batch(rollouts)
        return [
            Scored(rollout, signal, reference=reference)
            for rollout, signal, reference in zip(rollouts, signals, references, strict=True)
        ]

    async def with_signals(
        self, samples: list[Scored], use: Callable[[list[Scored]], Awaitable[T]]
    ) -> tuple[list[Scored], T]:
        """Gives the learner samples; if an engine has died with signals that it had finished, has them scored again.

        Returns:
            The samples that the learner has used, and what it says.
        """
        for _ in range(ATTEMPTS):
            try:
                return samples, await use(samples)
            except SignalLostError as error:
                if not (lost := await self.teachers.lost(samples)):
                    raise
                self.progress.warn(f"{len(lost)} of {len(samples)} responses are scored again: {error}")
                samples = await self.scored_again(samples, lost)
        return samples, await use(samples)

    async def scored_again(self, samples: Sequence[Scored], lost: Sequence[int]) -> list[Scored]:
        """The samples with new signals for those with the indices ``lost``."""
        if self.deterministic:  # The bits of a signal depend on its batch.
            lost = [i for i, sample in enumerate(samples) if sample.signal]
        rollouts, restored = [samples[i].rollout for i in lost], list(samples)
        new = await (self.scored_batch(rollouts) if self.deterministic else each(rollouts, self.scored))
        for i, scored in zip(lost, new, strict=True):
            restored[i] = replace(samples[i], signal=scored.signal, reference=scored.reference)
        return restored

    async def graded(self, samples: Sequence[Scored]) -> list[Graded]:
        """Checks the answers in a thread, so that the loop goes on. One batch at a time: there is one verifier."""
        async with self.grading:
            return await asyncio.to_thread(self.grader.grade, [sample.rollout for sample in samples])

    def evaluation_is_due(self) -> bool:
        """Whether the held-out evaluation of this version is due and not done yet (after an interruption it may be)."""
        if self.step and self.step < self.loop.steps and not due(self.step, self.loop.eval_every):
            return False
        return all(result.version != self.step for result in self.recorder.evaluations())

    async def evaluate(self) -> None:
        """Held-out KL, accuracy and mode adherence of the current version, on fresh rollouts."""
        name = f"held-out at version {self.step}"
        samples = await self.generate_and_score(name, [Request(prompt) for prompt in self.heldout])
        self.progress.now(f"{name} divergences and grades of {len(samples)} responses")
        if self.on_batch is not None:
            self.on_batch(samples)
        rollouts = [sample.rollout for sample in samples]
        divergences = partial(self.learner.evaluate_samples, divergences=["forward_kl", "reverse_kl"])
        (samples, sums), graded = await asyncio.gather(self.with_signals(samples, divergences), self.graded(samples))
        teachers = [sample.signal.name if sample.signal else "" for sample in samples]
        responses = heldout_responses(self.step, rollouts, graded, teachers, sums)
        result = make_heldout(responses)
        self.recorder.heldout(result, responses, heldout_samples(self.step, rollouts, graded, self.grader.text))
        self.progress.now(None)
        self.progress.heldout(result)

    @property
    def state(self) -> dict[str, Any]:
        """State of the run after the last update, besides the learner's: position in the prompts, and length limit."""
        return {"stream": self.position, "length_limit": self.length_limit}
