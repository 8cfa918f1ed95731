"""/think and /no_think: prompts that ask for a mode, and responses that keep to it or not.

Qwen3's conventions (arXiv 2505.09388, section 4.3): a thinking answer is ``<think>...</think>`` and then the answer;
a non-thinking one starts with an empty think block. The hard switch is the chat template's ``enable_thinking``, which
when False puts that empty block into the prompt. The soft switch is ``/think`` or ``/no_think`` in a user or system
message; the last one counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from s2w.errors import ConfigError
from s2w.records import Mode

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
EMPTY_THINK_BLOCK = f"{THINK_OPEN}\n\n{THINK_CLOSE}\n\n"
SWITCH = (
    "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "{{- '" + EMPTY_THINK_BLOCK.replace("\n", "\\n") + "' }}{%- endif %}"
)
"""What gives a chat template ``enable_thinking`` when appended to it."""
# Not part of a path or a closing tag: "</think>" and "/think/" are not switches.
SOFT_SWITCH = re.compile(r"(?<![\w/<])/(think|no_think)(?![\w/>])")

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """A response text, split at its think block."""

    thinking: str
    """Without the tags, stripped."""
    answer: str
    """What is outside the think block, stripped; empty while the block is open."""
    closed: bool
    """No think block was left open."""
    thought: bool
    """There is a think block with something in it."""


def has_thinking_switch(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template heeds ``enable_thinking`` (Qwen3's hybrid models do)."""
    probe = [{"role": "user", "content": "x"}]
    return _apply(tokenizer, probe, {"enable_thinking": True}) != _apply(tokenizer, probe, {"enable_thinking": False})


def add_thinking_switch(tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds Qwen3's ``enable_thinking`` to a chat template without thinking; one that has a switch keeps it.

    Raises:
        ConfigError: there is no chat template, or its prompts end inside a think block.
    """
    if has_thinking_switch(tokenizer):
        return
    if opens_thinking(tokenizer):
        raise ConfigError(
            f"student.thinking_switch=true, but the chat template of {tokenizer.name_or_path!r} opens a think block "
            "in every prompt: no_think mode is impossible"
        )
    tokenizer.chat_template = str(tokenizer.chat_template) + SWITCH


def opens_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a thinking prompt itself ends with an open think block (Qwen3-Thinking-2507, DeepSeek-R1)."""
    prompt = _apply(tokenizer, [{"role": "user", "content": "x"}], {"enable_thinking": True})
    return prompt.rstrip().endswith(THINK_OPEN)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the special token that the chat template puts after an assistant's message; None if it puts none there."""
    if tokenizer.chat_template is None:
        return None
    marker = "The last words of a turn."
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": marker}]
    try:
        text = _apply(tokenizer, messages, {}, generating=False)
    except ConfigError:
        return None
    after = text.rpartition(marker)[2].lstrip()
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    known = tokenizer.added_tokens_decoder
    return ids[0] if ids and ids[0] in known and known[ids[0]].special else None


def supported_modes(tokenizer: PreTrainedTokenizerBase) -> tuple[Mode, ...]:
    """Modes that the chat template can ask for: both, or the only one of a template without the switch."""
    if has_thinking_switch(tokenizer):
        return ("think", "no_think")
    return ("think",) if opens_thinking(tokenizer) else ("no_think",)


def soft_switch(messages: Sequence[Message]) -> Mode | None:
    """The mode that the messages ask for: the last ``/think`` or ``/no_think`` of a user or system message."""
    asking = (message["content"] for message in messages if message["role"] in ("user", "system"))
    found: list[Mode] = [match for content in asking for match in SOFT_SWITCH.findall(content)]
    return found[-1] if found else None


def without_soft_switch(text: str) -> str:
    """A message's text without ``/think`` and ``/no_think``."""
    return SOFT_SWITCH.sub("", text)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    mode: Mode,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text: chat template applied with the mode's switch, ready for the response.

    Raises:
        ConfigError: there is no chat template, it cannot ask for ``mode``, or it rejects the messages.
    """
    kwargs = dict(chat_template_kwargs or {})
    if "enable_thinking" in kwargs:
        raise ConfigError("data.chat_template_kwargs may not set enable_thinking: the mode of a prompt does")
    if mode not in (modes := supported_modes(tokenizer)):
        raise ConfigError(
            f"The chat template cannot ask for mode {mode!r}, only for {modes[0]!r}: it has no thinking switch; write "
            "student.thinking_switch=true to add one, or leave the mode out"
        )
    return _apply(tokenizer, messages, {**kwargs, "enable_thinking": mode == "think"})


def split_thinking(text: str, mode: Mode, *, opened: bool = False) -> ParsedResponse:
    """Splits a response text into thinking and answer.

    Args:
        text: the response, decoded with its think tags (in Qwen3 they are not special tokens).
        mode: the prompt's. Only in ``think`` does a closing tag without an opening one end a think block.
        opened: the prompt ended inside the think block (:func:`opens_thinking`).
    """
    head, open_tag, rest = text.partition(THINK_OPEN)
    if not open_tag:
        has_block = mode == "think" and (opened or THINK_CLOSE in text)
        if not has_block:
            return ParsedResponse("", text.strip(), closed=True, thought=False)
        head, rest = "", text
    thinking, close_tag, tail = rest.partition(THINK_CLOSE)
    thinking = thinking.strip()
    return ParsedResponse(thinking, (head + tail).strip(), closed=bool(close_tag), thought=bool(thinking))


def adheres(response: ParsedResponse, mode: Mode) -> bool:
    """Whether a response keeps to its mode: think block closed, and not empty if and only if ``mode`` is think."""
    return response.closed and response.thought == (mode == "think")


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], kwargs: Mapping[str, Any], generating: bool = True
) -> str:
    if tokenizer.chat_template is None:
        raise ConfigError(f"The tokenizer of {tokenizer.name_or_path!r} has no chat template")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=generating, **kwargs
        )
    except TemplateError as error:
        raise ConfigError(f"The chat template rejects the messages: {str(error).rstrip('.')}") from error
    assert isinstance(text, str)
    return text
