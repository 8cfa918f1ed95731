"""The order in which a run uses its prompts, and the mode of each use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from s2w.config.schema import Config
from s2w.data.placeholders import context_columns
from s2w.data.prompts import build_prompts
from s2w.data.tasks import derive_seed
from s2w.errors import ConfigError
from s2w.records import Prompt


@dataclasses.dataclass(frozen=True, slots=True)
class ThinkRatio:
    """Share of think mode among the prompts that may be in either, and its schedule."""

    first: float
    last: float
    steps: int
    """Batches from the first to the last."""
    thinking: Sequence[Prompt]
    """The run's prompts in their order, in think mode where they may be; those that may not be keep their mode."""

    def at(self, batch: int) -> float:
        """The share in a batch, counted from 0; linear, and constant after the last."""
        return self.first + (self.last - self.first) * min(1.0, batch / max(1, self.steps - 1))


class PromptStream:
    """Batches of prompts in a repeatable order: every epoch is its own permutation, each prompt in it once.

    A batch may span two epochs. Each use of a prompt has its own seed, so a second epoch samples anew.

    Args:
        prompts: a run's prompts, always in the same order.
        prompts_per_step: size of a batch.
        seed: seed of the permutations and the samples.
        state: that of an earlier stream over the same prompts, see :meth:`state_dict`.
        ratio: draws the mode anew for every batch; ``prompts`` are then in no_think mode where they may be. None
            leaves them as they are.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prompts_per_step: int,
        seed: int,
        state: dict[str, int] | None = None,
        ratio: ThinkRatio | None = None,
    ) -> None:
        if not prompts:
            raise ConfigError("There are no training prompts")
        if prompts_per_step < 1:
            raise ConfigError(f"loop.prompts_per_step must be at least 1, not {prompts_per_step}")
        self._prompts = list(prompts)
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._ratio = ratio
        self._epoch = self._position = self._batches = 0
        self._order = self._permutation()
        if state is not None:
            self.load_state_dict(state)

    @property
    def epoch(self) -> int:
        """Epoch of the next prompt, from 0."""
        return self._epoch

    def next_batch(self) -> list[Prompt]:
        """The next ``prompts_per_step`` prompts."""
        batch, indices = [], []
        for _ in range(self._prompts_per_step):
            index = int(self._order[self._position])
            seed = derive_seed("sample", self._seed, self._epoch, index)
            batch.append(dataclasses.replace(self._prompts[index], seed=seed))
            indices.append(index)
            self._position += 1
            if self._position == len(self._prompts):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._permutation()
        if self._ratio is not None:
            self._set_modes(batch, indices, self._ratio)
        self._batches += 1
        return batch

    def _set_modes(self, batch: list[Prompt], indices: Sequence[int], ratio: ThinkRatio) -> None:
        """Puts the wanted share of the batch into think mode: to the nearest prompt, and exactly on average."""
        free = [place for place, index in enumerate(indices) if ratio.thinking[index].mode != batch[place].mode]
        random = np.random.default_rng([self._seed, self._batches])
        count = int(ratio.at(self._batches) * len(free) + random.random())
        for place in random.permutation(free)[:count]:
            batch[place] = dataclasses.replace(ratio.thinking[indices[place]], seed=batch[place].seed)

    def state_dict(self) -> dict[str, int]:
        """Where the stream is, and what it runs over."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "batches": self._batches,
            "seed": self._seed,
            "prompts": len(self._prompts),
            "fingerprint": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at ``state``.

        Raises:
            ConfigError: the state belongs to other prompts or another seed.
        """
        own = self.state_dict()
        for name in ("seed", "prompts", "fingerprint"):
            if state[name] != own[name]:
                raise ConfigError(
                    f"Cannot resume: the checkpoint's prompts are not those of this run (its {name} was {state[name]}, "
                    f"now {own[name]})"
                )
        self._epoch, self._position, self._batches = state["epoch"], state["position"], state["batches"]
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        return np.random.default_rng([self._seed, self._epoch]).permutation(len(self._prompts))

    def _fingerprint(self) -> int:
        return derive_seed(*(prompt.uid for prompt in self._prompts))


def prompt_stream(
    config: Config, prompts: Sequence[Prompt], prompts_per_step: int, tokenizer: PreTrainedTokenizerBase
) -> PromptStream:
    """The on-policy phase's stream over the training ``prompts``, with the mode mix of ``data.think_ratio``.

    Raises:
        ConfigError: the chat template does not have both modes.
    """
    data, seed = config.data, config.run.seed
    if data.think_ratio is None:
        return PromptStream(prompts, prompts_per_step, seed)
    columns = context_columns(config)
    thinking, plain = (
        build_prompts(data, tokenizer, seed, [mode], columns=columns)[0] for mode in ("think", "no_think")
    )
    last = data.think_ratio if data.think_ratio_end is None else data.think_ratio_end
    ratio = ThinkRatio(data.think_ratio, last, config.loop.steps, thinking)
    return PromptStream(plain, prompts_per_step, seed, ratio=ratio)
