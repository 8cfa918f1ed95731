"""Whether a response repeats itself over and over."""

from __future__ import annotations

import numpy as np

REPEATS = 4
"""Occurrences in a row that make an n-gram a loop."""


def has_loop(token_ids: np.ndarray, longest: int, span: int) -> bool:
    """Whether an n-gram (n <= ``longest``) occurs :data:`REPEATS` or more times in a row, over ``span`` tokens or more.

    A stretch repeats with period n where each token equals the one n before it; for each n, the longest such
    stretch. O(longest * len(token_ids)).
    """
    for n in range(1, min(longest, len(token_ids) // REPEATS) + 1):
        differs = np.flatnonzero(token_ids[n:] != token_ids[:-n])
        bounds = np.concatenate([[-1], differs, [len(token_ids) - n]])
        # The first n tokens of a stretch have nothing before them to equal.
        covered = int(np.diff(bounds).max()) - 1 + n
        if covered >= max(REPEATS * n, span):
            return True
    return False
