"""A run's directory: it belongs to one configuration, one process writes it, and only a run that computed something
leaves one."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf

from s2w.actors.failures import reported
from s2w.config.bounds import resumable
from s2w.config.compose import STORED, from_yaml, to_yaml
from s2w.config.schema import Config
from s2w.errors import ConfigError
from s2w.learner import checkpoint
from s2w.observe.recorder import DEFINITIONS, SEGMENTS, TEACHER
from s2w.teacher_data.shards import SHARDS

CHECKPOINTS = Path("checkpoints")
"""Checkpoints of the on-policy phase, in the run directory."""
OFF_POLICY = Path("off_policy")
"""Files of the off-policy phase, in the run directory."""
OFF_POLICY_CHECKPOINTS = OFF_POLICY / "checkpoints"
LOG = "error.log"
"""Tracebacks of the errors that ended the run."""
LOCK = ".lock"
"""Locked by the process that writes the directory; says which one it is."""
LINES = ("metrics.jsonl", "heldout.jsonl", "heldout_responses.jsonl", "samples.jsonl", "timeline.jsonl")
"""Files with what a run has computed, a line each."""
ENTRIES = (
    STORED, f"{STORED}.partial", DEFINITIONS, SEGMENTS, *LINES, "events.jsonl", TEACHER, "summary.json", LOG,
    "tensorboard", "wandb", "student", ".student.*", OFF_POLICY.name, CHECKPOINTS.name, LOCK,
)  # fmt: skip
"""All that a run writes into its directory, as patterns. Nothing else in it is ever deleted: it may be the user's."""


def check_run_directory(config: Config) -> None:
    """Checks that the run directory can be written, and belongs to this configuration or to no run yet.

    Raises:
        ConfigError: it cannot, another process writes it, or it holds another run, or this one without run.resume.
    """
    directory = Path(config.run.dir)
    check_writable("run.dir", directory)
    if (lock := directory / LOCK).exists():
        with lock.open("r+") as file:
            _lock(file, directory)
        if not has_results(directory):
            return  # Of a start that was killed.
    stored = directory / STORED
    if not stored.exists():
        if there := [path.name for pattern in ENTRIES for path in directory.glob(pattern)]:
            raise ConfigError(
                f"run.dir={directory} contains no run but {there[0]!r}, which a run would overwrite: choose another one"
            )
        return
    before, may_change = _plain(from_yaml(Config, stored)), set(resumable(Config))
    for name, old, new in _differences(before, _plain(config)):
        if name not in may_change:
            raise ConfigError(
                f"run.dir={directory} belongs to a run with {name}={old}, not {new}, and a resumed run may not change "
                f"that: {_instead(config, directory)}"
            )
    if not config.run.resume:
        raise ConfigError(
            f"run.dir={directory} already holds this run: add run.resume=true to continue it, or choose another run.dir"
        )


def check_writable(setting: str, directory: Path) -> None:
    """Checks that a directory exists and can be written, or can be created.

    Raises:
        ConfigError: it is a file or below one, or cannot be written.
    """
    nearest = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{setting}={directory}: {nearest} is a file, not a directory: choose another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{setting}={directory}: {nearest} is not writable: choose another one")


@contextmanager
def opened(config: Config, command: str) -> Iterator[Path]:
    """The run directory with the resolved settings in it, created if missing, for this process alone to write.

    If nothing was computed at the end, what the run wrote is deleted again, and the directories that were created for
    it; the traceback of an error is then in a file in the directory for temporary files, else in ``error.log``.

    Args:
        command: of ``s2w``, for how to continue.

    Raises:
        RunError: in place of what ended the run, see :func:`s2w.actors.failures.reported`.
        ConfigError: another process writes it; or as the run raised it.
        PreflightError: as the run raised it.
    """
    directory = Path(config.run.dir).resolve()
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    lock = (directory / LOCK).open("a+")
    try:
        _lock(lock, directory)
        if lock.tell() and not has_results(directory):
            _clear(directory, {LOCK})  # Of a start that was killed.
        kept = {path.name for path in directory.iterdir()} - {LOCK}
        lock.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=lock, flush=True)
        try:
            with reported(lambda: _log(directory), lambda: saved(directory, command)):
                partial = directory / f"{STORED}.partial"
                partial.write_text(to_yaml(config))
                partial.replace(directory / STORED)
                yield directory
        finally:
            if not has_results(directory):
                _clear(directory, kept)
                for path in missing:
                    with suppress(OSError):  # Something else is in it.
                        path.rmdir()
    finally:
        lock.close()


