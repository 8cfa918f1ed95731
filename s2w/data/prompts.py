"""Prompts of a run: read or generated, rendered in their mode, tokenised once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from s2w.config.schema import DataConfig
from s2w.data.files import read_rows
from s2w.data.heldout import draw, question_key
from s2w.data.questions import Question, as_prompts, generated_question, read_row, with_system_prompt
from s2w.data.tasks import generate
from s2w.errors import ConfigError, did_you_mean
from s2w.models.modes import supported_modes
from s2w.records import Mode, Prompt

logger = logging.getLogger(__name__)


class TooFewPromptsError(ConfigError):
    """A file has no prompts left to train on once the held-out ones are drawn."""


def build_prompts(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    modes: Sequence[Mode] = (),
    context_length: int | None = None,
    columns: Collection[str] = (),
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts.

    Args:
        tokenizer, seed, modes: as in :func:`render_questions`.
        context_length: longest sequence, in tokens, that both models take.
        columns: as in :func:`read_questions`.

    Raises:
        ConfigError: as in :func:`read_questions` and :func:`render_questions`; a prompt is too long.
    """
    train, heldout = render_questions(data, read_questions(data, seed, columns), tokenizer, seed, modes)
    check_lengths(data, [*train, *heldout], context_length)
    return train, heldout


def read_questions(data: DataConfig, seed: int, columns: Collection[str] = ()) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions, in no mode yet but those that name one.

    Args:
        seed: seed of generated tasks, and of which rows of a file are held out.
        columns: of a file's rows, whose texts the questions keep in their metadata.

    Raises:
        ConfigError: no or two sources, an unreadable row.
        TooFewPromptsError: nothing would be left to train on.
    """
    if bool(data.tasks) == bool(data.path):
        raise ConfigError(f"Set one of data.tasks and data.path{', not both' if data.path else ''}")
    return _file_questions(data, data.path, seed, columns) if data.path else _task_questions(data, seed)


def render_questions(
    data: DataConfig,
    splits: tuple[Sequence[Question], Sequence[Question]],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    modes: Sequence[Mode] = (),
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out questions as prompts, of any length.

    A prompt's mode is that of its file row, else the soft switch in its messages, else ``modes`` in turn, so that
    every task gets every mode in equal parts.

    Args:
        tokenizer: the student's; teacher and student share its vocabulary.
        seed: seed of each prompt's first sample.
        modes: modes of the run; empty means all that the chat template can ask for.

    Raises:
        ConfigError: a mode that the template lacks, or messages that it rejects.
    """
    chosen = tuple(modes) or supported_modes(tokenizer)
    of_task = _task_modes(data, {question.task for questions in splits for question in questions})
    kwargs = _plain(data.chat_template_kwargs)
    train, heldout = (
        as_prompts(_with_modes(questions, chosen, of_task), tokenizer, ("prompt", seed), kwargs) for questions in splits
    )
    return train, heldout


def _with_modes(
    questions: Sequence[Question], chosen: Sequence[Mode], of_task: dict[str, tuple[Mode, ...]]
) -> list[tuple[Question, Mode]]:
    """Each question with its mode: its own, else those of its task in turn."""
    turns: dict[str, int] = {}
    result: list[tuple[Question, Mode]] = []
    for question in questions:
        own = of_task.get(question.task, chosen)
        # If none of the modes asked for is the task's, its prompts keep to those that it has.
        allowed = [mode for mode in chosen if mode in own] or own
        mode = question.mode
        if mode is None:
            turn = turns.get(question.task, 0)
            turns[question.task] = turn + 1
            mode = allowed[turn % len(allowed)]
        result.append((question, mode))
    return result


def prompt_limit(data: DataConfig, context_length: int | None) -> tuple[int, str]:
    """Longest prompt that is taken, in tokens, and what sets that limit."""
    if context_length is not None and context_length - 1 < data.max_prompt_tokens:
        return context_length - 1, "the models' context, less one token of response"
    return data.max_prompt_tokens, "data.max_prompt_tokens"


def check_lengths(data: DataConfig, prompts: Sequence[Prompt], context_length: int | None) -> None:
    """Raises ConfigError if a prompt is longer than :func:`prompt_limit`; names the first one."""
    limit, name = prompt_limit(data, context_length)
    for prompt in prompts:
        if len(prompt.token_ids) > limit:
            raise ConfigError(f"Prompt {prompt.uid!r} has {len(prompt.token_ids)} tokens, more than {limit} ({name})")


