"""Whether an answer is right: the scorer of the prompt's task, by name.

A task is a reasoning-gym name, or one of :data:`VERIFIERS`, which need nothing but a reference answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from s2w.data import tasks
from s2w.errors import ConfigError
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


def check_verifier(task: str) -> None:
    """Raises ConfigError, naming the nearest, if no verifier and no reasoning-gym task has that name."""
    if task not in VERIFIERS:
        tasks.check_task(task)


def verify(prompt: Prompt, answer_text: str) -> float:
    """Score in [0, 1] of a response's answer part, by the verifier that ``prompt.task`` names.

    Args:
        prompt: for a reasoning-gym task, ``metadata`` holds the ``entry`` and the task's ``options``.
        answer_text: the response without its thinking (:func:`s2w.models.modes.split_thinking`).

    Raises:
        ConfigError: the prompt has no task, or its verifier has no reference answer to compare with.
    """
    if not prompt.task:
        raise ConfigError(f"Prompt {prompt.uid!r} cannot be verified: it has no task")
    if verifier := VERIFIERS.get(prompt.task):
        if prompt.answer is None:
            raise ConfigError(f"Prompt {prompt.uid!r} cannot be verified: {prompt.task} needs its answer")
        return verifier(answer_text, prompt.answer)
    return tasks.score(
        prompt.task, extract_answer(answer_text), prompt.metadata["entry"], prompt.metadata.get("options")
    )


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
