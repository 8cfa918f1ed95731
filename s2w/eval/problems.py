"""What a checkpoint is asked: generated tasks, or problems and answers from a file, each in every mode."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase

from s2w.config.schema import EvalConfig
from s2w.data.columns import read_answer, read_task
from s2w.data.files import Row, read_rows
from s2w.data.questions import Question, as_prompts, generated_question, read_row, with_system_prompt
from s2w.data.tasks import check_task, derive_seed, generate
from s2w.data.verifiers import VERIFIERS, check_verifier, verifier_of
from s2w.errors import ConfigError
from s2w.models.checkpoint import hub_answers
from s2w.records import Mode, Prompt

HUB_FILE = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<file>.+)")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_problems(config: EvalConfig) -> list[Question]:
    """The problems of ``eval.tasks`` or ``eval.path``.

    Raises:
        ConfigError: none or both are set, there is no such task or file, or a column is missing.
    """
    try:
        check_verifier(config.verifier)
    except ConfigError as error:
        raise ConfigError(f"eval.verifier: {error}") from error
    if bool(config.tasks) == bool(config.path):
        raise ConfigError(f"set one of eval.tasks and eval.path{', not both' if config.path else ''}")
    if config.path:
        return _file_problems(config, config.path)
    if unused := config.task_options.keys() - set(config.tasks):
        raise ConfigError(f"eval.task_options names {min(unused)!r}, which is not in eval.tasks")
    problems = []
    for name in dict.fromkeys(config.tasks):
        check_task(name)
        options = config.task_options.get(name) or {}
        _, entries = generate(name, 0, config.problems, config.seed, options)
        problems += [generated_question(name, "heldout", i, entry, options) for i, entry in enumerate(entries)]
    return problems


def make_prompts(
    problems: Sequence[Question], mode: Mode, tokenizer: PreTrainedTokenizerBase, config: EvalConfig
) -> list[Prompt]:
    """Every problem as a prompt in ``mode``.

    Raises:
        ConfigError: the chat template cannot ask for the mode, or a prompt is longer than eval.max_prompt_tokens.
    """
    asked = [(with_system_prompt(problem, config.system_prompt), mode) for problem in problems]
    prompts = as_prompts(asked, tokenizer, ("eval", config.seed), {})
    for prompt in prompts:
        if len(prompt.token_ids) > config.max_prompt_tokens:
            raise ConfigError(
                f"problem {prompt.uid!r} has {len(prompt.token_ids)} tokens, more than eval.max_prompt_tokens="
                f"{config.max_prompt_tokens}"
            )
    return prompts


def _file_problems(config: EvalConfig, location: str) -> list[Question]:
    if "{question}" not in config.template:
        raise ConfigError("eval.template must contain {question}")
    path = _fetch(location)
    problems = []
    for i, (place, row) in enumerate(read_rows(path)):
        where = place.replace(repr(str(path)), repr(location))  # Not the hub's cache.
        read, _ = read_row(where, _standard(where, row, config), verifier=config.verifier)
        *before, last = read.messages
        text = last["content"]
        if config.choice_columns:
            wrong = [str(row[column]) for column in config.choice_columns]
            choices, letter = _shuffled(str(read.answer), wrong, derive_seed("choices", config.seed, i))
            text = f"{text.strip()}\n\n{choices}"
            read = replace(read, task="exact_match", answer=letter, metadata={})
        asked = {"role": last["role"], "content": config.template.replace("{question}", text)}
        metadata = {"row": row} if "row" in read.metadata else read.metadata
        uid = f"{path.stem}/{i}"
        problems.append(replace(read, uid=uid, messages=(*before, asked), metadata=metadata))
    return problems


def _standard(where: str, row: Row, config: EvalConfig) -> Row:
    """The row under the names that the columns of training files have.

    Raises:
        ConfigError: a column that a setting names, or that the row's verifier needs, is missing or empty.
    """
    own = read_task(where, row, config.task_column) if config.task_column else None
    columns = {"eval.prompt_column": config.prompt_column} if config.prompt_column else {}
    # Without an answer the rule leaves a row unchecked, or to a verifier that compares with one.
    if config.choice_columns or verifier_of(own, None, config.verifier) in ("", *VERIFIERS):
        if not config.answer_column:
            raise ConfigError(
                "eval.answer_column is empty: only a verifier of your own (eval.verifier) needs no answer"
            )
        columns["eval.answer_column"] = config.answer_column
    columns |= {f"eval.choice_columns[{i}]": name for i, name in enumerate(config.choice_columns)}
    for setting, column in columns.items():
        if row.get(column) is None:
            there = ", ".join(map(str, row))
            raise ConfigError(f"{where}, has no {column!r} ({setting}); its columns are: {there}")
        if not str(row[column]).strip():
            raise ConfigError(f"{where}: its {column!r} ({setting}) is empty")
    if config.prompt_column:
        asked = {"prompt": row[config.prompt_column]}
    else:
        asked = {name: row[name] for name in ("messages", "prompt") if name in row}
        if not asked:
            there = ", ".join(map(str, row))
            raise ConfigError(
                f"{where}, has neither `messages` nor `prompt`: name another column in eval.prompt_column; its columns "
                f"are: {there}"
            )
    answer = read_answer(where, row, config.answer_column) if config.answer_column else None
    return {**asked, "answer": answer, "task": own, "metadata": row.get("metadata")}


def _shuffled(right: str, wrong: list[str], seed: int) -> tuple[str, str]:
    """Lettered choices, one per line, and the letter of the right one."""
    order = list(range(len(wrong) + 1))
    random.Random(seed).shuffle(order)
    choices = [right, *wrong]
    lines = [f"{LETTERS[place]}) {choices[which].strip()}" for place, which in enumerate(order)]
    return "\n".join(lines), LETTERS[order.index(0)]


def _fetch(location: str) -> Path:
    """The file on this machine; one on the hub is fetched into the hub cache."""
    if not location.startswith("hf://"):
        return Path(location).expanduser()
    match = HUB_FILE.fullmatch(location)
    if match is None:
        raise ConfigError(f"eval.path={location}: write hf://datasets/OWNER/NAME/FILE or ...NAME@REVISION/FILE")
    try:
        file = hf_hub_download(
            match["repo"],
            match["file"],
            repo_type="dataset",
            revision=match["revision"],
            local_files_only=not hub_answers(),
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, LocalEntryNotFoundError):
            reason = "the hub cannot be reached and the local cache does not hold it"
        else:
            reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"cannot get {location} ({reason}): eval.path may also name a file on this machine"
        ) from error
    return Path(file)
