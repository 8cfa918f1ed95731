"""Questions, and how a row of a file becomes one: the one reader of prompts, problems and existing responses.

A row has the messages of a chat (``messages``, or ``prompt``: the text of one user message), and optionally ``mode``,
``task``, ``answer``, ``metadata`` and ``response``. A final assistant message is a response too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from s2w.data.files import Row
from s2w.data.tasks import derive_seed
from s2w.data.verifiers import VERIFIERS, check_verifier, is_custom
from s2w.errors import ConfigError
from s2w.models.modes import render, soft_switch
from s2w.records import Mode, Prompt

ROLES = ("system", "user", "assistant", "tool")
CHUNK = 1024
"""Texts tokenised at once."""

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, with what is needed to check answers to it."""

    uid: str
    messages: Messages
    task: str = ""
    """Task whose verifier checks answers; empty where there is none."""
    answer: str | None = None
    """None where the task's verifier needs none."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the verifier needs besides the answer, and the texts that a teacher's context asks for."""
    mode: Mode | None = None
    """None: in any mode."""


def generated_question(name: str, split: str, index: int, entry: dict[str, Any], options: dict[str, Any]) -> Question:
    """A question that a procedural task has generated."""
    return Question(
        uid=f"{name}/{split}/{index}",
        messages=({"role": "user", "content": entry["question"]},),
        task=name,
        answer=entry["answer"],
        metadata={"entry": entry, "options": options},
    )


def read_row(where: str, row: Row, columns: Collection[str] = ()) -> tuple[Question, str | None]:
    """The question of a row, without uid, and its response if it has one.

    Args:
        where: file and row, for the error message.
        columns: those whose texts are kept in the question's metadata.

    Raises:
        ConfigError: a column is missing or has a value that is not allowed.
    """
    given = row.get("messages") if row.get("messages") is not None else row.get("prompt")
    if given is None:
        there = ", ".join(map(str, row)) or "none"
        raise ConfigError(f"{where} has neither `messages` nor `prompt`; its columns are: {there}")
    messages = read_messages(where, given)
    response = row.get("response")
    if response is not None and not isinstance(response, str):
        raise ConfigError(f"{where}: `response` is a string, not {response!r}")
    if messages[-1]["role"] == "assistant":
        if response is not None:
            raise ConfigError(f"{where} has a `response` and ends with an assistant message: remove one of them")
        *before, last = messages
        messages, response = tuple(before), last["content"]
    check_prompt(where, messages)
    task, answer = _task(where, row)
    mode, switch = row.get("mode"), soft_switch(messages)
    if mode is not None and mode not in get_args(Mode):
        raise ConfigError(f"{where} has mode {mode!r}; a mode is {' or '.join(get_args(Mode))}")
    if mode is not None and switch is not None and mode != switch:
        raise ConfigError(f"{where} has mode {mode!r}, but its messages say /{switch}")
    texts = {name: row[name] for name in columns if isinstance(row.get(name), str)}
    metadata = {**texts, **_metadata(row, task, messages, answer)}
    return Question("", messages, task, answer, metadata, mode or switch), response


def read_messages(where: str, given: Any) -> Messages:
    """Chat messages: those given, or one user message with the given text.

    Raises:
        ConfigError: they are not messages.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where}: a prompt is a string or a list of messages with `role` and `content`")
    for message in given:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise ConfigError(
                f"{where}: a message has a role ({', '.join(ROLES)}) and a content string, not {message!r}"
            )
    return tuple({"role": message["role"], "content": message["content"]} for message in given)


def check_prompt(where: str, messages: Messages) -> None:
    """Raises ConfigError if the messages do not end with something to answer."""
    if not any(message["role"] == "user" for message in messages) or messages[-1]["role"] not in ("user", "tool"):
        last = f", not the {messages[-1]['role']}'s" if messages else ""
        raise ConfigError(f"{where}: the last message of a prompt is the user's{last}")
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        raise ConfigError(f"{where}: the prompt is empty")


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


def _task(where: str, row: Row) -> tuple[str, str | None]:
    """Task and answer; an answer without a task is compared as it stands."""
    answer = row.get("answer")
    task = row.get("task") or ("exact_match" if answer is not None else "")
    if task:
        try:
            check_verifier(task)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    return task, None if answer is None else str(answer)


def _metadata(row: Row, task: str, messages: Messages, answer: str | None) -> dict[str, Any]:
    """What the task's verifier needs: a user's own function the whole row, a reasoning-gym scorer its entry."""
    if not task or task in VERIFIERS:
        return {}
    given = row.get("metadata") or {}
    if isinstance(given, str):
        given = json.loads(given)
    if isinstance(given, dict) and ("entry" in given or "row" in given):
        return given  # A shard of generated responses has it from the prompt's own row.
    if is_custom(task):
        return {"row": dict(row)}
    question = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    return {"entry": {"question": question, "answer": answer, "metadata": given}}
