"""How runs end that do not come to their end: by a signal, by a death of one of their processes, by their own.

One run directory lives through all of it. What ends a run, what it says, and what of it is left are looked at from
outside, as a user sees them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from live_run import LiveRun, live_run, runs
from reference_step import COMMON, FRESH, Models
from tiny_models import make_checkpoint

from s2w.config.compose import compose
from s2w.errors import RunError
from s2w.launch.train import train
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

    def started(name: str, *overrides: str, **options: Any) -> AbstractContextManager[LiveRun]:
        if not overrides and (directory / "run" / "config.yaml").exists():
            overrides = ("run.resume=true",)
        command = [str(RECORDED_RUN), str(directory / "trained.jsonl"), *arguments, *overrides]
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


@pytest.mark.parametrize("sign", ["gcs_server", "ray::RolloutEng"])
def test_sigterm_to_its_whole_group_while_it_starts(start: Start, directory: Path, sign: str) -> None:
    with start("group", f"run.dir={directory / 'never' / 'run'}") as run:
        run.until(lambda: any(process.name().startswith(sign) for process in run.processes()))
        os.killpg(run.process.pid, signal.SIGTERM)
        assert run.wait(10) == 130
        assert run.survivors() == []
    text = run.text()
    assert "interrupted" in run.last_line() and "Traceback" not in text and "GCS" not in text, text
    assert not (directory / "never").exists()


def test_sigterm_ends_a_run_whose_sigint_is_ignored(start: Start, directory: Path) -> None:
    with start("sigterm", ignore_sigint=True) as run:
        steps_of(run, 2)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 130
        assert run.survivors() == []
    step = saved_step(directory)
    path = directory / "run" / "checkpoints" / f"step_{step:06d}"
    again = f"s2w train run.resume=true run.dir={directory / 'run'}"
    assert run.last_line() == f"interrupted; step {step} is saved in {path}; to continue: {again}"
    assert "Traceback" not in run.text()
    assert [line["step"] for line in lines(directory / "run" / "metrics.jsonl")] == list(range(1, step + 1))


def test_engines_that_die_or_hang_are_replaced(start: Start, directory: Path) -> None:
    """The run's only rollout engine and only teacher; the steps that wait for them lose no prompt."""
    events = directory / "run" / "events.jsonl"
    with start("replaced", "run.resume=auto", "cluster.hang_timeout_s=6") as run:
        steps_of(run, 2)
        for number, (owner, title, sign) in enumerate(
            (
                ("ray::RolloutEngine", "VLLM::EngineCore", signal.SIGKILL),
                ("ray::TeacherEngine", "ray::TeacherEngine", signal.SIGKILL),
                ("ray::RolloutEngine", "VLLM::EngineCore", signal.SIGSTOP),
            )
        ):
            [victim] = [
                one for one in run.processes(title) if owner in " ".join([*one.cmdline(), *one.parent().cmdline()])
            ]
            victim.send_signal(sign)
            run.until(lambda: events.exists() and len(lines(events)) > number)  # noqa: B023 - called at once
            steps_of(run, 2)
            assert not runs(victim)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 130
        assert run.survivors() == []
    killed, teacher, stopped = lines(events)
    assert [fault["what"] for fault in (killed, teacher, stopped)] == [
        "rollout engine 0",
        "teacher 0",
        "rollout engine 1",
    ]
    assert [fault["replacement"] for fault in (killed, teacher, stopped)] == [
        "rollout engine 1",
        "teacher 1",
        "rollout engine 2",
    ]
    assert re.match(
        r"its EngineCore process \d+ was killed (by SIG|or crash).*; .*rollout\.kv_cache_gib", killed["why"]
    )
    assert re.match(r"its process \d+ was killed or crashed; .*teacher\.kv_cache_gib", teacher["why"])
    assert stopped["why"] == "it has given no sign of life for 6 s (cluster.hang_timeout_s)"
    text = run.text()
    assert "Traceback" not in text
    assert (
        "rollout engine 0 is lost: its EngineCore" in text and "rollout engine 1 has replaced rollout engine 0" in text
    )
    last = saved_step(directory)
    assert [line["step"] for line in lines(directory / "run" / "metrics.jsonl")] == list(range(1, last + 1))
    trained = {line["step"]: line["uids"] for line in lines(directory / "trained.jsonl")}
    assert all(len(trained[step]) == PROMPTS for step in range(1, last + 1))


def test_a_learner_rank_that_dies_ends_the_run_with_a_sentence(start: Start, directory: Path) -> None:
    with start("rank") as run:
        steps_of(run, 2)
        log = directory / "run" / "error.log"
        before = log.stat().st_size if log.exists() else 0
        run.processes("ray::LearnerRank")[0].kill()
        began = time.monotonic()
        assert run.wait(60) == 1
        assert time.monotonic() - began < 40
        assert run.survivors() == []
    text = run.text()
    assert "Traceback" not in text
    sentence = run.last_line()
    said = (
        r"^s2w: learner rank [01] died in \w+: its process \d+ was killed or crashed; .*learner\.tokens_per_micro_batch"
    )
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


SCORING = """
def judged(response, answer, row):
    # Passes its trial, which is on an empty response.
    return 2 if response and row["spoilt"] else 1.0
"""


def test_a_verifier_that_fails_on_a_response_ends_the_run_with_its_row(
    models: Models, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first batch with such a response, before it is trained on."""
    (tmp_path / "judging.py").write_text(SCORING)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {i} plus {i}?", "mode": "no_think", "spoilt": i == 2} for i in range(4)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("heldout.jsonl").write_text(json.dumps(rows[0] | {"prompt": "What is 9 plus 9?"}) + "\n")
    run = tmp_path / "run"
    sides = [f"teacher.model={models.teacher}", f"student.model={models.dense}", f"run.dir={run}"]
    own = ["data.path=prompts.jsonl", "data.heldout_path=heldout.jsonl", "data.verifier=judging:judged"]
    config = compose([*COMMON, *FRESH, *sides, "data.tasks=[]", *own, f"cluster.address={address}"])
    with pytest.raises(RunError) as caught:
        train(config)
    assert str(caught.value) == (
        "'prompts.jsonl', line 3 (prompt 'judging:judged/train/2'): its verifier judging:judged returned 2: a score is "
        f"a number from 0 (wrong) to 1 (right); no step is saved yet; to continue: s2w train run.resume=true "
        f"run.dir={run}; traceback: {run / 'error.log'}"
    )
    [heldout] = lines(run / "heldout.jsonl")
    assert (heldout["version"], heldout["by_mode"]["no_think"]["accuracy"]) == (0, 1.0)
    assert not (run / "metrics.jsonl").exists() or lines(run / "metrics.jsonl") == []


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
