"""Which of the teacher's responses are held out, and in which order the others are trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from s2w.data.heldout import draw
from s2w.errors import ConfigError
from s2w.teacher_data.response import Response


@dataclass(frozen=True, slots=True)
class Split:
    """Responses to train on, and held-out ones to other prompts."""

    train: list[Response]
    heldout: list[Response]


def split(responses: Sequence[Response], heldout: int, seed: int) -> Split:
    """Holds out all responses to randomly chosen prompts, until there are ``heldout``; both parts keep the order.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    prompts = [json.dumps(response.prompt.messages) for response in responses]
    chosen = draw(prompts, heldout, seed)
    pairs = list(zip(responses, prompts, strict=True))
    train = [response for response, prompt in pairs if prompt not in chosen]
    if not train:
        raise ConfigError(
            f"off_policy.heldout_responses={heldout} leaves none of {len(responses)} responses to train on: write a "
            "smaller number, or generate more responses (off_policy.prompts, off_policy.samples_per_prompt)"
        )
    return Split(train, [response for response, prompt in pairs if prompt in chosen])


class ResponseStream:
    """Batches by number: every epoch is its own permutation, with each response once; a batch may span two."""

    def __init__(self, responses: Sequence[Response], size: int, seed: int) -> None:
        self.responses, self.size, self.seed = responses, size, seed
        self._order = lru_cache(maxsize=2)(self._permutation)

    def batch(self, step: int) -> list[Response]:
        """Responses of update ``step``, from 0."""
        count = len(self.responses)
        positions = range(step * self.size, (step + 1) * self.size)
        return [self.responses[self._order(position // count)[position % count]] for position in positions]

    def fingerprint(self) -> str:
        """Changes with the responses, their order and the seed."""
        digest = hashlib.sha256(str(self.seed).encode())
        for response in self.responses:
            digest.update(f"{response.key} {len(response.token_ids)} ".encode() + response.token_ids.tobytes())
        return digest.hexdigest()

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.responses))
