"""Ready responses from a file: rendered as prompts of their mode, tokenised once.

Shards that ``s2w generate`` wrote with the same vocabulary keep their response tokens: decoding and tokenising again
need not give them back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from s2w.config.schema import Config
from s2w.data.files import Row, rows
from s2w.data.prompts import check_not_empty
from s2w.data.tasks import derive_seed
from s2w.data.verifiers import VERIFIERS, check_verifier
from s2w.errors import ConfigError
from s2w.models.modes import (
    EMPTY_THINK_BLOCK,
    THINK_OPEN,
    opens_thinking,
    render,
    soft_switch,
    split_thinking,
    supported_modes,
)
from s2w.models.pair import ModelPair
from s2w.records import Mode, Prompt
from s2w.teacher_data.response import Response
from s2w.teacher_data.shards import VOCABULARY, provenance_of, response_files, vocabulary_hash

CHUNK = 1024
"""Texts tokenised at once."""
TOKENS = "response_token_ids"
FINISH_REASONS = ("stop", "length", "abort", "error")
"""vLLM's. Only ``stop`` is the end of a whole response."""

Messages = tuple[dict[str, str], ...]


def read_dataset(config: Config, models: ModelPair) -> list[Response]:
    """The responses in ``off_policy.path``, each a training example. Those without tokens of their own end with the
    teacher's first end-of-sequence token, unless their ``finish_reason`` is another than ``stop``.

    A row's mode is its column ``mode``, else the soft switch in its messages, else whether its response thinks.

    Raises:
        ConfigError: there is no such file, a row lacks a column or has a value that is not allowed.
    """
    assert config.off_policy.path is not None
    path = Path(config.off_policy.path).expanduser()
    tokenizer = models.student.tokenizer
    modes, opened = supported_modes(tokenizer), opens_thinking(tokenizer)
    vocabulary = vocabulary_hash(tokenizer)
    prompts: list[Prompt] = []
    texts: list[str] = []
    rendered: list[str] = []
    finish_reasons: list[str] = []
    own_tokens: list[np.ndarray | None] = []
    for where, row in _rows(path, vocabulary):
        messages, text = _conversation(where, row)
        if config.data.system_prompt is not None and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": config.data.system_prompt}, *messages)
        mode = _mode(where, row, messages, text, modes)
        task, answer = _task(where, row)
        metadata = _metadata(row, messages, answer) if task and task not in VERIFIERS else {}
        rendered.append(render(tokenizer, messages, mode, dict(config.data.chat_template_kwargs)))
        finish_reasons.append(_finish_reason(where, row))
        own_tokens.append(_own_tokens(where, row, models.vocabulary.vocab_size))
        texts.append(_without_prefix(text, mode, opened))
        uid = f"{path.stem}/{len(prompts)}"
        seed = derive_seed("prompt", config.run.seed, uid)
        prompts.append(Prompt(uid, messages, np.empty(0, np.int32), mode, seed, task, answer, metadata))
    if not prompts:
        raise ConfigError(f"{str(path)!r} holds no responses")
    if not models.teacher.eos_token_ids:
        raise ConfigError(f"{models.teacher.reference!r} has no end-of-sequence token to put after the responses")
    end = np.asarray(models.teacher.eos_token_ids[:1], np.int32)
    responses = [
        np.concatenate([ids, end]) if finish_reason == "stop" else ids
        for ids, finish_reason in zip(_encode(tokenizer, texts), finish_reasons, strict=True)
    ]
    return [
        Response(
            prompt=replace(prompt, token_ids=given),
            sample=0,
            token_ids=ids if own is None else own,
            text=text,
            finish_reason=finish_reason,
        )
        for prompt, given, ids, own, text, finish_reason in zip(
            prompts, _encode(tokenizer, rendered), responses, own_tokens, texts, finish_reasons, strict=True
        )
    ]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """int32 token ids; the texts spell out their special tokens."""
    encoded: list[np.ndarray] = []
    for start in range(0, len(texts), CHUNK):
        batch = tokenizer(list(texts[start : start + CHUNK]), add_special_tokens=False)["input_ids"]
        encoded += [np.asarray(ids, np.int32) for ids in batch]
    return encoded


