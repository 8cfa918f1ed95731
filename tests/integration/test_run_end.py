"""How runs end that do not come to their end: by a signal, by a death of one of their processes, by their own.

One run directory lives through all of it. What ends a run, what it says, and what of it is left are looked at from
outside, as a user sees them.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from live_run import LiveRun, live_run
from tiny_models import make_checkpoint

from s2w.learner import checkpoint

RECORDED_RUN = Path(__file__).parents[1] / "helpers" / "recorded_run.py"
PROMPTS, EPOCH = 4, 3
"""Prompts a step; steps an epoch."""

FILES = (("metrics", "step"), ("heldout", "version"), ("timeline", "step"))
"""Of the run directory, and what their lines are about."""

Start = Callable[..., AbstractContextManager[LiveRun]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run_end")


@pytest.fixture(scope="module")
def start(directory: Path) -> Start:
    """Starts the run, or continues it."""
    teacher = make_checkpoint(directory / "teacher", "untied", 1)
    arguments = [
        "train", f"teacher.model={teacher}", f"student.model={teacher}", f"run.dir={directory / 'run'}",
        "student.init=fresh", "data.tasks=[chain_sum]", f"data.train_prompts={PROMPTS * EPOCH}",
        "data.heldout_prompts=2", "data.max_prompt_tokens=256", "rollout.max_tokens=8", "rollout.enforce_eager=true",
        "teacher.enforce_eager=true", "rollout.cpus=0.2", "teacher.cpus=0.2", "learner.cpus=0.2", "learner.ranks=2",
        f"loop.prompts_per_step={PROMPTS}", "loop.steps=1000", "loop.checkpoint_every=3", "loop.eval_every=2",
        "loop.max_staleness=1", "loop.keep_checkpoints=1", "cluster.device=cpu", "teacher.dtype=float32",
        "rollout.dtype=float32", "learner.dtype=float32",
    ]  # fmt: skip

    def started(name: str, **options: Any) -> AbstractContextManager[LiveRun]:
        resume = ["run.resume=true"] if (directory / "run" / "config.yaml").exists() else []
        command = [str(RECORDED_RUN), str(directory / "trained.jsonl"), *arguments, *resume]
        return live_run(command, directory / f"{name}.txt", **options)

    return started


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def saved_step(directory: Path) -> int:
    last = checkpoint.latest(directory / "run" / "checkpoints")
    assert last is not None
    return checkpoint.read_state(last)["step"]


def steps_of(run: LiveRun, more: int) -> None:
    """Waits until the run has made so many more steps; knows all processes then."""
    metrics = run.output.parent / "run" / "metrics.jsonl"
    run.until_said("all up after")
    before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    run.until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= before + more)
    assert len(run.processes("VLLM::EngineCore")) == 2
    assert len(run.processes("ray::LearnerRank")) == 2


def test_sigterm_ends_a_run_whose_sigint_is_ignored(start: Start, directory: Path) -> None:
    with start("sigterm", ignore_sigint=True) as run:
        steps_of(run, 2)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 130
        assert run.survivors() == []
    step = saved_step(directory)
    path = directory / "run" / "checkpoints" / f"step_{step:06d}"
    again = f"the same command with run.dir={directory / 'run'} run.resume=true"
    assert run.last_line() == f"interrupted; step {step} is saved in {path}; to continue: {again}"
    assert "Traceback" not in run.text()
    assert [line["step"] for line in lines(directory / "run" / "metrics.jsonl")] == list(range(1, step + 1))


@pytest.mark.parametrize(
    ("title", "said"),
    [
        (
            "VLLM::EngineCore",
            r"engine 0(?: died)?: its EngineCore process \d+ was killed (by SIG|or crash).*; .*rollout\.kv_cache_gib",
        ),
        (
            "ray::LearnerRank",
            r"learner rank [01] died in \w+: its process \d+ was killed or crashed; .*learner\.tokens_per_micro_batch",
        ),
    ],
)
def test_a_process_that_dies_ends_the_run_with_a_sentence(start: Start, directory: Path, title: str, said: str) -> None:
    with start(title) as run:
        steps_of(run, 2)
        log = directory / "run" / "error.log"
        before = log.stat().st_size if log.exists() else 0
        # The rollout engine's core: a teacher's is replaced.
        actor = {"VLLM::EngineCore": "ray::RolloutEngine", "ray::LearnerRank": "ray::LearnerRank"}[title]
        [victim, *_] = [p for p in run.processes(title) if actor in " ".join([*p.cmdline(), *p.parent().cmdline()])]
        victim.kill()
        began = time.monotonic()
        assert run.wait(60) == 1
        assert time.monotonic() - began < 40
        assert run.survivors() == []
    text = run.text()
    assert "Traceback" not in text
    sentence = run.last_line()
    assert sentence.startswith("s2w: ")
    assert re.search(said, sentence), sentence
    assert f"step {saved_step(directory)} is saved in" in sentence and "run.resume=true" in sentence
    assert sentence.endswith(f"traceback: {log}")
    assert "Traceback" in log.read_text()[before:]


def test_nothing_outlives_a_driver_that_is_killed_and_the_run_continues(start: Start, directory: Path) -> None:
    with start("killed") as run:
        steps_of(run, 4)
        metrics = directory / "run" / "metrics.jsonl"
        run.until(lambda: len(metrics.read_text().splitlines()) > saved_step(directory))
        run.process.kill()
        assert run.survivors() == []
    step = saved_step(directory)
    # A kill can come in the middle of a write, whose step is not saved then.
    for name, key in (*FILES, ("heldout_responses", "version"), ("samples", "version")):
        path = directory / "run" / f"{name}.jsonl"
        if lines(path)[-1][key] > step:
            path.write_bytes(path.read_bytes()[:-5])
    with start("resumed") as run:
        run.until_said("starting teacher")
        for name, key in FILES:
            assert max(line[key] for line in lines(directory / "run" / f"{name}.jsonl")) <= step
        steps_of(run, 5)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 130
        assert run.survivors() == []
    last = saved_step(directory)
    assert [line["step"] for line in lines(directory / "run" / "metrics.jsonl")] == list(range(1, last + 1))
    evaluated = [line["version"] for line in lines(directory / "run" / "heldout.jsonl")]
    assert evaluated == sorted(set(evaluated)) and set(range(0, last, 2)) <= set(evaluated)
    for name in ("heldout_responses", "samples"):
        assert sorted({line["version"] for line in lines(directory / "run" / f"{name}.jsonl")}) == evaluated
    # Of the updates that a kill took back, those that were made again count.
    trained = {line["step"]: line["uids"] for line in lines(directory / "trained.jsonl")}
    for first in range(1, last - EPOCH + 2, EPOCH):
        epoch = [uid for step in range(first, first + EPOCH) for uid in trained[step]]
        assert len(epoch) == len(set(epoch)) == PROMPTS * EPOCH, first


def test_nothing_outlives_a_driver_that_is_killed_on_a_standing_cluster(start: Start, directory: Path) -> None:
    head_command = [
        "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0", "--num-cpus=2",
        "--include-dashboard=false", "--disable-usage-stats",
    ]  # fmt: skip
    with live_run(head_command, directory / "head.txt") as head:
        head.until_said("Ray runtime started")
        with start("standing", cluster=head) as run:
            run.until_said("all up after")
            titles = ("VLLM::EngineCore", "ray::RolloutEngine", "ray::TeacherEngine", "ray::LearnerRank")
            # Children of the cluster's, not of the driver.
            assert [len(head.processes(title)) for title in titles] == [2, 1, 1, 2]
            run.family = {process.pid: process for title in titles for process in head.processes(title)}
            run.process.kill()
            assert run.survivors() == []
        assert head.process.poll() is None
