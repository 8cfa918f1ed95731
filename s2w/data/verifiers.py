"""Whether an answer is right: the scorer of the prompt's task, by name.

A task is one of :data:`VERIFIERS`, which need nothing but a reference answer, a reasoning-gym name, or a function from
outside of the package: its import path, ``package.module:function``, or the name of an entry point of the group
``s2w.verifiers``. Such a function is called with ``(response, answer, row)``: the text of the response without its
thinking, the reference answer or None, and the row of the file as a dict. It returns a number from 0 to 1; 1 is right.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from s2w.data import tasks
from s2w.errors import ConfigError, did_you_mean
from s2w.records import Prompt

ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
ANSWER_PHRASE = re.compile(r"\b(?:final answer|answer)(?: is)?\s*[:=]?\s*(?:\*\*)?\s*([^\n]+)", re.IGNORECASE)


def extract_answer(text: str) -> str:
    """The final answer in a response (its thinking already cut off).

    The last ``<answer>...</answer>``, else the last ``\\boxed{...}``, else what follows the last "answer is" or
    "answer:" on its line, else the whole text; stripped.
    """
    if tagged := ANSWER_TAG.findall(text):
        return tagged[-1].strip()
    if (boxed := _last_boxed(text)) is not None:
        return boxed.strip()
    if phrases := ANSWER_PHRASE.findall(text):
        return phrases[-1].strip().rstrip("*").removesuffix(".").strip()
    return text.strip()


def exact_match(answer: str, reference: str) -> float:
    """1 if the extracted answer is the reference, white space aside; else 0."""
    return float(" ".join(extract_answer(answer).split()) == " ".join(reference.split()))


def math_verify(answer: str, reference: str) -> float:
    """1 if math-verify holds answer and reference for the same expression, else 0."""
    import math_verify as library  # Only here: it brings sympy.

    # No timeouts: the library's need the main thread, and actors verify in others.
    gold = library.parse(reference if "$" in reference else f"${reference}$", parsing_timeout=None)
    given = library.parse(answer, parsing_timeout=None)
    return float(library.verify(gold, given, timeout_seconds=None))


VERIFIERS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "math_verify": math_verify}


GROUP = "s2w.verifiers"
"""Entry points of installed packages, each a verifier by name."""

CustomVerifier = Callable[[str, str | None, dict[str, Any]], float]


def is_custom(task: str) -> bool:
    """Whether a task names a function from outside of this package. Names of :data:`VERIFIERS` and reasoning-gym stay
    theirs, whatever entry points there are."""
    if task in VERIFIERS:
        return False
    return ":" in task or (task in _entry_points() and task not in tasks.task_names())


def check_verifier(task: str) -> None:
    """Refuses a task that has no verifier. A function of the user's is imported, and its signature compared.

    Raises:
        ConfigError: no task has that name (the nearest is named, and what there is), or as of :func:`custom_verifier`.
    """
    if is_custom(task):
        custom_verifier(task)
    elif task not in VERIFIERS and task not in (generated := tasks.task_names()):
        own = [*VERIFIERS, *sorted(_entry_points())]
        nearest = difflib.get_close_matches(task, [*own, *generated], n=1, cutoff=0.0)
        raise ConfigError(
            f"There is no verifier and no reasoning-gym task {task!r}; did you mean {nearest[0]!r}? A task is "
            f"{', '.join(own)}, the name of one of reasoning-gym's {len(generated)} tasks, or a function of your own "
            "as package.module:function"
        )


def prepare(task: str) -> None:
    """Imports what a task's verifier needs, which may take longer than an answer may.

    Raises:
        ConfigError: as of :func:`custom_verifier`.
    """
    if is_custom(task):
        custom_verifier(task)
    elif task in VERIFIERS:
        VERIFIERS[task]("1", "1")
    else:
        tasks.task_names()


@functools.cache
def custom_verifier(task: str) -> CustomVerifier:
    """The function that a task names; modules of the current directory can be imported too.

    Raises:
        ConfigError: it cannot be imported, is no function, or does not take ``(response, answer, row)``.
    """
    where = f"task {task!r}"
    if ":" in task:
        module, _, name = task.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
            raise ConfigError(f"{where}: write a function of your own as package.module:function")
    else:
        module, name = _entry_points()[task].module, _entry_points()[task].attr
        where += f" (entry point {module}:{name})"
    function = _imported(where, module, name)
    if not callable(function):
        raise ConfigError(f"{where}: {name} is no function but {function!r}")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return function  # Some functions written in C do not say what they take.
    try:
        signature.bind("", None, {})
    except TypeError as error:
        parameters = signature.replace(return_annotation=inspect.Signature.empty)
        raise ConfigError(
            f"{where}: a verifier is called with (response, answer, row), and {name}{parameters} does not take them: "
            f"{error}"
        ) from error
    return function


def verify(prompt: Prompt, answer_text: str) -> float:
    """Score in [0, 1] of a response's answer part, by the verifier that ``prompt.task`` names.

    Args:
        prompt: ``metadata`` holds, for a reasoning-gym task, the ``entry`` and the task's ``options``; for a function
            of the user's, the ``row`` that it is given.
        answer_text: the response without its thinking (:func:`s2w.models.modes.split_thinking`).

    Raises:
        ConfigError: the prompt has no task, its verifier has no reference answer to compare with, or a function of the
            user's fails or returns something else than a number from 0 to 1.
    """
    if not prompt.task:
        raise ConfigError(f"Prompt {prompt.uid!r} cannot be verified: it has no task")
    if verifier := VERIFIERS.get(prompt.task):
        if prompt.answer is None:
            raise ConfigError(f"Prompt {prompt.uid!r} cannot be verified: {prompt.task} needs its answer")
        return verifier(answer_text, prompt.answer)
    if is_custom(prompt.task):
        return _custom_score(prompt, answer_text)
    return tasks.score(
        prompt.task, extract_answer(answer_text), prompt.metadata["entry"], prompt.metadata.get("options")
    )


def _custom_score(prompt: Prompt, answer_text: str) -> float:
    verifier, where = custom_verifier(prompt.task), f"Prompt {prompt.uid!r}: its verifier {prompt.task}"
    try:
        value = verifier(answer_text, prompt.answer, prompt.metadata.get("row", {}))
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(f"{where} failed in {at.filename}, line {at.lineno}: {_said(error)}") from error
    try:
        score = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= 1:
        raise ConfigError(f"{where} returned {value!r}: a score is a number from 0 (wrong) to 1 (right)")
    return score


def _imported(where: str, module: str, name: str) -> Any:
    """What is called ``name`` in ``module``."""
    # As `python -m` has it; a console command and the verifier's process have not.
    if not {"", here := os.getcwd()} & set(sys.path):
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{where}: there is no module {error.name!r}, neither in {here} nor among what is installed"
            ) from error
        raise ConfigError(f"{where}: {module} cannot be imported: {_said(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{where}: {module} has no {name}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found


@functools.cache
def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _said(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end]
    return None
