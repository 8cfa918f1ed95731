"""Questions, and how a row of a file becomes one: the one reader of prompts, problems and existing responses.

:mod:`s2w.data.columns` says what a row may hold, :func:`s2w.data.verifiers.verifier_of` what checks its answers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from s2w.config.schema import DEFAULT_VERIFIER
from s2w.data.columns import Messages, read_answer, read_messages, read_metadata, read_mode, read_task
from s2w.data.files import Row
from s2w.data.tasks import derive_seed
from s2w.data.verifiers import VERIFIERS, check_verifier, is_custom, verifier_of
from s2w.errors import ConfigError
from s2w.models.modes import render, soft_switch
from s2w.records import Mode, Prompt

CHUNK = 1024
"""Texts tokenised at once."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, with what is needed to check answers to it."""

    uid: str
    messages: Messages
    task: str = ""
    """The verifier that checks answers, see :func:`s2w.data.verifiers.verifier_of`; empty where none does."""
    answer: str | None = None
    """The reference answer; None where there is none."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the verifier needs besides the answer, and the texts that a teacher's context asks for."""
    mode: Mode | None = None
    """None: in any mode."""
    place: str = ""
    """File and row that it was read from; empty if it was generated."""


def generated_question(name: str, split: str, index: int, entry: dict[str, Any], options: dict[str, Any]) -> Question:
    """A question that a procedural task has generated."""
    return Question(
        uid=f"{name}/{split}/{index}",
        messages=({"role": "user", "content": entry["question"]},),
        task=name,
        answer=entry["answer"],
        metadata={"entry": entry, "options": options},
    )


def read_row(
    where: str, row: Row, columns: Collection[str] = (), verifier: str | None = DEFAULT_VERIFIER
) -> tuple[Question, str | None]:
    """The question of a row, without uid, and its response if it has one.

    Args:
        where: file and row.
        columns: those whose texts are kept in the question's metadata.
        verifier: of rows that do not name their own.

    Raises:
        ConfigError: a column is missing or has a value that is not allowed.
    """
    messages, response = read_messages(where, row)
    mode, switch = read_mode(where, row), soft_switch(messages)
    if mode is not None and switch is not None and mode != switch:
        raise ConfigError(f"{where} has mode {mode!r}, but its messages say /{switch}")
    answer, own = read_answer(where, row), read_task(where, row)
    task, needed = _verification(where, row, messages, answer, own, verifier)
    texts = {name: row[name] for name in columns if isinstance(row.get(name), str)}
    return Question("", messages, task, answer, {**texts, **needed}, mode or switch, where), response


def with_system_prompt(question: Question, system_prompt: str | None) -> Question:
    """The question preceded by ``system_prompt``; if it has a system message, that stays."""
    if system_prompt is None or question.messages[0]["role"] == "system":
        return question
    return replace(question, messages=({"role": "system", "content": system_prompt}, *question.messages))


def as_prompts(
    questions: Sequence[tuple[Question, Mode]],
    tokenizer: PreTrainedTokenizerBase,
    seed: Sequence[int | str],
    chat_template_kwargs: dict[str, Any],
) -> list[Prompt]:
    """Every question as a prompt in its mode: rendered and tokenised.

    Args:
        seed: what the seed of each prompt's first sample is derived from, besides the question's uid.

    Raises:
        ConfigError: the chat template cannot ask for a mode, or rejects the messages.
    """
    texts = [render(tokenizer, question.messages, mode, chat_template_kwargs) for question, mode in questions]
    return [
        Prompt(
            uid=question.uid,
            messages=question.messages,
            token_ids=ids,
            mode=mode,
            seed=derive_seed(*seed, question.uid),
            task=question.task,
            answer=question.answer,
            metadata=question.metadata,
            place=question.place,
        )
        for (question, mode), ids in zip(questions, encode(tokenizer, texts), strict=True)
    ]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 token ids; the texts spell out their special tokens, as a chat template writes them."""
    encoded: list[np.ndarray] = []
    for start in range(0, len(texts), CHUNK):
        batch = tokenizer(list(texts[start : start + CHUNK]), add_special_tokens=False)["input_ids"]
        encoded += [np.asarray(ids, np.int32) for ids in batch]
    return encoded


def _verification(
    where: str, row: Row, messages: Messages, answer: str | None, own: str | None, default: str | None
) -> tuple[str, dict[str, Any]]:
    """The verifier of a row's question, and what it needs besides the answer: a function of the user's the whole row,
    a reasoning-gym scorer its entry.

    Args:
        own: the verifier that the row names; None if it names none.
        default: of rows that name none.

    Raises:
        ConfigError: there is no such verifier, or it has no answer to compare with.
    """
    name = verifier_of(own, answer, default)
    if not name:
        return "", {}
    try:
        check_verifier(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if name in VERIFIERS:
        if answer is None:
            raise ConfigError(f"{where}: task {name!r} compares with an `answer`, and the row has none")
        return name, {}
    if is_custom(name):
        # A shard of generated responses has it from the prompt's own row.
        given = read_metadata(where, row) if {"uid", "sample"} <= row.keys() else {}
        return name, given if isinstance(given.get("row"), dict) else {"row": dict(row)}
    given = read_metadata(where, row)
    if isinstance(given.get("entry"), dict):
        return name, given  # Of a shard, too.
    question = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    return name, {"entry": {"question": question, "answer": answer, "metadata": given}}