def _task_modes(data: DataConfig, tasks: set[str]) -> dict[str, tuple[Mode, ...]]:
    """``data.task_modes``.

    Raises:
        ConfigError: it names a task that no prompt has, or something other than modes.
    """
    modes = {}
    for task, given in _plain(data.task_modes).items():
        if task not in tasks:
            raise ConfigError(f"data.task_modes names {task!r}, which no prompt has{did_you_mean(task, tasks)}")
        if not isinstance(given, list) or not given or any(mode not in get_args(Mode) for mode in given):
            raise ConfigError(f"data.task_modes.{task}={given}: write a list of {' and '.join(get_args(Mode))}")
        modes[task] = tuple(given)
    return modes


def _task_questions(data: DataConfig, seed: int) -> tuple[list[Question], list[Question]]:
    splits: dict[str, list[list[Question]]] = {"train": [], "heldout": []}
    names = list(data.tasks)
    all_options = _plain(data.task_options)
    if unused := all_options.keys() - set(names):
        raise ConfigError(f"data.task_options names {min(unused)!r}, which is not in data.tasks ({', '.join(names)})")
    for position, name in enumerate(names):
        if name in names[:position]:
            raise ConfigError(f"data.tasks names {name!r} twice")
        options = all_options.get(name) or {}
        train, heldout = generate(
            name,
            _share(data.train_prompts, position, names),
            _share(data.heldout_prompts, position, names),
            seed,
            options,
        )
        for split, entries in (("train", train), ("heldout", heldout)):
            questions = [generated_question(name, split, i, one, options) for i, one in enumerate(entries)]
            splits[split].append([with_system_prompt(one, data.system_prompt) for one in questions])
    return _interleave(splits["train"]), _interleave(splits["heldout"])


def _share(total: int, position: int, names: Sequence[str]) -> int:
    """Part of ``total`` for one of the tasks; the first ones take the remainder."""
    return total // len(names) + (position < total % len(names))


def _interleave(lists: list[list[Question]]) -> list[Question]:
    """a0 b0 c0 a1 b1 ...: any prefix of the result is mixed in equal parts."""
    longest = max(map(len, lists), default=0)
    return [questions[i] for i in range(longest) for questions in lists if i < len(questions)]


def _file_questions(
    data: DataConfig, location: str, seed: int, columns: Collection[str]
) -> tuple[list[Question], list[Question]]:
    path = Path(location).expanduser()
    rows = _read(path, data, columns)
    keys = [question_key(question.messages) for question in rows]
    if data.heldout_path is None:
        chosen, different = draw(keys, data.heldout_prompts, seed), len(set(keys))
        if len(chosen) == different:
            repeated = f" ({different} different ones)" if different < len(rows) else ""
            raise TooFewPromptsError(
                f"{str(path)!r} has {len(rows)} prompts{repeated}, too few to hold out {data.heldout_prompts} "
                "(data.heldout_prompts): write a smaller number, or a file of them as data.heldout_path"
            )
        numbered = list(enumerate(zip(rows, keys, strict=True)))
        train = [_named(path, "train", i, question) for i, (question, key) in numbered if key not in chosen]
        heldout = [_named(path, "heldout", i, question) for i, (question, key) in numbered if key in chosen]
        return train, heldout
    heldout_path, seen = Path(data.heldout_path).expanduser(), set(keys)
    others = list(enumerate(_read(heldout_path, data, columns)))
    distinct = [(i, question) for i, question in others if question_key(question.messages) not in seen]
    if len(distinct) < len(others):
        if not distinct:
            raise ConfigError(f"Every held-out prompt of {str(heldout_path)!r} is also a training prompt")
        logger.warning("Left out %d held-out prompts that are training prompts too.", len(others) - len(distinct))
    train = [_named(path, "train", i, question) for i, question in enumerate(rows)]
    return train, [_named(heldout_path, "heldout", i, question) for i, question in distinct]


def _read(file: Path, data: DataConfig, columns: Collection[str]) -> list[Question]:
    """The questions of a file's rows, without uids."""
    found = [read_row(where, row, columns, data.verifier)[0] for where, row in read_rows(file)]
    return [with_system_prompt(question, data.system_prompt) for question in found]


def _named(file: Path, split: str, row: int, question: Question) -> Question:
    """The question with its uid, which says where it is from: ``task/split/row``."""
    return replace(question, uid=f"{question.task or file.stem}/{split}/{row}")


def _plain(value: Any) -> dict[str, Any]:
    """A dict of plain Python values, whether it comes from OmegaConf or not."""
    if isinstance(value, DictConfig):
        value = OmegaConf.to_container(value, resolve=True)
    return dict(value)
