"""Procedural tasks: questions by name and seed, and their scorers. reasoning-gym's, and the testbed's."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from s2w.errors import ConfigError

CHUNK = 256
"""Questions generated under one derived seed."""
MAX_REPEATS = 2_000
"""Questions in a row that add nothing new, after which a task counts as exhausted."""

Entry = dict[str, Any]
"""reasoning-gym's record: ``question`` (str), ``answer`` (str, or None if many are right), ``metadata`` (dict)."""


def task_names() -> tuple[str, ...]:
    """Names that :func:`generate` takes (``composite`` mixes others and is left out: ``data.tasks`` does that)."""
    return tuple(sorted(_registry().keys() - {"composite"}))


def check_task(name: str) -> None:
    """Raises ConfigError, naming the nearest task, if there is none of that name."""
    names = task_names()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise ConfigError(f"There is no reasoning-gym task {name!r}; did you mean {nearest[0]!r}?")


def generate(
    name: str, train: int, heldout: int, seed: int, options: Mapping[str, Any] | None = None
) -> tuple[list[Entry], list[Entry]]:
    """``train`` and ``heldout`` entries of a task; no question is in both.

    Held-out questions are all different and depend on ``seed`` and ``options`` alone, so runs that differ in their
    number of training prompts are measured on the same ones; training skips those, and may repeat its own.

    Raises:
        ConfigError: no such task, options that it does not take, or fewer different questions than asked for.
    """
    check_task(name)
    options = options or {}
    heldout_entries: dict[str, Entry] = {}
    repeats = 0
    for entry in _entries(name, "heldout", seed, options):
        if len(heldout_entries) == heldout:
            break
        repeats = repeats + 1 if entry["question"] in heldout_entries else 0
        if repeats > MAX_REPEATS:
            raise ConfigError(
                f"Task {name!r} has too few different questions with these options: {len(heldout_entries)} found for "
                f"{heldout} held-out prompts"
            )
        heldout_entries.setdefault(entry["question"], entry)
    train_entries: list[Entry] = []
    skipped = 0
    for entry in _entries(name, "train", seed, options):
        if len(train_entries) == train:
            break
        if entry["question"] in heldout_entries:
            skipped += 1
            if skipped > MAX_REPEATS + train:
                raise ConfigError(
                    f"Task {name!r} has too few different questions with these options: {heldout} held-out prompts "
                    "leave next to none for training"
                )
        else:
            train_entries.append(entry)
    return train_entries, list(heldout_entries.values())


def score(name: str, answer: str, entry: Entry, options: Mapping[str, Any] | None = None) -> float:
    """reasoning-gym's score of an answer, in [0, 1]; 1 is right, some tasks give partial credit.

    A scorer that fails on the answer's text (several evaluate it) scores it 0; one that never ends needs
    :class:`s2w.data.verifier_process.VerifierProcess`.
    """
    scorer = _scorer(name, json.dumps(dict(options or {}), sort_keys=True))
    try:
        return float(scorer.score_answer(answer, entry))
    except Exception:
        # A right answer must score; anything else here is an answer that the task's parser cannot read.
        if answer == entry["answer"]:
            raise
        return 0.0


def derive_seed(*parts: int | str) -> int:
    """A seed in 0 to 2**31 - 1 from integers and names, the same on every machine.

    reasoning-gym makes entry i of seed s from ``s + i``: neighbouring seeds share entries, hashed ones do not.
    """
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _registry() -> dict[str, Any]:
    """reasoning-gym's datasets by name, as (dataset class, config class)."""
    # Of a package that reasoning-gym imports, where Python compiles it for the first time.
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=".*cellpylib")
    from reasoning_gym.factory import DATASETS

    from s2w.testbed import dataset  # noqa: F401  (registers itself)

    return DATASETS


def _entries(name: str, split: str, seed: int, options: Mapping[str, Any]) -> Iterator[Entry]:
    if "split" in {field.name for field in dataclasses.fields(_registry()[name][1])}:
        options = {**options, "split": split}  # a task with splits of its own
    chunk = 0
    while True:
        dataset = _dataset(name, derive_seed(name, split, seed, chunk), CHUNK, options)
        yield from (dataset[i] for i in range(CHUNK))
        chunk += 1


@functools.lru_cache(maxsize=64)
def _scorer(name: str, options: str) -> Any:
    return _dataset(name, 0, 1, json.loads(options))


def _dataset(name: str, seed: int, size: int, options: Mapping[str, Any]) -> Any:
    _registry()
    import reasoning_gym

    if reserved := options.keys() & {"seed", "size"}:
        raise ConfigError(f"Options of task {name!r} may not set {min(reserved)}: s2w does")
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **options)
    except (TypeError, ValueError, AssertionError) as error:
        reason = str(error).removeprefix(f"{name}: ").rstrip(".")
        raise ConfigError(f"Task {name!r} does not take these options, {dict(options)}: {reason}") from error
