"""The off-policy phase: the teacher's responses -> filters -> updates of the student; a checkpoint in, one out.

With ``off_policy.loss=cross_entropy`` the student minimises the log-loss of the responses' tokens. That is the
forward KL to the distribution that is 1 at the token, so the same kernel computes it. With ``divergence`` the teacher
scores the responses and the student minimises ``loss.divergence`` on them: GKD (Agarwal et al. 2024, arXiv
2306.13649) with lambda = 0.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from s2w.config import Config, Objective, OffPolicyConfig
from s2w.errors import ConfigError
from s2w.job import OFF_POLICY_CHECKPOINTS, Job
from s2w.learner import checkpoint
from s2w.learner.group import LearnerGroup, start_learner
from s2w.learner.saver import Saver, due
from s2w.models.checkpoint import ModelReference
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder
from s2w.off_policy.batches import ResponseStream
from s2w.off_policy.collect import TeacherResponses
from s2w.off_policy.response import Response
from s2w.records import OffPolicyHeldout, OffPolicyReport, Scored
from s2w.stopping import uninterrupted
from s2w.teacher.routing import Teachers


def learner_settings(config: Config) -> Config:
    """The configuration of the learner in this phase: its own learning rate and steps, and the loss of its signal."""
    off = config.off_policy
    learner = replace(
        config.learner,
        learning_rate=off.learning_rate,
        schedule=off.schedule,
        warmup_steps=off.warmup_steps,
        min_lr_ratio=off.min_lr_ratio,
    )
    # The teacher's responses are learned by that alone, whatever the on-policy phase does.
    loss = replace(config.loss, objective=off.loss)
    if off.loss is Objective.cross_entropy:
        loss = replace(loss, divergence="forward_kl", temperature=1.0)
    loop, reward = replace(config.loop, steps=off.steps), replace(config.reward, weight=0.0)
    return replace(config, learner=learner, loop=loop, loss=loss, reward=reward)


async def run_phase(job: Job, student: ModelReference, teacher_responses: TeacherResponses) -> ModelReference:
    """Runs the phase, or what is left of it.

    The parts start one after the other, so that they can use the same GPUs: first the engines that generate, then
    the learner and, for ``loss=divergence``, the teacher that scores.

    Args:
        student: the checkpoint to start from.
        teacher_responses: collected if the phase is not done.

    Returns:
        The phase's last checkpoint: the student that the on-policy phase starts from.

    Raises:
        ConfigError: no responses to learn from, or others than those of the checkpoint to continue from.
    """
    config, device, progress = job.config, job.device, job.progress
    off, checkpoints = config.off_policy, job.directory / OFF_POLICY_CHECKPOINTS
    last = checkpoint.latest(checkpoints) if config.run.resume else None
    state: dict[str, Any] = checkpoint.read_state(last) if last else {"step": 0}
    if last and state["step"] >= off.steps:
        progress.say(f"the off-policy phase is done: {last}")
        return ModelReference.of(str(last))
    responses = await teacher_responses.split()
    stream = ResponseStream(responses.train, off.responses_per_step, config.run.seed)
    if last:
        if state["data"]["responses"] != stream.fingerprint():
            raise ConfigError(f"cannot resume: {last} has learned other responses than this run has now")
        progress.say(f"continues after off-policy step {state['step']} from {last}")

    settings = learner_settings(config)
    teachers: Teachers | None = None
    learner: LearnerGroup | None = None
    progress.say(f"{off.steps:,} off-policy steps on {len(responses.train):,} responses; starting the learner ...")
    try:
        async with asyncio.TaskGroup() as group:
            starting = group.create_task(start_learner(settings, student, job))
            if off.loss is Objective.divergence:
                length = config.data.max_prompt_tokens + off.max_tokens
                teachers = Teachers(config, device, length, job.facts.vocabulary.vocab_size)
                group.create_task(teachers.start(config.cluster.start_timeout_s))
        learner = starting.result()
        if last:
            await learner.load(last)
        phase = OffPolicyPhase(
            off,
            objective=settings.loss.divergence,
            stream=stream,
            heldout=responses.heldout,
            learner=learner,
            teachers=teachers,
            deterministic=config.run.deterministic,
            recorder=job.recorder,
            progress=progress,
            checkpoints=checkpoints,
            keep=config.loop.keep_checkpoints,
            step=state["step"],
        )
        return ModelReference.of(str(await phase.run()))
    finally:
        if teachers is not None:
            await teachers.shutdown()
        if learner is not None:
            learner.shutdown()


class OffPolicyPhase:
    """Runs the updates of the phase.

    Args:
        settings: of the phase.
        objective: divergence that the held-out loss is.
        stream: responses to learn from.
        heldout: responses of the held-out loss; may be empty.
        learner: with the configuration of :func:`learner_settings`.
        teachers: score the responses; None for cross-entropy.
        deterministic: batches are scored as a whole.
        checkpoints: directory of the phase's checkpoints.
        keep: checkpoints that stay on disk.
        step: updates that the learner's weights have already had (resume).
    """

    def __init__(
        self,
        settings: OffPolicyConfig,
        *,
        objective: str,
        stream: ResponseStream,
        heldout: list[Response],
        learner: LearnerGroup,
        teachers: Teachers | None,
        deterministic: bool,
        recorder: Recorder,
        progress: Progress,
        checkpoints: Path,
        keep: int,
        step: int,
    ) -> None:
        self.settings, self.objective = settings, objective
        self.stream, self.heldout = stream, heldout
        self.learner, self.teachers, self.deterministic = learner, teachers, deterministic
        self.recorder, self.progress = recorder, progress
        self.checkpoints, self.step = checkpoints, step
        self.saver = Saver(learner, checkpoints, keep, step, progress)

    async def run(self) -> Path:
        """Does the steps that are left, then saves; returns the directory of the last checkpoint."""
        ahead: asyncio.Task[list[Scored]] | None = None
        try:
            if self.evaluation_is_due():
                await self.evaluate()
            while self.step < self.settings.steps:
                began = time.monotonic()
                samples = await (ahead or self.signals(self.stream.batch(self.step)))
                # The teacher scores the next batch while the learner learns this one.
                ahead = None
                if self.step + 1 < self.settings.steps:
                    ahead = asyncio.create_task(self.signals(self.stream.batch(self.step + 1)))
                await self.train_on(samples, began)
                del samples  # Their signals leave the object store.
                if self.evaluation_is_due():
                    if ahead:
                        await asyncio.wait([ahead])  # A batch that is scored as a whole is scored alone.
                    await self.evaluate()
                if due(self.step, self.settings.checkpoint_every) or self.step == self.settings.steps:
                    await self.saver.save(self.step, self.state)
        except BaseException:
            await self.saver.rescue(self.step, self.state)
            raise
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)
        return checkpoint.step_dir(self.checkpoints, self.step)

    @uninterrupted
    async def train_on(self, samples: list[Scored], began: float) -> None:
        """One update and its report, which never part: who cancels the phase finds both or neither.

        Args:
            began: when the step did, ``time.monotonic()``.
        """
        update = await self.learner.step(samples, self.step)
        self.step += 1
        tokens = sum(len(sample.rollout.input_ids) for sample in samples)
        report = OffPolicyReport(
            step=self.step,
            epoch=self.step * self.settings.responses_per_step / len(self.stream.responses),
            loss=update.loss,
            divergence=update.means.divergence,
            student_entropy=update.means.student_entropy,
            agreement=update.means.agreement,
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            skipped=int(bool(update.skipped)),
            responses=len(samples),
            response_tokens=update.means.tokens,
            tokens_per_second=tokens / update.seconds,
            seconds=time.monotonic() - began,
        )
        self.recorder.off_policy_step(report)
        self.progress.off_policy_step(report, self.settings.steps)
        if update.skipped:
            self.progress.say(update.skipped)

    async def signals(self, responses: Sequence[Response]) -> list[Scored]:
        """The responses with what the student shall learn of them."""
        rollouts = [response.as_rollout() for response in responses]
        teachers = self.teachers
        if teachers is None:
            return [Scored(rollout, None) for rollout in rollouts]
        if self.deterministic:
            signals = await teachers.score_batch(rollouts)
        else:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(teachers.score(rollout)) for rollout in rollouts]
            signals = [task.result() for task in tasks]
        return [Scored(*pair) for pair in zip(rollouts, signals, strict=True)]

    def evaluation_is_due(self) -> bool:
        """Whether there are held-out responses and their loss at this step is due and missing."""
        if self.step and self.step < self.settings.steps and not due(self.step, self.settings.eval_every):
            return False
        known = self.recorder.off_policy_evaluations()
        return bool(self.heldout) and all(result.step != self.step for result in known)

    async def evaluate(self) -> None:
        """Loss on the held-out responses."""
        samples = await self.signals(self.heldout)
        values = await self.learner.evaluate(samples, [self.objective])
        tokens = sum(len(sample.rollout.token_ids) for sample in samples)
        result = OffPolicyHeldout(self.step, values[self.objective], tokens)
        self.recorder.off_policy_heldout(result)
        self.progress.say(
            f"off-policy held-out loss after {self.step} steps: {result.loss:.4f} nats a token over {tokens:,} tokens"
        )

    @property
    def state(self) -> dict[str, Any]:
        """What the phase has learned, to be known again."""
        return {"responses": self.stream.fingerprint()}
