"""What a row of a file may hold: the one list of the columns that s2w reads, and the reading of each.

docs/data.md has its table from here. A null is as if the column were not there; so is an empty string, which is what an
empty cell of a CSV file holds, except for a ``response``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from numbers import Number
from typing import Any, get_args

from s2w.data.files import Row
from s2w.errors import ConfigError
from s2w.records import Mode

ROLES = ("system", "user", "assistant", "tool")
FINISH_REASONS = ("stop", "length", "abort", "error")
"""vLLM's. Only ``stop`` ends a complete response."""

PROMPTS, RESPONSES, PROBLEMS = "data.path", "off_policy.path", "eval.path"
"""The settings that name files of rows: prompts (also data.heldout_path), ready responses, problems."""

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class Column:
    """A column, as its documentation says it."""

    name: str
    type: str
    meaning: str
    without: str
    """What happens where a row does not have it."""
    files: tuple[str, ...] = (PROMPTS, RESPONSES, PROBLEMS)
    """In which files it is read."""


COLUMNS = (
    Column(
        "messages",
        "list of `{role, content}`; in a CSV file the same as JSON",
        "The chat so far. Where the last message is the assistant's, it is the response, see there.",
        "`prompt` is read.",
    ),
    Column("prompt", "string, or a list as in `messages`", "One user message.", "A row with neither is refused."),
    Column(
        "response",
        "string",
        "The teacher's response to train on, with its think block if it has one. Beside a final assistant message, the "
        "column counts and the message is left out.",
        "The final assistant message of `messages` is the response; a row with neither is refused.",
        (RESPONSES,),
    ),
    Column(
        "answer",
        "string or number",
        "The reference that the verifier compares the final answer with; also `{answer}` in a teacher's `context`.",
        "Nothing is verified, unless the verifier needs no reference (a function of your own, a reasoning-gym task).",
    ),
    Column(
        "task",
        "string",
        "The verifier of this row: `math_verify`, `exact_match`, a reasoning-gym task, `package.module:function`, or "
        "the name of an entry point. Also what `data.task_modes` and `teachers.NAME.tasks` go by.",
        "`data.verifier` (in `s2w eval`, `eval.verifier`) is the verifier.",
    ),
    Column(
        "mode",
        "`think` or `no_think`",
        "The mode of this prompt.",
        "A `/think` or `/no_think` in the messages says it; else prompts get the modes of `data.modes` in turn, and a "
        "ready response has the mode in which it is.",
        (PROMPTS, RESPONSES),
    ),
    Column(
        "metadata",
        "object; in a CSV file as JSON",
        "For a reasoning-gym task: the `metadata` of its entry, which many of its scorers need.",
        "An empty one.",
    ),
    Column(
        "finish_reason",
        ", ".join(f"`{one}`" for one in FINISH_REASONS),
        "How the response ended; only `stop` is a complete one and gets an end-of-sequence token.",
        "`stop`.",
        (RESPONSES,),
    ),
    Column(
        "response_token_ids",
        "list of integers",
        "The response's tokens, in a file that `s2w generate` has written for the same vocabulary.",
        "`response` is tokenised.",
        (RESPONSES,),
    ),
)


def read_messages(where: str, row: Row) -> tuple[Messages, str | None]:
    """The prompt of a row, which ends with something to answer, and the response if the row has one.

    Args:
        where: file and row, for the error message.

    Raises:
        ConfigError: it has no messages, something else in their place, or nothing to answer.
    """
    columns = ("messages", "prompt")
    column = next((name for name in columns if _there(row, name)), None)
    if column is None and any(row.get(name) == "" for name in columns):
        raise ConfigError(f"{where}: the prompt is empty")
    if column is None:
        there = ", ".join(map(str, row)) or "none"
        raise ConfigError(f"{where} has neither `messages` nor `prompt`; its columns are: {there}")
    given = row[column]
    messages = as_messages(where, _parsed(where, column, given) if column == "messages" else given)
    response = row.get("response")
    if response is not None and not isinstance(response, str):
        raise ConfigError(f"{where}: `response` is a string, not {response!r}")
    if messages[-1]["role"] == "assistant":
        *before, last = messages
        messages, response = tuple(before), last["content"] if response is None else response
    check_prompt(where, messages)
    return messages, response


def as_messages(where: str, given: Any) -> Messages:
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


def read_answer(where: str, row: Row, column: str = "answer") -> str | None:
    """The reference answer as text; None if there is none.

    Raises:
        ConfigError: it is neither text nor a number.
    """
    if not _there(row, column):
        return None
    answer = row[column]
    if isinstance(answer, bool) or not isinstance(answer, str | Number):
        raise ConfigError(
            f"{where}: `{column}` is a string or a number, not {answer!r}: write it as text, or into a column of "
            "another name, which a verifier of your own finds in its row"
        )
    text = str(answer)
    return text if text.strip() else None


def read_task(where: str, row: Row, column: str = "task") -> str | None:
    """The name of the row's own verifier; None if it has none.

    Raises:
        ConfigError: it is no string.
    """
    if not _there(row, column):
        return None
    if not isinstance(row[column], str):
        raise ConfigError(f"{where}: `{column}` is a string, not {row[column]!r}")
    return row[column]


def read_mode(where: str, row: Row) -> Mode | None:
    """The mode that the row asks for; None if it does not say.

    Raises:
        ConfigError: there is no such mode.
    """
    mode = row["mode"] if _there(row, "mode") else None
    if mode is not None and mode not in get_args(Mode):
        raise ConfigError(f"{where} has mode {mode!r}; a mode is {' or '.join(get_args(Mode))}")
    return mode


def read_metadata(where: str, row: Row) -> dict[str, Any]:
    """What a scorer needs besides question and answer; empty if there is none.

    Raises:
        ConfigError: it is no object.
    """
    given = _parsed(where, "metadata", row["metadata"]) if _there(row, "metadata") else {}
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: `metadata` is an object, not {given!r}")
    return given


def read_finish_reason(where: str, row: Row) -> str:
    """How the row's response ended.

    Raises:
        ConfigError: vLLM has no such reason.
    """
    reason = row["finish_reason"] if _there(row, "finish_reason") else "stop"
    if reason not in FINISH_REASONS:
        raise ConfigError(f"{where} has finish_reason {reason!r}: write one of {', '.join(FINISH_REASONS)}")
    return str(reason)


def _there(row: Row, column: str) -> bool:
    return row.get(column) not in (None, "")


def _parsed(where: str, column: str, given: Any) -> Any:
    """The value of a column that holds a list or an object, which CSV files have as JSON."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError as error:
        raise ConfigError(f"{where}: `{column}` is text that is not JSON: {error}") from error
