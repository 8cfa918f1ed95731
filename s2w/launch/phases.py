"""The two phases of a run: each starts its parts, runs its loop, and stops the parts, whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from s2w.actors.hardware import resolve_dtype, shares_gpu
from s2w.actors.starting import start_all
from s2w.config.schema import Config
from s2w.controller import Controller
from s2w.data.stream import prompt_stream
from s2w.errors import ConfigError
from s2w.eval.grading import Grader
from s2w.launch import preflight
from s2w.launch.check import off_policy, off_policy_prompts, on_policy
from s2w.launch.checkpoint_texts import checkpoint_texts
from s2w.launch.demands import OFF_POLICY, ON_POLICY, phase_of
from s2w.launch.job import Job, start_learner
from s2w.launch.model_card import Phase
from s2w.launch.places import reserved
from s2w.launch.run_directory import CHECKPOINTS, OFF_POLICY_CHECKPOINTS
from s2w.learner import checkpoint
from s2w.learner.group import LearnerGroup
from s2w.learner.saver import Saver
from s2w.models.checkpoint import ModelReference
from s2w.objectives.reliability import Reliability, reliability
from s2w.observe.step_report import StepReporter
from s2w.off_policy import OffPolicyController
from s2w.records import Prompt, Scored
from s2w.rollout.pool import RolloutPool
from s2w.teacher.routing import Teachers, teacher_settings
from s2w.teacher_data.batches import ResponseStream
from s2w.teacher_data.ceiling import Ceiling
from s2w.teacher_data.collect import TeacherResponses
from s2w.weights.probe import probe_tokens


async def run_off_policy(job: Job, student: ModelReference, teacher_responses: TeacherResponses) -> ModelReference:
    """The off-policy phase, or what is left of it: a checkpoint in, one out.

    The parts start one after the other, so that they can use the same GPUs: first the engines that generate, then
    the learner and, where the objective needs it, the teacher that scores.

    Args:
        student: the checkpoint to start from.
        teacher_responses: collected if the phase is not done.

    Returns:
        The phase's last checkpoint: the student that the on-policy phase starts from.

    Raises:
        ConfigError: no responses to train on, or not those of the checkpoint to continue from.
    """
    config, progress = job.config, job.progress
    off, checkpoints = config.off_policy, job.directory / OFF_POLICY_CHECKPOINTS
    last = last_checkpoint(config, checkpoints)
    state: dict[str, Any] = checkpoint.read_state(last) if last else {"step": 0}
    if last and state["step"] >= off.steps:
        progress.say(f"the off-policy phase is done: {last}")
        return ModelReference.of(str(last))
    responses = await teacher_responses.split()
    stream = ResponseStream(responses.train, off.responses_per_step, config.run.seed)
    if last:
        if state["data"]["responses"] != stream.fingerprint():
            raise ConfigError(f"cannot resume: {last} was trained on other responses than this run has now")
        progress.say(f"continues after off-policy step {state['step']} from {last}")

    settings, objective = off_policy_settings(config), off_policy(config)
    teachers: Teachers | None = None
    learner: LearnerGroup | None = None
    progress.say(f"{off.steps:,} off-policy steps on {len(responses.train):,} responses; starting the learner ...")
    async with reserved(config, phase_of(config, OFF_POLICY), job.device) as places:
        try:
            starts: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {}
            if objective.signals:
                teachers = Teachers(
                    config,
                    job.device,
                    config.data.max_prompt_tokens + off.max_tokens,
                    job.models.vocabulary.vocab_size,
                    tokenizer=job.models.student.tokenizer,
                    context_tokens=job.context_tokens,
                    places=places.places,
                    on_fault=job.recorder.fault,
                )
                starts["teachers"] = partial(teachers.start, config.cluster.start_timeout_s, progress)
            starts["learner"] = partial(start_learner, settings, student, job, places.ranks())
            learner = (await start_all(starts, in_turn=shares_gpu(job.device, config.learner.gpus)))["learner"]
            if last:
                progress.now(f"loading the optimizer state of {last}")
                await learner.load(last)
            controller = OffPolicyController(
                off,
                heldout_loss=objective.loss_settings(settings.loss).divergence,
                stream=stream,
                heldout=responses.heldout,
                learner=learner,
                teachers=teachers,
                deterministic=config.run.deterministic,
                recorder=job.recorder,
                progress=progress,
                saver=phase_saver(job, "off_policy", learner, checkpoints, state["step"]),
                step=state["step"],
            )
            return ModelReference.of(str(await controller.run()))
        finally:
            if teachers is not None:
                await teachers.shutdown()
            if learner is not None:
                learner.shutdown()


async def run_on_policy(
    job: Job,
    student: ModelReference,
    teacher_responses: TeacherResponses,
    ceiling: Ceiling,
    prompts: Sequence[Prompt],
    heldout: Sequence[Prompt],
    reporter: StepReporter,
    on_batch: Callable[[list[Scored]], None] | None,
) -> None:
    """The on-policy phase, or what is left of it.

    Args:
        student: the checkpoint that is policy version 0.
        teacher_responses: collected if batches have a share of them, or their verdicts count.
        on_batch: called with every batch once it is scored, the held-out ones too.
    """
    config, models, device, progress = job.config, job.models, job.device, job.progress
    began = time.time()
    dtypes = {part: resolve_dtype(getattr(config, part).dtype, device) for part in ("teacher", "rollout", "learner")}
    progress.say(f"device {device}, " + ", ".join(f"{part} {dtype}" for part, dtype in dtypes.items()))
    if len(settings := teacher_settings(config)) > 1:
        progress.say("teachers: " + ", ".join(f"{name} {teacher.model}" for name, teacher in settings.items()))
    objective = on_policy(config)
    given, max_model_len = None, models.max_model_len
    if share := off_policy_prompts(config.loop):
        train_responses = (await teacher_responses.split()).train
        given = ResponseStream(train_responses, share * config.loop.samples_per_prompt, config.run.seed)
        max_model_len = max(max_model_len, config.data.max_prompt_tokens + config.off_policy.max_tokens)
    stream = prompt_stream(config, prompts, config.loop.prompts_per_step - share, models.student.tokenizer)
    last, longest = last_checkpoint(config, job.directory / CHECKPOINTS), config.rollout.max_tokens
    step, data = steps_done(last), dict[str, Any](length_limit=longest)
    if last:
        data |= checkpoint.read_state(last)["data"]
        stream.load_state_dict(data["stream"])
        progress.say(f"continues after step {step} from {last}")

    # Before the parts start: the engines that generate use the same GPUs.
    trust = await teacher_reliability(config, teacher_responses)
    await ceiling.measure()
    references = await preflight.write_references(job, heldout) if config.run.preflight == "log_probs" else []
    async with reserved(config, phase_of(config, ON_POLICY), device) as places:
        teachers = Teachers(
            config,
            device,
            max_model_len,
            models.vocabulary.vocab_size,
            tokenizer=models.student.tokenizer,
            context_tokens=job.context_tokens,
            sampled=objective.teacher_log_probs,
            reference=student if objective.needs_reference else None,
            places=places.places,
            on_fault=job.recorder.fault,
        )
        rollouts = RolloutPool(
            config.rollout,
            model=student,
            device=device,
            dtype=dtypes["rollout"],
            max_model_len=models.max_model_len,
            vocab_size=models.vocabulary.vocab_size,
            candidates=config.signal.top_k if config.signal.kind == "ids" else 0,
            stop_token_ids=models.student.eos_token_ids,
            cluster=config.cluster,
            place=places.places("rollout"),
            on_fault=job.recorder.fault,
        )
        learner: LearnerGroup | None = None
        grader = Grader(models.student.tokenizer)
        try:
            progress.say("starting teacher, rollout engines and learner ...")
            timeout = config.cluster.start_timeout_s
            starts: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
                "teachers": partial(teachers.start, timeout, progress),
                "rollouts": partial(rollouts.start, step, timeout, progress),
            }
            if config.run.preflight != "divergence":
                starts["learner"] = partial(start_learner, config, student, job, places.ranks())
            learner = (await start_all(starts, in_turn=shares_gpu(job.device, config.learner.gpus))).get("learner")
            if learner is None:
                await preflight.check_teachers_as_students(job, rollouts, teachers, heldout, places.ranks())
                learner = await start_learner(config, student, job, places.ranks())
            await preflight.check_references(job, references, teachers, learner)
            if last:
                progress.now(f"loading the optimizer state of {last}")
                await learner.load(last)
                progress.now(None)
            controller = Controller(
                config.loop,
                deterministic=config.run.deterministic,
                stream=stream,
                teacher_responses=given,
                heldout=list(heldout),
                rollouts=rollouts,
                teachers=teachers,
                learner=learner,
                grader=grader,
                objective=objective,
                reliability=trust,
                longest=longest,
                length_limit=data["length_limit"],
                recorder=job.recorder,
                progress=progress,
                reporter=reporter,
                probe_ids=probe_tokens([prompt.token_ids for prompt in heldout], models.max_model_len - 1),
                probe_tolerance=probe_tolerance(config, dtypes),
                step=step,
                saver=phase_saver(job, "on_policy", learner, job.directory / CHECKPOINTS, step),
                on_batch=on_batch,
            )
            progress.say(f"all up after {time.time() - began:.0f} s")
            await controller.run()
        finally:
            grader.close()
            await asyncio.gather(teachers.shutdown(), rollouts.shutdown())
            if learner is not None:
                learner.shutdown()


def phase_saver(job: Job, phase: Phase, learner: LearnerGroup, directory: Path, step: int) -> Saver:
    """Saves the updates of a phase, with a model card in each checkpoint."""
    keep, texts = job.config.loop.keep_checkpoints, partial(checkpoint_texts, job, phase)
    return Saver(learner, directory, keep, step, job.progress.say, texts)


def off_policy_settings(config: Config) -> Config:
    """The configuration of the learner in the off-policy phase: its own learning rate, steps and objective."""
    off = config.off_policy
    learner = replace(
        config.learner,
        learning_rate=off.learning_rate,
        schedule=off.schedule,
        warmup_steps=off.warmup_steps,
        min_lr_ratio=off.min_lr_ratio,
    )
    loss, loop = replace(config.loss, objective=off.loss), replace(config.loop, steps=off.steps)
    return replace(config, learner=learner, loop=loop, loss=loss)


async def teacher_reliability(config: Config, teacher_responses: TeacherResponses) -> Reliability | None:
    """Weights by the verdicts on the teacher's own responses; collects those if they count."""
    if config.loop.unreliable_weight == 1:
        return None
    filtered = await teacher_responses.filtered()
    right = [response.prompt for response in filtered.kept if response.prompt.task]
    wrong = [response.prompt for response, reason in filtered.dropped if reason == "wrong"]
    return Reliability(reliability(right, wrong), config.loop.unreliable_weight)


def last_checkpoint(config: Config, directory: Path) -> Path | None:
    """The checkpoint under ``directory`` that the run continues from, if it does."""
    return checkpoint.latest(directory) if config.run.resume else None


def steps_done(last: Path | None) -> int:
    """Updates in a checkpoint."""
    return checkpoint.read_state(last)["step"] if last else 0


def probe_tolerance(config: Config, dtypes: dict[str, str]) -> float:
    """``run.probe_tolerance``, or what the dtypes' own rounding allows."""
    if config.run.probe_tolerance is not None:
        return config.run.probe_tolerance
    # Two implementations of attention in one library differ by 0.14 nats in bfloat16 on a model with layers cut out;
    # wrong weights differ by nats.
    return 1e-3 if dtypes["rollout"] == dtypes["learner"] == "float32" else 0.25
