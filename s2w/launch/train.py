"""The program behind ``s2w train``: configuration -> cluster -> off-policy phase -> on-policy phase -> summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from s2w.config.schema import Config
from s2w.data.placeholders import context_columns
from s2w.data.prompts import build_prompts
from s2w.launch import preflight
from s2w.launch.check import check, check_prompts, check_resources
from s2w.launch.cluster import connected
from s2w.launch.job import CHECKPOINTS, OFF_POLICY, OFF_POLICY_CHECKPOINTS, Job, open_directory, run_to_its_end
from s2w.launch.phases import last_checkpoint, run_off_policy, run_on_policy, steps_done
from s2w.models.student import student_reference
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder
from s2w.observe.step_report import StepReporter
from s2w.observe.timeline import Timeline
from s2w.records import Prompt, Scored
from s2w.teacher_data.collect import TeacherResponses


def train(config: Config, on_batch: Callable[[list[Scored]], None] | None = None) -> int:
    """Runs the whole job; returns the exit code: 0, or 130 if it was interrupted (and saved what it had).

    Args:
        config: as :func:`s2w.config.compose.compose` returns it.
        on_batch: called with every batch once it is scored, the held-out ones too.

    Raises:
        ConfigError: bad input; nothing was started.
    """
    began = time.time()
    models = check(config)
    prompts, heldout = build_prompts(
        config.data,
        models.student.tokenizer,
        config.run.seed,
        config.data.modes,
        models.max_model_len,
        context_columns(config),
    )
    context_tokens = check_prompts(config, models, [*prompts, *heldout])
    if config.run.preflight != "none":
        preflight.check_templates(config, heldout)
    progress = Progress({"off_policy": config.off_policy.steps, "on_policy": config.loop.steps})
    for note in models.vocabulary.notes:
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
        job = Job(config, models, context_tokens, device, run, recorder, progress)
        return run_to_its_end(_run(job, prompts, heldout, began, on_batch), run, progress)


async def _run(
    job: Job,
    prompts: Sequence[Prompt],
    heldout: Sequence[Prompt],
    began: float,
    on_batch: Callable[[list[Scored]], None] | None,
) -> None:
    """Runs the phases, or what is left of them, and prints the summary."""
    config, recorder = job.config, job.recorder
    reporter = StepReporter(Timeline(job.directory / "timeline.jsonl"))
    try:
        student = student_reference(config.student, job.directory / "student", config.run.seed)
        teacher_responses = TeacherResponses(config, job.models, job.device, job.directory / OFF_POLICY, job.progress)
        if config.off_policy.steps:
            student = await run_off_policy(job, student, teacher_responses)
        if config.loop.steps:
            await run_on_policy(job, student, teacher_responses, prompts, heldout, reporter, on_batch)
        summary = summarise(recorder, reporter, time.time() - began)
        recorder.summary(summary)
        job.progress.summary(summary)
    finally:
        recorder.close()


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
