"""Existing responses from a file: rendered as prompts of their mode, tokenised once.

Shards that ``s2w generate`` wrote with the same vocabulary keep their response tokens: decoding and tokenising again
need not restore them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from s2w.config.schema import Config
from s2w.data.columns import read_finish_reason
from s2w.data.files import Row, rows
from s2w.data.placeholders import context_columns
from s2w.data.questions import Question, as_prompts, encode, read_row, with_system_prompt
from s2w.errors import ConfigError
from s2w.models.modes import EMPTY_THINK_BLOCK, THINK_OPEN, opens_thinking, split_thinking, supported_modes
from s2w.models.pair import ModelPair
from s2w.records import Mode
from s2w.teacher_data.response import Response
from s2w.teacher_data.shards import VOCABULARY, provenance_of, response_files, vocabulary_hash

TOKENS = "response_token_ids"


@dataclass(frozen=True, slots=True)
class _Example:
    """One row: a question and its response."""

    question: Question
    mode: Mode
    text: str
    """The response as it follows the rendered prompt."""
    finish_reason: str
    token_ids: np.ndarray | None
    """int32 [n], where a shard of this vocabulary has them."""


def read_dataset(config: Config, models: ModelPair) -> list[Response]:
    """The responses in ``off_policy.path``, each a training example. Those without stored tokens end with the
    teacher's first end-of-sequence token, unless their ``finish_reason`` is other than ``stop``.

    A row's mode is its column ``mode``, else the soft switch in its messages, else whether its response thinks.

    Raises:
        ConfigError: there is no such file, a row lacks a column or has a value that is not allowed.
    """
    assert config.off_policy.path is not None
    path = Path(config.off_policy.path).expanduser()
    tokenizer = models.student.tokenizer
    examples = list(_examples(path, config, models))
    if not examples:
        raise ConfigError(f"{str(path)!r} contains no responses")
    if not models.teacher.eos_token_ids:
        raise ConfigError(f"{models.teacher.reference!r} has no end-of-sequence token to put after the responses")
    kwargs = dict(config.data.chat_template_kwargs)
    asked = [(example.question, example.mode) for example in examples]
    prompts = as_prompts(asked, tokenizer, ("prompt", config.run.seed), kwargs)
    texts = encode(tokenizer, [example.text for example in examples])
    return [
        Response(
            prompt=prompt,
            sample=0,
            token_ids=_response_ids(example, ids, models.teacher.eos_token_ids),
            text=example.text,
            finish_reason=example.finish_reason,
        )
        for prompt, example, ids in zip(prompts, examples, texts, strict=True)
    ]


def _examples(path: Path, config: Config, models: ModelPair) -> Iterator[_Example]:
    """The rows of a file, or of all Parquet files of a directory."""
    tokenizer = models.student.tokenizer
    modes, opened = supported_modes(tokenizer), opens_thinking(tokenizer)
    vocabulary, columns = vocabulary_hash(tokenizer), context_columns(config)
    number = 0
    for file in response_files(path):
        # Token ids of another vocabulary mean nothing.
        same = file.suffix == ".parquet" and provenance_of(file).get(VOCABULARY) == vocabulary
        for where, row in rows(file):
            question, text = read_row(where, row, columns, config.data.verifier)
            if text is None:
                there = ", ".join(map(str, row))
                raise ConfigError(
                    f"{where} has no response: write `response`, or end `messages` with the assistant's; its columns "
                    f"are: {there}"
                )
            mode = question.mode or _mode_of(text, modes)
            question = with_system_prompt(replace(question, uid=f"{path.stem}/{number}"), config.data.system_prompt)
            own = _own_tokens(where, row, models.vocabulary.vocab_size) if same else None
            yield _Example(question, mode, _without_prefix(text, mode, opened), read_finish_reason(where, row), own)
            number += 1


def _response_ids(example: _Example, encoded: np.ndarray, eos_token_ids: Sequence[int]) -> np.ndarray:
    """int32 [n]: its stored tokens, else those of its text, plus the end-of-sequence token if it is complete."""
    if example.token_ids is not None:
        return example.token_ids
    if example.finish_reason != "stop":
        return encoded
    return np.concatenate([encoded, np.asarray(eos_token_ids[:1], np.int32)])


def _mode_of(text: str, modes: Sequence[Mode]) -> Mode:
    """Mode of a response, by whether it thinks; a template's only mode if it has just one."""
    mode: Mode = "think" if split_thinking(text, "think").thought else "no_think"
    return mode if mode in modes else modes[0]


def _own_tokens(where: str, row: Row, vocab_size: int) -> np.ndarray | None:
    """int32 [n], where a shard of this vocabulary has them."""
    if row.get(TOKENS) is None:
        return None
    ids = np.asarray(row[TOKENS], np.int32)
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ConfigError(
            f"{where} has {TOKENS} from {ids.min()} to {ids.max()}, and the vocabulary ends at {vocab_size - 1}: "
            "regenerate the responses"
        )
    return ids


def _without_prefix(text: str, mode: Mode, opened: bool) -> str:
    """The response as it follows a rendered prompt, which may already contain the start of the think block."""
    if mode == "no_think":
        return text.removeprefix(EMPTY_THINK_BLOCK)
    if opened and text.lstrip().startswith(THINK_OPEN):
        return text.lstrip().removeprefix(THINK_OPEN).removeprefix("\n")
    return text
