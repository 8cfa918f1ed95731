"""What a checkpoint is asked: generated tasks, or problems and answers from a file, each in every mode."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase

from s2w.config.schema import EvalConfig
from s2w.data.files import read_rows
from s2w.data.questions import (
    Question,
    as_prompts,
    check_prompt,
    generated_question,
    read_messages,
    with_system_prompt,
)
from s2w.data.tasks import check_task, derive_seed, generate
from s2w.data.verifiers import check_verifier, is_custom
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
    rows = read_rows(path)
    own = is_custom(config.verifier)
    columns = {"eval.prompt_column": config.prompt_column}
    if config.answer_column:
        columns["eval.answer_column"] = config.answer_column
    elif not own or config.choice_columns:
        raise ConfigError("eval.answer_column is empty: only a verifier of your own (eval.verifier) needs no answer")
    columns |= {f"eval.choice_columns[{i}]": name for i, name in enumerate(config.choice_columns)}
    problems = []
    for i, row in enumerate(rows):
        for setting, column in columns.items():
            if row.get(column) is None:
                there = ", ".join(map(str, row))
                raise ConfigError(f"{location!r}, row {i}, has no {column!r} ({setting}); its columns are: {there}")
            if not str(row[column]).strip():
                raise ConfigError(f"{location!r}, row {i}: its {column!r} ({setting}) is empty")
        given, task = row[config.prompt_column], config.verifier
        answer = str(row[config.answer_column]).strip() if config.answer_column else None
        if config.choice_columns and answer is not None:
            wrong = [str(row[column]) for column in config.choice_columns]
            choices, answer = _shuffled(answer, wrong, derive_seed("choices", config.seed, i))
            given, task = f"{str(given).strip()}\n\n{choices}", "exact_match"
        if isinstance(given, str):
            given = config.template.replace("{question}", given)
        where = f"{location!r}, row {i}"
        messages = read_messages(where, given)
        check_prompt(where, messages)
        metadata = {"row": dict(row)} if own else {}
        problems.append(Question(f"{path.stem}/{i}", messages, task, answer, metadata))
    return problems


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
