"""Whether an answer is right: verifiers by name, and which of them checks a question.

A verifier is one of :data:`VERIFIERS`, which need nothing but a reference answer, the scorer of a reasoning-gym task,
or a function from outside of the package: its import path, ``package.module:function``, or the name of an entry point
of the group ``s2w.verifiers``. Such a function is called with ``(response, answer, row)``: the text of the response
without its thinking, the reference answer or None, and the row of the file as a dict. It returns a number from 0 to 1;
1 is right.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from s2w.data import tasks
from s2w.errors import ConfigError, VerifierError, did_you_mean
from s2w.records import Prompt

ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
ANSWER_PHRASE = re.compile(r"\b(?:final answer|answer)(?: is)?\s*[:=]?\s*(?:\*\*)?\s*([^\n]+)", re.IGNORECASE)
TEXT_MACRO = re.compile(r"\\text(?:bf|rm)?\{([^{}]*)\}")
WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W\d_]+(?:[\s.,;:!?'’-]+[^\W\d_]+)*[.!?]?")
"""Letters and what stands between words, at least two letters together: nothing that is calculated with."""


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
    """1 if the extracted answer is the reference, else 0; white space, ``\\text{}`` and a final full stop aside."""
    return float(_plain(extract_answer(answer)) == _plain(reference))


def math_verify(answer: str, reference: str) -> float:
    """1 if the answer is the reference (:func:`exact_match`) or, by math-verify, the same expression; else 0.

    A reference of words alone is text: as expressions, ``no`` and ``on`` are the same product.
    """
    if exact_match(answer, reference):
        return 1.0
    if WORDS.fullmatch(reference.strip()):
        return 0.0
    import math_verify as library  # Only here: it brings sympy.

    # No timeouts: the library's need the main thread, and actors verify in others. It warns of that.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    gold = library.parse(reference if "$" in reference else f"${reference}$", parsing_timeout=None)
    tagged = ANSWER_TAG.findall(answer)
    given = library.parse(tagged[-1] if tagged else answer, parsing_timeout=None)
    return float(library.verify(gold, given, timeout_seconds=None))


VERIFIERS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "math_verify": math_verify}


GROUP = "s2w.verifiers"
"""Entry points of installed packages, each a verifier by name."""

CustomVerifier = Callable[[str, str | None, dict[str, Any]], float]


def verifier_of(own: str | None, answer: str | None, default: str | None) -> str:
    """Which verifier checks answers to a question, by one rule for prompts, ready responses and problems alike; empty
    if none does.

    A question's own verifier does (the row's ``task``). One that names none is checked by the default, if it has what
    that needs: the verifiers of :data:`VERIFIERS` compare with a reference answer, others can do without.

    Args:
        own: the verifier that the question names; None for none.
        answer: its reference answer; None for none.
        default: ``data.verifier`` or ``eval.verifier``; None leaves unnamed ones unchecked.
    """
    if own:
        return own
    if default is None or (default in VERIFIERS and answer is None):
        return ""
    return default


def is_custom(task: str) -> bool:
    """Whether a task names a function from outside of this package. Names of :data:`VERIFIERS` and reasoning-gym stay
    theirs, whatever entry points there are."""
    if task in VERIFIERS:
        return False
    return ":" in task or (task in _entry_points() and task not in tasks.task_names())


def check_verifier(task: str) -> None:
    """Refuses the name of a verifier that there is not. A function of the user's is imported, and its signature
    compared.

    Raises:
        ConfigError: there is none of that name (what there is, and the nearest, are named), or as of
            :func:`custom_verifier`.
    """
    if is_custom(task):
        custom_verifier(task)
    elif task not in VERIFIERS and task not in (generated := tasks.task_names()):
        own = [*VERIFIERS, *sorted(_entry_points())]
        nearest = difflib.get_close_matches(task, [*own, *generated], n=1)
        near = f"; did you mean {nearest[0]!r}? A" if nearest else ": a"
        raise ConfigError(
            f"There is no verifier and no reasoning-gym task {task!r}{near} verifier is {', '.join(own)}, one of "
            f"reasoning-gym's {len(generated)} tasks ({', '.join(generated[:3])} ... {generated[-1]}: docs/data.md has "
            "all), or a function of your own as package.module:function"
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
        ConfigError: the prompt has no verifier, or it has no reference answer to compare with.
        VerifierError: a function of the user's fails, or returns something else than a number from 0 to 1.
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
    verifier, where = custom_verifier(prompt.task), verifier_at(prompt)
    try:
        value = verifier(answer_text, prompt.answer, prompt.metadata.get("row", {}))
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise VerifierError(f"{where} failed in {at.filename}, line {at.lineno}: {_said(error)}") from error
    try:
        score = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= 1:
        raise VerifierError(f"{where} returned {value!r}: a score is a number from 0 (wrong) to 1 (right)")
    return score


def verifier_at(prompt: Prompt) -> str:
    """A prompt's verifier and the row that it checks, as the start of a message."""
    row = f"{prompt.place} (prompt {prompt.uid!r})" if prompt.place else f"Prompt {prompt.uid!r}"
    return f"{row}: its verifier {prompt.task}"


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


def _plain(text: str) -> str:
    return " ".join(TEXT_MACRO.sub(r"\1", text).split()).removesuffix(".")


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
