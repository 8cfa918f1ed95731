"""A run directory belongs to one configuration and one process, and to a run that computed something."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from s2w.config.compose import compose, to_yaml
from s2w.config.schema import Config
from s2w.errors import ConfigError, RunError
from s2w.launch.run_directory import ENTRIES, LOCK, OFF_POLICY, check_run_directory, has_results, opened
from s2w.learner import checkpoint


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return compose(["teacher.model=t", "student.model=s", f"run.dir={tmp_path / 'runs' / 'a'}"])


@pytest.fixture
def directory(config: Config) -> Path:
    return Path(config.run.dir)


def resumed(config: Config) -> Config:
    return replace(config, run=replace(config.run, resume=True))


def save(directory: Path, step: int) -> Path:
    return checkpoint.commit(checkpoint.begin(directory / "checkpoints", step), {"step": step}, keep=1)


def write_all(directory: Path) -> None:
    """As a run that has loaded its parts."""
    for pattern in ENTRIES:
        path = directory / pattern.replace("*", "x")
        if path.name in ("tensorboard", "wandb", "student", ".student.x", "off_policy", "checkpoints"):
            path.mkdir()
            (path / "file").touch()
        elif not path.exists():
            path.touch()


@pytest.mark.parametrize("error", [ValueError("no such layer"), KeyboardInterrupt(), ConfigError("a setting")])
def test_a_start_that_fails_leaves_nothing(
    config: Config, directory: Path, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises((RunError, type(error))) as caught, opened(config, "train") as run:
        assert compose([f"run.dir={run}", "run.resume=true"]) == resumed(config)
        write_all(run)
        raise error
    assert not directory.parent.exists()
    if isinstance(caught.value, RunError):
        [log] = tmp_path.glob("s2w-*.error.log")
        assert str(caught.value) == (
            f"ValueError: no such layer; nothing was computed yet: the same command starts it again; traceback: {log}"
        )
        assert "Traceback" in log.read_text()
    check_run_directory(config)


def test_files_of_the_users_stay(config: Config, directory: Path) -> None:
    (directory / "code").mkdir(parents=True)
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt), opened(config, "train") as run:
        write_all(run)
        (run / "later.txt").touch()
        raise KeyboardInterrupt
    assert sorted(path.name for path in directory.iterdir()) == ["code", "later.txt", "notes.txt"]


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "wandb"])
def test_a_directory_with_something_else_of_that_name_is_refused(config: Config, directory: Path, name: str) -> None:
    (directory / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"contains no run but '{name}', which a run would overwrite"):
        check_run_directory(config)


@pytest.mark.parametrize(
    "compute",
    [
        lambda run: (run / "metrics.jsonl").write_text("{}\n"),
        lambda run: (run / "heldout.jsonl").write_text("{}\n"),
        lambda run: (run / OFF_POLICY / "shard-000000.parquet").touch(),
        lambda run: (run / OFF_POLICY / "heldout.jsonl").write_text("{}\n"),
        lambda run: save(run, 3),
    ],
)
def test_a_run_that_computed_something_stays(
    config: Config, directory: Path, compute: Callable[[Path], object]
) -> None:
    with pytest.raises(RunError) as caught, opened(config, "train") as run:
        (run / OFF_POLICY).mkdir()
        assert not has_results(run)
        compute(run)
        raise ValueError("later")
    said = str(caught.value)
    assert f"to continue: s2w train run.resume=true run.dir={directory}; traceback: {directory / 'error.log'}" in said
    with pytest.raises(ConfigError, match=r"already holds this run: add run\.resume=true"):
        check_run_directory(config)
    with opened(resumed(config), "train") as run:
        assert has_results(run)
    assert has_results(directory)


def test_what_a_killed_start_left_is_cleared(config: Config, directory: Path) -> None:
    directory.mkdir(parents=True)
    write_all(directory)
    (directory / LOCK).write_text("process 1 on node\n")
    other = replace(config, learner=replace(config.learner, learning_rate=0.5))
    check_run_directory(other)
    with opened(other, "train") as run:
        assert sorted(path.name for path in run.iterdir()) == [".lock", "config.yaml"]
        assert "learning_rate: 0.5" in (run / "config.yaml").read_text()
        save(run, 1)


def test_one_process_writes_it(config: Config, directory: Path) -> None:
    directory.mkdir(parents=True)
    program = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); " + (
        "print('process 7 on node', file=f, flush=True); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(directory / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        said = r"is being written by process 7 on node: wait until it has ended, or choose another run\.dir"
        with pytest.raises(ConfigError, match=said):
            check_run_directory(config)
        with pytest.raises(ConfigError, match=said), opened(config, "train"):
            pass
        assert (directory / LOCK).read_text() == "process 7 on node\n"
        other.stdin.close()
    check_run_directory(config)


def test_a_refused_change_says_what_to_do_instead(config: Config, directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(to_yaml(config))
    other = replace(resumed(config), learner=replace(config.learner, learning_rate=0.5))
    with pytest.raises(ConfigError) as caught:
        check_run_directory(other)
    said = f"run.dir={directory} belongs to a run with learner.learning_rate=1e-05, not 0.5, and a resumed run may not "
    assert str(caught.value) == f"{said}change that: choose another run.dir, or the settings of that run"
    last = save(directory, 20)
    with pytest.raises(ConfigError) as caught:
        check_run_directory(other)
    instead = f"leave it, or start a new run from this one's student: run.dir=ANOTHER student.model={last}"
    assert str(caught.value) == f"{said}change that: {instead}"
    # What it says composes, and starts from the right weights.
    first = replace(
        other, student=replace(config.student, init="fresh"), off_policy=replace(config.off_policy, steps=5)
    )
    (directory / "config.yaml").write_text(to_yaml(replace(first, learner=config.learner)))
    with pytest.raises(ConfigError, match=f"{last} student.init=checkpoint off_policy.steps=0$"):
        check_run_directory(first)
