"""The program behind ``s2w train``: configuration -> cluster -> off-policy phase -> on-policy phase -> summary."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from s2w import preflight
from s2w.cluster import connected
from s2w.config import Config, Objective, Preflight, SignalKind
from s2w.controller import Controller
from s2w.credit import Credit, reliability
from s2w.data.prompts import build_prompts, prompt_stream
from s2w.eval.grading import Grader
from s2w.hardware import resolve_dtype
from s2w.job import CHECKPOINTS, OFF_POLICY_CHECKPOINTS, Job, open_directory, run_to_its_end
from s2w.learner import checkpoint
from s2w.learner.group import LearnerGroup, start_learner
from s2w.models.checkpoint import ModelReference
from s2w.models.student import student_reference
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder
from s2w.observe.step_report import StepReporter
from s2w.observe.timeline import Timeline
from s2w.off_policy import phase as off_policy
from s2w.off_policy.batches import ResponseStream
from s2w.off_policy.collect import TeacherResponses
from s2w.records import Prompt, Scored
from s2w.rollout.pool import RolloutPool
from s2w.teacher.routing import Teachers
from s2w.validate import check, check_resources, check_verifiable, off_policy_prompts
from s2w.weights.probe import probe_tokens


def train(config: Config, on_batch: Callable[[list[Scored]], None] | None = None) -> int:
    """Runs the whole job; returns the exit code: 0, or 130 if it was interrupted (and saved what it had).

    Args:
        config: as :func:`s2w.compose.compose` returns it.
        on_batch: called with every batch once it is scored, the held-out ones too.

    Raises:
        ConfigError: bad input; nothing was started.
    """
    began = time.time()
    facts = check(config)
    prompts, heldout = build_prompts(
        config.data,
        facts.student.tokenizer,
        config.run.seed,
        [mode.value for mode in config.data.modes],
        facts.max_model_len,
    )
    check_verifiable(config, prompts)
    if config.run.preflight is not Preflight.none:
        preflight.check_templates(config, heldout)
    progress = Progress(config.loop.steps, config.loss.divergence)
    for note in facts.vocabulary.notes:
        progress.say(note)
    with connected(config.cluster) as (device, resources):
        check_resources(config, device, resources)
        run = open_directory(config)
        progress.say(f"run directory {run}")
        recorder = Recorder(
            run,
            step=steps_done(last_checkpoint(config, run / CHECKPOINTS)),
            off_policy_step=steps_done(last_checkpoint(config, run / OFF_POLICY_CHECKPOINTS)),
            config=asdict(config),
            tensorboard=config.run.tensorboard,
            wandb=config.run.wandb_project if config.run.wandb else None,
            name=config.run.name,
        )
        job = Job(config, facts, device, run, recorder, progress)
        return run_to_its_end(_run(job, prompts, heldout, began, on_batch), run, progress)


async def _run(
    job: Job,
    prompts: list[Prompt],
    heldout: list[Prompt],
    began: float,
    on_batch: Callable[[list[Scored]], None] | None,
) -> None:
    """Runs the phases, or what is left of them, and prints the summary."""
    config, recorder = job.config, job.recorder
    reporter = StepReporter(Timeline(job.directory / "timeline.jsonl"))
    try:
        student = student_reference(config.student, job.directory / "student", config.run.seed)
        teacher_responses = TeacherResponses(job)
        if config.off_policy.steps:
            student = await off_policy.run_phase(job, student, teacher_responses)
        if config.loop.steps:
            await _on_policy(job, student, teacher_responses, prompts, heldout, reporter, on_batch)
        summary = summarise(recorder, reporter, time.time() - began)
        recorder.summary(summary)
        job.progress.summary(summary)
    finally:
        recorder.close()


async def _on_policy(
    job: Job,
    student: ModelReference,
    teacher_responses: TeacherResponses,
    prompts: list[Prompt],
    heldout: list[Prompt],
    reporter: StepReporter,
    on_batch: Callable[[list[Scored]], None] | None,
) -> None:
    """Starts the parts of the on-policy phase, runs its loop, stops the parts.

    Args:
        student: the checkpoint that is policy version 0.
        teacher_responses: collected if batches have a share of them.
    """
    config, facts, device, progress = job.config, job.facts, job.device, job.progress
    began = time.time()
    dtypes = {part: resolve_dtype(getattr(config, part).dtype, device) for part in ("teacher", "rollout", "learner")}
    progress.say(f"device {device}, " + ", ".join(f"{part} {dtype}" for part, dtype in dtypes.items()))
    last = last_checkpoint(config, job.directory / CHECKPOINTS)
    step = steps_done(last)
    given, max_model_len = None, facts.max_model_len
    if share := off_policy_prompts(config.loop):
        train_responses = (await teacher_responses.split()).train
        given = ResponseStream(train_responses, share * config.loop.samples_per_prompt, config.run.seed)
        max_model_len = max(max_model_len, config.data.max_prompt_tokens + config.off_policy.max_tokens)
    stream = prompt_stream(config, prompts, config.loop.prompts_per_step - share, facts.student.tokenizer)
    if last:
        stream.load_state_dict(checkpoint.read_state(last)["data"]["stream"])
        progress.say(f"continues after step {step} from {last}")

    credit = await make_credit(config, teacher_responses)

    references = await preflight.write_references(job, heldout) if config.run.preflight is Preflight.log_probs else []
    teachers = Teachers(config, device, max_model_len, facts.vocabulary.vocab_size)
    rollouts = RolloutPool(
        config.rollout,
        model=student,
        device=device,
        dtype=dtypes["rollout"],
        max_model_len=facts.max_model_len,
        vocab_size=facts.vocabulary.vocab_size,
        candidates=config.signal.top_k if config.signal.kind is SignalKind.ids else 0,
        stop_token_ids=facts.student.eos_token_ids,
    )
    learner: LearnerGroup | None = None
    grader = Grader(facts.student.tokenizer)
    try:
        progress.say("starting teacher, rollout engines and learner ...")
        timeout = config.cluster.start_timeout_s
        async with asyncio.TaskGroup() as group:
            group.create_task(teachers.start(timeout))
            group.create_task(rollouts.start(step, timeout))
            if config.run.preflight is not Preflight.divergence:
                starting = group.create_task(start_learner(config, student, job))
        if config.run.preflight is Preflight.divergence:
            await preflight.check_teachers_as_students(job, rollouts, teachers, heldout)
            learner = await start_learner(config, student, job)
        else:
            learner = starting.result()
        await preflight.check_references(job, references, teachers, learner)
        if last:
            await learner.load(last)
        controller = Controller(
            config.loop,
            deterministic=config.run.deterministic,
            stream=stream,
            teacher_responses=given,
            heldout=heldout,
            rollouts=rollouts,
            teachers=teachers,
            learner=learner,
            grader=grader,
            credit=credit,
            scored=config.loss.objective is Objective.divergence,
            recorder=job.recorder,
            progress=progress,
            reporter=reporter,
            probe_ids=probe_tokens([prompt.token_ids for prompt in heldout], facts.max_model_len - 1),
            probe_tolerance=probe_tolerance(config, dtypes),
            step=step,
            checkpoints=job.directory / CHECKPOINTS,
            on_batch=on_batch,
        )
        progress.say(f"all up after {time.time() - began:.0f} s")
        await controller.run()
    finally:
        grader.close()
        await asyncio.gather(teachers.shutdown(), rollouts.shutdown())
        if learner is not None:
            learner.shutdown()


async def make_credit(config: Config, teacher_responses: TeacherResponses) -> Credit:
    """What the run's samples count for; collects the teacher's responses if their answers weigh."""
    rewarded = config.loss.objective is Objective.grpo or config.reward.weight > 0
    shares = {}
    if config.loop.unreliable_weight < 1:
        filtered = await teacher_responses.filtered()
        verified = [response for response in filtered.kept if response.prompt.task]
        shares = reliability(verified, [response for response, reason in filtered.dropped if reason == "wrong"])
    return Credit(config.reward if rewarded else None, shares, config.loop.unreliable_weight)


def summarise(recorder: Recorder, reporter: StepReporter, wall_seconds: float) -> dict[str, Any]:
    """``summary.json``: held-out KL before the first and after the last on-policy update, what the run cost, and the
    off-policy phase's held-out loss before and after."""
    summary: dict[str, Any] = {**reporter.totals(), "wall_seconds": wall_seconds}
    if evaluations := recorder.evaluations():
        summary["heldout"] = {
            moment: {
                "forward_kl": result.forward_kl,
                "reverse_kl": result.reverse_kl,
                "version": result.version,
                "by_mode": result.by_mode,
            }
            for moment, result in (("before", evaluations[0]), ("after", evaluations[-1]))
        }
    if losses := recorder.off_policy_evaluations():
        moments = {"before": losses[0], "after": losses[-1]}
        summary["off_policy"] = {name: {"loss": result.loss, "step": result.step} for name, result in moments.items()}
    return summary


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
