"""Teacher and student as a run knows them before anything loads."""

from __future__ import annotations

from dataclasses import dataclass

from s2w.models.checkpoint import Checkpoint
from s2w.models.tokenizers import SharedVocabulary


@dataclass(frozen=True, slots=True)
class ModelPair:
    """What the checks found out about the models and the run needs."""

    teacher: Checkpoint
    student: Checkpoint
    vocabulary: SharedVocabulary
    max_model_len: int
    """Longest prompt plus response, tokens."""
