"""A response of the teacher to a prompt: what the off-policy phase generates, filters and trains on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from s2w.models.modes import ParsedResponse, split_thinking
from s2w.records import Mode, Prompt, Rollout

Key = tuple[str, Mode, int]


@dataclass(frozen=True, slots=True)
class Response:
    """One response, generated or read from a file."""

    prompt: Prompt
    sample: int
    token_ids: np.ndarray
    """int32 [n], end-of-sequence token included unless it was cut off."""
    text: str
    """Decoded without special tokens; think tags stay, which in Qwen3 are not special."""
    finish_reason: str
    """As vLLM reports it: ``stop``, or what cut it off (``length``; in existing datasets also ``abort``, ``error``)."""

    @property
    def key(self) -> Key:
        """What identifies a response: prompt uid, mode, sample."""
        return self.prompt.uid, self.prompt.mode, self.sample

    def parse(self, *, opened: bool) -> ParsedResponse:
        """Its thinking and its answer; ``opened`` as in :func:`s2w.models.modes.split_thinking`."""
        return split_thinking(self.text, self.prompt.mode, opened=opened)

    def as_rollout(self) -> Rollout:
        """What the teacher pool scores and the learner trains on; no policy version sampled it."""
        return Rollout(
            prompt=self.prompt,
            sample=self.sample,
            token_ids=self.token_ids,
            log_probs=np.full(len(self.token_ids), np.nan, np.float32),
            versions=(),
            finish_reason=self.finish_reason,
            engine=-1,
            started=0.0,
            finished=0.0,
        )
