"""Privileged context: a teacher sees more than the student does, and scores the student's tokens under it.

On-policy self-distillation (OPSD, arXiv 2601.18734) where teacher and student are the same model: shown the reference
answer, it is a teacher to itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from s2w.config.schema import TeacherConfig
from s2w.data.placeholders import placeholders
from s2w.data.questions import encode
from s2w.errors import ConfigError, did_you_mean
from s2w.models.modes import render, supported_modes
from s2w.records import Mode, Prompt, Rollout


class Context:
    """What one teacher sees in place of the student's prompts.

    Args:
        setting: name of the teacher's section, for error messages.
        teacher: its settings, with ``context`` or ``system_prompt``.
        tokenizer: the student's, whose vocabulary the teacher shares.
        chat_template_kwargs: as in :func:`s2w.models.modes.render`.
    """

    def __init__(
        self,
        setting: str,
        teacher: TeacherConfig,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any],
    ) -> None:
        self._setting, self._template, self._system = setting, teacher.context, teacher.system_prompt
        self._tokenizer, self._kwargs = tokenizer, dict(chat_template_kwargs)
        self._rendered: dict[tuple[tuple[tuple[str, str], ...], Mode], np.ndarray] = {}

    def prompt(self, prompt: Prompt) -> Prompt:
        """What the teacher sees of a prompt.

        Raises:
            ConfigError: the template asks for something that the prompt does not have.
        """
        return replace(prompt, token_ids=self._token_ids([prompt])[0])

    def rollout(self, rollout: Rollout) -> Rollout:
        """The same response, after what the teacher sees."""
        return replace(rollout, prompt=self.prompt(rollout.prompt))

    def longest(self, prompts: Sequence[Prompt]) -> int:
        """The most tokens that the context adds to one of ``prompts``, in any mode; errors as in :meth:`prompt`."""
        modes = supported_modes(self._tokenizer)
        variants = [replace(prompt, mode=mode) for prompt in prompts for mode in modes]
        seen = self._token_ids(variants)
        return max((len(ids) - len(one.token_ids) for ids, one in zip(seen, variants, strict=True)), default=0)

    def _token_ids(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """int32 token ids of what the teacher sees; new ones are tokenised together."""
        told = [self._messages(prompt) for prompt in prompts]
        keys = [
            (tuple((message["role"], message["content"]) for message in messages), prompt.mode)
            for messages, prompt in zip(told, prompts, strict=True)
        ]
        new = {key: messages for key, messages in zip(keys, told, strict=True) if key not in self._rendered}
        texts = [render(self._tokenizer, messages, mode, self._kwargs) for (_, mode), messages in new.items()]
        self._rendered.update(zip(new, encode(self._tokenizer, texts), strict=True))
        return [self._rendered[key] for key in keys]

    def _messages(self, prompt: Prompt) -> list[dict[str, str]]:
        messages = [dict(message) for message in prompt.messages]
        if self._template is not None:
            last = max(i for i, message in enumerate(messages) if message["role"] == "user")
            messages[last]["content"] = self._filled(self._template, prompt, messages[last]["content"])
        if self._system is not None:
            own = [message for message in messages if message["role"] != "system"]
            messages = [{"role": "system", "content": self._system}, *own]
        return messages

    def _filled(self, template: str, prompt: Prompt, question: str) -> str:
        known = {"question": question, "answer": prompt.answer} | {
            name: value for name, value in prompt.metadata.items() if isinstance(value, str)
        }
        for name in placeholders(f"{self._setting}.context", template):
            if known.get(name) is None:
                there = "has no answer" if name == "answer" else f"has no such field{did_you_mean(name, known)}"
                raise ConfigError(f"{self._setting}.context has {{{name}}}, and prompt {prompt.uid!r} {there}")
        return template.format(**known)
