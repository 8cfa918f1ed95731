"""The thinking budget: a think block that is still open after this many tokens is closed, and the answer follows.

Qwen3 Technical Report (arXiv 2505.09388), section 4.3, "Thinking Budget": generation halts at the budget, a
stop-thinking instruction is inserted, and the model answers from the thinking it has done.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from s2w.config.schema import RolloutConfig
from s2w.errors import ConfigError
from s2w.models.modes import THINK_CLOSE, opens_thinking, split_thinking, supported_modes


class ThinkingStop:
    """The stop-thinking instruction, and when it is needed.

    Args:
        text: the instruction, closing tag included.
        tokenizer: the student's.
    """

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._opened = tokenizer, opens_thinking(tokenizer)
        self.token_ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
        """int32 [n]: what is inserted."""

    def is_open(self, token_ids: np.ndarray) -> bool:
        """Whether a response so far (int32 [n]) to a prompt in think mode is inside its think block."""
        text = str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
        return not split_thinking(text, "think", opened=self._opened).closed


def check_thinking_budget(
    budget: int, setting: str, rollout: RolloutConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Rejects a budget that cannot be kept.

    Args:
        setting: name of the setting that holds the budget, for the error message.

    Raises:
        ConfigError: no think block in the template, an instruction without a closing tag or that the tokenizer cannot
            encode, or no room for an answer.
    """
    if budget < 1:
        raise ConfigError(f"{setting}={budget}: must be >= 1, or null for no budget")
    if "think" not in supported_modes(tokenizer):
        raise ConfigError(
            f"{setting}={budget}, but the chat template of {tokenizer.name_or_path!r} has no think block: write null"
        )
    if THINK_CLOSE not in rollout.stop_thinking:
        raise ConfigError(f"rollout.stop_thinking must contain {THINK_CLOSE}: it closes the think block")
    try:
        inserted = len(ThinkingStop(rollout.stop_thinking, tokenizer).token_ids)
    except Exception as error:  # The tokenizers library has no exception class of its own.
        raise ConfigError(f"the tokenizer cannot encode rollout.stop_thinking: {error}") from error
    if budget + inserted >= rollout.max_tokens:
        raise ConfigError(
            f"{setting}={budget} and the {inserted} tokens of rollout.stop_thinking leave no room for an answer in "
            f"rollout.max_tokens={rollout.max_tokens}: write a smaller budget, or at least rollout.max_tokens="
            f"{budget + inserted + 1}"
        )