def has_results(directory: Path) -> bool:
    """Whether a run has computed anything: a step, a held-out evaluation, or responses of the teacher's."""
    lines = (*LINES, OFF_POLICY / "heldout.jsonl", Path(TEACHER) / "heldout.jsonl")
    return (
        any((directory / name).is_file() and (directory / name).stat().st_size for name in lines)
        or any((directory / OFF_POLICY).glob(SHARDS))
        or any(checkpoint.latest(directory / path) for path in (CHECKPOINTS, OFF_POLICY_CHECKPOINTS))
    )


def newest_checkpoint(directory: Path) -> tuple[str, Path] | None:
    """The last checkpoint of a run, after its phase, ``on_policy`` or ``off_policy``; None if there is none."""
    for path, phase in ((CHECKPOINTS, "on_policy"), (OFF_POLICY_CHECKPOINTS, "off_policy")):
        if last := checkpoint.latest(directory / path):
            return phase, last
    return None


def trained_model(reference: str) -> str:
    """The newest checkpoint where a model is given as a run directory; any other reference as it is.

    Raises:
        ConfigError: the run has no checkpoint yet.
    """
    path = Path(reference).expanduser()
    if (path / "config.json").is_file() or not (path / STORED).is_file():
        return reference
    if (newest := newest_checkpoint(path)) is None:
        raise ConfigError(f"the run {reference!r} has no checkpoint yet: loop.checkpoint_every says when it saves one")
    return str(newest[1])


def saved(directory: Path, command: str) -> str:
    """What a run has on disk and how to continue it, as the end of a sentence.

    Args:
        command: of ``s2w``.
    """
    if not has_results(directory):
        return "nothing was computed yet: the same command starts it again"
    if newest := newest_checkpoint(directory):
        phase, last = newest
        name = "off-policy " if phase == "off_policy" else ""
        what = f"{name}step {checkpoint.read_state(last)['step']} is saved in {last}"
    else:
        shards = len(list((directory / OFF_POLICY).glob(SHARDS)))
        what = f"{shards} shards of responses are in {directory / OFF_POLICY}" if shards else "no step is saved yet"
    return f"{what}; to continue: s2w {command} run.resume=true run.dir={directory}"


def _log(directory: Path) -> Path:
    """Where a traceback goes."""
    return directory / LOG if has_results(directory) else Path(tempfile.gettempdir(), f"s2w-{os.getpid()}.error.log")


def _lock(file: TextIO, directory: Path) -> None:
    """Locks ``file`` until it is closed, where the file system can.

    Raises:
        ConfigError: another process has locked it.
    """
    try:
        # Unlike flock's, these locks are not inherited by child processes, and NFS has them.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise ConfigError(
            f"run.dir={directory} is being written by {file.read().strip() or 'another run'}: wait until it has ended, "
            "or choose another run.dir"
        ) from error
    except OSError:
        return  # A file system without locks.


def _clear(directory: Path, kept: set[str]) -> None:
    """Deletes what a run wrote, except the entries named ``kept``; last its lock, the sign that they are a run's."""
    for path in [path for pattern in ENTRIES for path in directory.glob(pattern) if path.name not in kept]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _instead(config: Config, directory: Path) -> str:
    """What to do where a resumed run may not change a setting, as the end of a sentence."""
    if newest := newest_checkpoint(directory):
        phase, last = newest
        settings = ["run.dir=ANOTHER", f"student.model={last}"]
        settings += ["student.init=checkpoint"] if config.student.init != "checkpoint" else []
        settings += ["off_policy.steps=0"] if config.off_policy.steps and phase == "on_policy" else []
        return f"leave it, or start a new run from this one's student: {' '.join(settings)}"
    return "choose another run.dir, or the settings of that run"


def _plain(config: Config) -> Any:
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(name), now.get(name), f"{prefix}{name}.")
    elif before != now:
        yield prefix.removesuffix("."), before, now
