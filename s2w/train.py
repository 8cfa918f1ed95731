"""The program behind ``s2w train``: configuration -> cluster -> parts -> loop -> summary."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from s2w.compose import to_yaml
from s2w.config import Config, SignalKind
from s2w.controller import Controller
from s2w.data.prompts import PromptStream, build_prompts
from s2w.errors import ConfigError
from s2w.hardware import resolve_dtype
from s2w.learner import checkpoint
from s2w.learner.group import LearnerGroup
from s2w.models.student import materialise_student
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder
from s2w.observe.step_report import StepReporter
from s2w.observe.timeline import Timeline
from s2w.records import Prompt, Scored
from s2w.rollout.pool import RolloutPool
from s2w.teacher.pool import TeacherPool
from s2w.validate import Facts, check, check_resources

INTERRUPTED = 130
"""Exit code after SIGINT or SIGTERM, a shell's own for SIGINT."""


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
    progress = Progress(config.loop.steps, config.loss.divergence)
    for note in facts.vocabulary.notes:
        progress.say(note)
    connect(config)
    try:
        resources = ray.cluster_resources()
        device = resolve_device(config, resources)
        check_resources(config, device, resources)
        run = Path(config.run.dir).resolve()
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(to_yaml(config))
        progress.say(f"run directory {run}")
        asyncio.run(_run(config, facts, prompts, heldout, device, run, progress, began, on_batch))
    except (KeyboardInterrupt, asyncio.CancelledError):
        progress.say(f"interrupted; to continue: the same command with run.dir={config.run.dir} run.resume=true")
        return INTERRUPTED
    finally:
        ray.shutdown()
    return 0


async def _run(
    config: Config,
    facts: Facts,
    prompts: list[Prompt],
    heldout: list[Prompt],
    device: str,
    run: Path,
    progress: Progress,
    began: float,
    on_batch: Callable[[list[Scored]], None] | None,
) -> None:
    """Starts the parts, runs the loop, prints the summary, stops the parts."""
    task = asyncio.current_task()
    assert task is not None
    # `ray job stop` and batch systems end a job with SIGTERM; asyncio treats SIGINT the same way by itself.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    dtypes = {part: resolve_dtype(getattr(config, part).dtype, device) for part in ("teacher", "rollout", "learner")}
    progress.say(f"device {device}, " + ", ".join(f"{part} {dtype}" for part, dtype in dtypes.items()))
    checkpoints = run / "checkpoints"
    last = checkpoint.latest(checkpoints) if config.run.resume else None
    state = checkpoint.read_state(last) if last else None
    step = state["step"] if state else 0
    stream = PromptStream(prompts, config.loop.prompts_per_step, config.run.seed)
    if state:
        stream.load_state_dict(state["data"]["stream"])
        progress.say(f"continues after step {step} from {last}")
    student = materialise_student(config.student, run / "student", config.run.seed)

    kind = config.signal.kind
    teachers = TeacherPool(
        config.teacher,
        config.signal,
        config.loss.temperature,
        device=device,
        dtype=dtypes["teacher"],
        max_model_len=config.teacher.max_model_len or facts.max_model_len,
    )
    rollouts = RolloutPool(
        config.rollout,
        model=str(student),
        device=device,
        dtype=dtypes["rollout"],
        max_model_len=facts.max_model_len,
        candidates=config.signal.top_k if kind is SignalKind.ids else 0,
        stop_token_ids=facts.student.eos_token_ids,
    )
    learner: LearnerGroup | None = None
    recorder = Recorder(
        run,
        step=step,
        config=asdict(config),
        tensorboard=config.run.tensorboard,
        wandb=config.run.wandb_project if config.run.wandb else None,
        name=config.run.name,
    )
    try:
        progress.say("starting teacher, rollout engines and learner ...")
        timeout = config.cluster.start_timeout_s
        async with asyncio.TaskGroup() as group:
            group.create_task(teachers.start(timeout))
            group.create_task(rollouts.start(step, timeout))
            starting = group.create_task(LearnerGroup.start(config, student, device, facts.vocabulary.vocab_size))
        learner = starting.result()
        if last:
            await learner.load(last)
        reporter = StepReporter(Timeline(run / "timeline.jsonl"))
        controller = Controller(
            config.loop,
            deterministic=config.run.deterministic,
            stream=stream,
            heldout=heldout,
            rollouts=rollouts,
            teachers=teachers,
            learner=learner,
            recorder=recorder,
            progress=progress,
            reporter=reporter,
            probe_tolerance=probe_tolerance(config, dtypes),
            step=step,
            checkpoints=checkpoints,
            on_batch=on_batch,
        )
        progress.say(f"all up after {time.time() - began:.0f} s")
        await controller.run()
        summary = summarise(recorder, reporter, time.time() - began)
        recorder.summary(summary)
        progress.summary(summary)
    finally:
        recorder.close()
        await asyncio.gather(teachers.shutdown(), rollouts.shutdown())
        if learner is not None:
            learner.shutdown()


def summarise(recorder: Recorder, reporter: StepReporter, wall_seconds: float) -> dict[str, Any]:
    """``summary.json``: held-out KL before the first and after the last update, and what the run cost."""
    evaluations = recorder.evaluations()
    before, after = evaluations[0], evaluations[-1]
    return {
        "heldout": {
            moment: {"forward_kl": result.forward_kl, "reverse_kl": result.reverse_kl, "version": result.version}
            for moment, result in (("before", before), ("after", after))
        },
        **reporter.totals(),
        "wall_seconds": wall_seconds,
    }


def probe_tolerance(config: Config, dtypes: dict[str, str]) -> float:
    """``run.probe_tolerance``, or what the dtypes' own rounding allows."""
    if config.run.probe_tolerance is not None:
        return config.run.probe_tolerance
    return 1e-3 if dtypes["rollout"] == dtypes["learner"] == "float32" else 0.05


def connect(config: Config) -> None:
    """Joins the Ray cluster, or starts one on this machine."""
    ray.init(
        address=config.cluster.address,
        include_dashboard=False if config.cluster.address is None and "RAY_ADDRESS" not in os.environ else None,
        log_to_driver=config.cluster.log_to_driver,
        logging_level=logging.WARNING,
    )


def resolve_device(config: Config, resources: dict[str, float]) -> str:
    """``cuda`` or ``cpu``, from cluster.device and the cluster's resources.

    Raises:
        ConfigError: cuda is asked for and the cluster has none.
    """
    if config.cluster.device == "auto":
        return "cuda" if resources.get("GPU", 0) else "cpu"
    if config.cluster.device == "cuda" and not resources.get("GPU", 0):
        raise ConfigError("cluster.device=cuda, but the cluster has 0 GPUs: write cluster.device=cpu, or add GPU nodes")
    return config.cluster.device