def _rows(path: Path, vocabulary: str) -> Iterator[tuple[str, Row]]:
    """Rows of a file or of all Parquet files of a directory, each with words that say where it stands.

    Token ids of another vocabulary than ``vocabulary`` are left out.
    """
    for file in response_files(path):
        same = file.suffix == ".parquet" and provenance_of(file).get(VOCABULARY) == vocabulary
        for number, row in enumerate(rows(file)):
            if not same:
                row.pop(TOKENS, None)
            yield f"{str(file)!r}, row {number}", row


def _conversation(where: str, row: Row) -> tuple[Messages, str]:
    """The messages of the prompt, and the response."""
    there = ", ".join(map(str, row)) or "none"
    if row.get("messages") is not None:
        messages = _messages(where, row["messages"])
        if messages[-1]["role"] != "assistant" or len(messages) == 1:
            raise ConfigError(f"{where}: the last of its messages must be the assistant's, after a prompt")
        check_not_empty(where, messages[:-1])
        return messages[:-1], messages[-1]["content"]
    missing = [name for name in ("prompt", "response") if row.get(name) is None]
    if missing:
        raise ConfigError(
            f"{where} has no `{'` and no `'.join(missing)}`: a response is a row with `messages`, or with `prompt` and "
            f"`response`; its columns are: {there}"
        )
    if not isinstance(row["response"], str):
        raise ConfigError(f"{where}: `response` is a string, not {row['response']!r}")
    given = row["prompt"]
    messages = _messages(where, [{"role": "user", "content": given}] if isinstance(given, str) else given)
    check_not_empty(where, messages)
    return messages, row["response"]


def _messages(where: str, given: Any) -> Messages:
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where}: messages are a list of objects with `role` and `content`")
    for message in given:
        if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise ConfigError(f"{where}: a message has a `role` and a `content`, both strings, not {message!r}")
    return tuple({"role": message["role"], "content": message["content"]} for message in given)


def _mode(where: str, row: Row, messages: Messages, text: str, modes: tuple[Mode, ...]) -> Mode:
    mode = row.get("mode")
    if mode is not None and mode not in get_args(Mode):
        raise ConfigError(f"{where} has mode {mode!r}; a mode is {' or '.join(get_args(Mode))}")
    if mode is None:
        mode = soft_switch(messages)
    if mode is not None:
        return mode
    mode = "think" if split_thinking(text, "think").thought else "no_think"
    return mode if mode in modes else modes[0]


def _finish_reason(where: str, row: Row) -> str:
    reason = row.get("finish_reason") or "stop"
    if reason not in FINISH_REASONS:
        raise ConfigError(f"{where} has finish_reason {reason!r}: write one of {', '.join(FINISH_REASONS)}")
    return reason


def _own_tokens(where: str, row: Row, vocab_size: int) -> np.ndarray | None:
    """int32 [n], where a shard of this vocabulary has them."""
    if row.get(TOKENS) is None:
        return None
    ids = np.asarray(row[TOKENS], np.int32)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ConfigError(
            f"{where} has {TOKENS} from {ids.min()} to {ids.max()}, and the vocabulary ends at {vocab_size - 1}: "
            "generate the responses anew"
        )
    return ids


def _task(where: str, row: Row) -> tuple[str, str | None]:
    answer = row.get("answer")
    task = row.get("task") or ("exact_match" if answer is not None else "")
    if task:
        try:
            check_verifier(task)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    return task, None if answer is None else str(answer)


def _metadata(row: Row, messages: Messages, answer: str | None) -> dict[str, Any]:
    """What a reasoning-gym scorer needs; a generated shard has all of it, other files the entry's metadata."""
    given = row.get("metadata") or {}
    if isinstance(given, str):
        given = json.loads(given)
    if "entry" in given:
        return given
    return {"entry": {"question": messages[-1]["content"], "answer": answer, "metadata": given}}


def _without_prefix(text: str, mode: Mode, opened: bool) -> str:
    """The response as it follows a rendered prompt, which may already hold the start of the think block."""
    if mode == "no_think":
        return text.removeprefix(EMPTY_THINK_BLOCK)
    if opened and text.lstrip().startswith(THINK_OPEN):
        return text.lstrip().removeprefix(THINK_OPEN).removeprefix("\n")
    return text
