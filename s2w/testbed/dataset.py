"""``column_addition`` as a reasoning-gym dataset: importing this module registers it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from reasoning_gym.factory import ProceduralDataset, register_dataset

from s2w.testbed import task


@dataclass
class ColumnAdditionConfig:
    split: task.Split = "train"
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        assert self.size > 0, "size must be positive"


class ColumnAddition(ProceduralDataset):
    """Entry ``i`` is the first problem of ``split`` that the seed ``seed + i`` draws."""

    def __init__(self, config: ColumnAdditionConfig) -> None:
        super().__init__(config=config, seed=config.seed, size=config.size)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        problem = task.draw(random.Random(self.seed + idx), self.config.split)
        metadata = {"source_dataset": task.NAME, "source_index": idx, "terms": list(problem.terms)}
        return {"question": problem.question, "answer": problem.answer, "metadata": metadata}

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """1.0 for the sum, else 0.0: no partial credit."""
        return float(answer == entry["answer"])


register_dataset(task.NAME, ColumnAddition, ColumnAdditionConfig)
