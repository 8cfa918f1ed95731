"""The program behind ``s2w train``: configuration -> cluster -> off-policy phase -> on-policy phase -> summary."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from s2w.config.schema import Config
from s2w.data.trial import try_verifiers
from s2w.launch import preflight
from s2w.launch.check import check, check_gradients, check_prompts
from s2w.launch.cluster import connected
from s2w.launch.demands import phases
from s2w.launch.describe import lines_about, run_prompts
from s2w.launch.job import Job, run_to_its_end
from s2w.launch.phases import last_checkpoint, run_off_policy, run_on_policy, steps_done
from s2w.launch.places import find_room, rehearse, reserve_engines
from s2w.launch.run_directory import CHECKPOINTS, OFF_POLICY, OFF_POLICY_CHECKPOINTS, opened
from s2w.models.student import student_reference
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder
from s2w.observe.step_report import StepReporter, totals
from s2w.observe.timeline import Timeline
from s2w.records import Prompt, Scored
from s2w.teacher_data.ceiling import Ceiling
from s2w.teacher_data.collect import TeacherResponses


def train(config: Config, on_batch: Callable[[list[Scored]], None] | None = None, *, quiet: bool = False) -> int:
    """Runs the whole job; returns the exit code: 0, or 130 if it was interrupted (and saved what it had).

    With ``cluster.dry_run`` it only places empty actors.

    Args:
        config: as :func:`s2w.config.compose.compose` returns it.
        on_batch: called with every batch once it is scored, the held-out ones too.
        quiet: prints only warnings and the summary.

    Raises:
        ConfigError: bad input; nothing was started.
        RunError: the run failed.
    """
    began = time.time()
    models = check(config)
    prompts, heldout = run_prompts(config, models)
    context_tokens = check_prompts(config, models, [*prompts, *heldout])
    try_verifiers([*prompts, *heldout])
    if config.run.preflight != "none":
        preflight.check_templates(config, heldout)
    steps = {"off_policy": config.off_policy.steps, "on_policy": config.loop.steps}
    progress = Progress(steps, quiet=quiet, verbose=config.cluster.log_to_driver)
    for note in (*models.vocabulary.notes, *lines_about(config, models, prompts, heldout)):
        progress.say(note)
    with connected(config.cluster) as (device, _):
        check_gradients(config, device)
        asyncio.run(find_room(config, phases(config), device))
        if config.cluster.dry_run:
            asyncio.run(rehearse(config, phases(config), device, progress))
            return 0
        with opened(config, "train") as run:
            progress.say(f"run directory {run}")
            recorder = Recorder(
                run,
                step=steps_done(last_checkpoint(config, run / CHECKPOINTS)),
                off_policy_step=steps_done(last_checkpoint(config, run / OFF_POLICY_CHECKPOINTS)),
                config=asdict(config),
                tensorboard=config.run.tensorboard,
                wandb=config.run.wandb_project if config.run.wandb else None,
                name=config.run.name,
                began=began,
            )
            job = Job(config, models, context_tokens, device, run, recorder, progress)
            return run_to_its_end(_run(job, prompts, heldout, on_batch), run, progress, "train")


async def _run(
    job: Job,
    prompts: Sequence[Prompt],
    heldout: Sequence[Prompt],
    on_batch: Callable[[list[Scored]], None] | None,
) -> None:
    """Runs the phases, or what is left of them, and prints the summary."""
    config, recorder = job.config, job.recorder
    timeline = job.directory / "timeline.jsonl"
    reporter = StepReporter(Timeline(timeline))
    reserve = reserve_engines(config, job.device)
    ceiling = Ceiling(config, job.models, job.device, heldout, job.context_tokens, recorder, job.progress, reserve)
    try:
        student = student_reference(config.student, job.directory / "student", config.run.seed)
        teacher_responses = TeacherResponses(
            config, job.models, job.device, job.directory / OFF_POLICY, job.progress, ceiling, reserve
        )
        if config.off_policy.steps:
            student = await run_off_policy(job, student, teacher_responses)
        if config.loop.steps:
            await run_on_policy(job, student, teacher_responses, ceiling, prompts, heldout, reporter, on_batch)
        summary = summarise(recorder, timeline)
        recorder.summary(summary)
        job.progress.summary(summary)
    finally:
        recorder.close()


def summarise(recorder: Recorder, timeline: Path) -> dict[str, Any]:
    """``summary.json``: held-out KL before the first and after the last on-policy update, the teacher's own held-out
    scores, what the run cost over all its starts, and the off-policy phase's held-out loss before and after."""
    summary: dict[str, Any] = {**totals(recorder.steps(), timeline), "wall_seconds": recorder.wall_seconds}
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
        if teacher := recorder.teacher_evaluation():
            summary["heldout"]["teacher"] = {"by_mode": teacher.by_mode}
    if losses := recorder.off_policy_evaluations():
        moments = {"before": losses[0], "after": losses[-1]}
        summary["off_policy"] = {name: {"loss": result.loss, "step": result.step} for name, result in moments.items()}
    summary["faults"] = [
        {name: line[name] for name in ("kind", "what", "why", "replacement", "seconds")} for line in recorder.faults()
    ]
    return summary
