"""Which prompts are held out: drawn by the seed, each with all of its repetitions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from s2w.models.modes import without_soft_switch


def draw(keys: Sequence[str], count: int, seed: int) -> set[str]:
    """Keys to hold out: drawn one by one until ``count`` entries have one of them, all of the keys if need be.

    Args:
        keys: of all entries, in an order that does not change; entries with the same key stay together.
    """
    sizes = Counter(keys)
    distinct = list(sizes)
    chosen: set[str] = set()
    held = 0
    for i in np.random.default_rng(seed).permutation(len(distinct)):
        if held >= count:
            break
        chosen.add(distinct[i])
        held += sizes[distinct[i]]
    return chosen


def question_key(messages: Sequence[Mapping[str, str]]) -> str:
    """The same for messages that differ in white space or in a soft switch (``/think``) alone."""
    return json.dumps([(message["role"], plain_text(message["content"])) for message in messages])


def plain_text(content: str) -> str:
    """A message's text without soft switches, with single spaces between its words."""
    return " ".join(without_soft_switch(content).split())
