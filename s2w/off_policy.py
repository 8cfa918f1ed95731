"""The off-policy loop: the teacher's responses -> (their signals ->) update. It stands beside :mod:`s2w.controller`.

The objective is ``off_policy.loss``. With one that asks the teacher (``divergence``) the teacher scores its own
responses: GKD (Agarwal et al. 2024, arXiv 2306.13649) with lambda = 0.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2w.actors.calls import each
from s2w.actors.stopping import uninterrupted
from s2w.config.schema import OffPolicyConfig
from s2w.learner import checkpoint
from s2w.learner.group import LearnerGroup
from s2w.learner.saver import Saver, due
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder
from s2w.observe.step_report import off_policy_line
from s2w.records import OffPolicyHeldout, Rollout, Scored
from s2w.teacher.routing import Teachers
from s2w.teacher_data.batches import ResponseStream
from s2w.teacher_data.response import Response


class OffPolicyController:
    """Runs the updates of the phase.

    Args:
        settings: the phase's.
        heldout_loss: divergence that serves as the held-out loss.
        stream: responses to train on.
        heldout: responses of the held-out loss; may be empty.
        learner: with the phase's own configuration.
        teachers: score the responses; None where the objective needs no teacher.
        deterministic: batches are scored as a whole.
        saver: for the phase's checkpoints.
        step: updates that the learner's weights have already had (resume).
    """

    def __init__(
        self,
        settings: OffPolicyConfig,
        *,
        heldout_loss: str,
        stream: ResponseStream,
        heldout: list[Response],
        learner: LearnerGroup,
        teachers: Teachers | None,
        deterministic: bool,
        recorder: Recorder,
        progress: Progress,
        saver: Saver,
        step: int,
    ) -> None:
        self.settings, self.heldout_loss = settings, heldout_loss
        self.stream, self.heldout = stream, heldout
        self.learner, self.teachers, self.deterministic = learner, teachers, deterministic
        self.recorder, self.progress = recorder, progress
        self.saver, self.step = saver, step

    async def run(self) -> Path:
        """Runs the remaining steps, then saves; returns the directory of the last checkpoint."""
        ahead: asyncio.Task[list[Scored]] | None = None
        try:
            if self.evaluation_is_due():
                await self.evaluate()
            while self.step < self.settings.steps:
                began = time.monotonic()
                samples = await (ahead or self.make_batch(self.stream.batch(self.step)))
                # The teacher scores the next batch while the learner trains on this one.
                ahead = None
                if self.step + 1 < self.settings.steps:
                    ahead = asyncio.create_task(self.make_batch(self.stream.batch(self.step + 1)))
                await self.train_on(samples, began)
                del samples  # Their signals leave the object store.
                if self.evaluation_is_due():
                    if ahead:
                        await asyncio.wait([ahead])  # A batch that is scored as a whole must be scored alone.
                    await self.evaluate()
                if due(self.step, self.settings.checkpoint_every) or self.step == self.settings.steps:
                    self.progress.now(f"saving step {self.step}")
                    await self.saver.save(self.step, self.state)
        except BaseException:
            await self.saver.rescue(self.step, self.state)
            raise
        finally:
            self.progress.now(None)
            if ahead is not None:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)
        return checkpoint.step_dir(self.saver.directory, self.step)

    @uninterrupted
    async def train_on(self, samples: list[Scored], began: float) -> None:
        """One update and its report, which stay together: if the phase is cancelled, both are there or neither.

        Args:
            began: when the step began, ``time.monotonic()``.
        """
        self.progress.now(f"step {self.step + 1}/{self.settings.steps} training on {len(samples)} responses")
        update = await self.learner.step(samples, self.step)
        self.step += 1
        epoch = self.step * self.settings.responses_per_step / len(self.stream.responses)
        line = off_policy_line(self.step, samples, update, epoch=epoch, spent=time.monotonic() - began)
        self.recorder.step(line)
        self.progress.step(line)
        if update.skipped:
            self.progress.warn(update.skipped)

    async def make_batch(self, responses: Sequence[Response]) -> list[Scored]:
        """The responses with their teacher's signals, where the objective needs them."""
        rollouts = [response.as_rollout() for response in responses]
        if self.teachers is None:
            return [Scored(rollout, None) for rollout in rollouts]
        if self.deterministic:
            signals = await self.teachers.score_batch(rollouts)
            return [Scored(*pair) for pair in zip(rollouts, signals, strict=True)]
        return await each(rollouts, self.score)

    async def score(self, rollout: Rollout) -> Scored:
        """A response with its signal."""
        assert self.teachers is not None
        return Scored(rollout, await self.teachers.score(rollout))

    def evaluation_is_due(self) -> bool:
        """Whether there are held-out responses whose loss at this step is due and not measured yet."""
        if self.step and self.step < self.settings.steps and not due(self.step, self.settings.eval_every):
            return False
        known = self.recorder.off_policy_evaluations()
        return bool(self.heldout) and all(result.step != self.step for result in known)

    async def evaluate(self) -> None:
        """Loss on the held-out responses."""
        self.progress.now(f"held-out loss of {len(self.heldout)} responses")
        samples = await self.make_batch(self.heldout)
        values = await self.learner.evaluate(samples, [self.heldout_loss])
        tokens = sum(len(sample.rollout.token_ids) for sample in samples)
        result = OffPolicyHeldout(self.step, values[self.heldout_loss], tokens)
        self.recorder.off_policy_heldout(result)
        self.progress.say(
            f"off-policy held-out loss after {self.step} steps: {result.loss:.4f} nats/token over {tokens:,} tokens"
        )

    @property
    def state(self) -> dict[str, Any]:
        """What the phase trains on, for a resumed run to recognise."""
        return {"responses": self.stream.fingerprint()}
