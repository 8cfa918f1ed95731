"""Checkpoints of the learner: a Hugging Face model that any library can load, and the state to continue from.

::

    checkpoints/
      step_000010/
        README.md      the model card
        config.json, generation_config.json, model.safetensors (or shards and their index), tokenizer files
        optimizer/     DeepSpeed's files of every rank (weights, float32 master copy, moments) and RNG states
        state.json     step, shape of the learner group, and what the caller gave
      latest -> step_000010

A checkpoint is written under a temporary name and renamed at the end, so a directory called ``step_*`` is complete.
On several nodes the directory must be on a file system that all of them share.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from s2w.models.checkpoint import TEXT_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATE_FILE = "state.json"
OPTIMIZER_DIR = "optimizer"
NO_TEXTS: Mapping[str, str] = MappingProxyType({})

_OWN_FILES = {"config.json", STATE_FILE}
_STEP_DIR = re.compile(r"step_\d{6,}")


def step_dir(root: Path, step: int) -> Path:
    """Directory of the checkpoint after ``step`` optimizer steps."""
    return root / f"step_{step:06d}"


def begin(root: Path, step: int) -> Path:
    """Makes the temporary directory that :func:`commit` turns into the checkpoint of ``step``."""
    for rest in [*root.glob("step_*.partial"), *root.glob("step_*.deleted")]:  # Left by a killed run.
        shutil.rmtree(rest)
    directory = root / f"{step_dir(root, step).name}.partial"
    directory.mkdir(parents=True)
    return directory


def commit(partial: Path, state: dict[str, Any], keep: int, texts: Mapping[str, str] = NO_TEXTS) -> Path:
    """Writes ``state.json``, gives the checkpoint its name, points ``latest`` to it, deletes all but the last ``keep``.

    Args:
        partial: what :func:`begin` returned, with every rank's files in it.
        state: JSON values.
        keep: checkpoints to keep, at least 1.
        texts: further files by name; one that is there already is replaced.

    Returns:
        The checkpoint's directory.
    """
    root = partial.parent
    final = root / partial.name.removesuffix(".partial")
    for name, text in texts.items():
        (partial / name).write_text(text, encoding="utf-8")
    (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
    if final.exists():
        _delete(final)
    partial.rename(final)

    link = root / "latest.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(root / "latest")

    complete = sorted(path for path in root.iterdir() if _STEP_DIR.fullmatch(path.name))
    for path in complete[: -max(1, keep)]:
        if path != final:
            _delete(path)
    return final


def _delete(directory: Path) -> None:
    """Renames the checkpoint first: a half-deleted one must not look like one."""
    nameless = directory.with_name(f"{directory.name}.deleted")
    directory.rename(nameless)
    shutil.rmtree(nameless)


def latest(root: Path) -> Path | None:
    """The last complete checkpoint under ``root``, or None."""
    link = root / "latest"
    return root / os.readlink(link) if link.is_symlink() else None


def read_state(directory: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        FileNotFoundError: ``directory`` is not a complete checkpoint.
    """
    return json.loads((directory / STATE_FILE).read_text())


def write_texts(directory: Path, model: PreTrainedModel, source: Path) -> None:
    """Writes the configuration of ``model``; copies generation configuration and tokenizer from ``source``.

    These are the files of the checkpoint that the student started from, byte for byte.
    """
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    for pattern in TEXT_FILES:
        for path in source.glob(pattern):
            if path.name not in _OWN_FILES and not path.name.endswith(".index.json"):
                shutil.copyfile(path, directory / path.name)
