"""Whether teacher and student share a vocabulary: a distribution over tokens means nothing across two vocabularies."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from s2w.errors import ConfigError
from s2w.models.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """The vocabulary that teacher and student share."""

    vocab_size: int
    """Real entries: highest token id + 1. Rows of either head from there on are padding."""
    notes: tuple[str, ...]
    """Sentences to show the user; empty when nothing differs."""


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """Highest token id + 1: rows of a head from there on are padding."""
    return max(tokenizer.get_vocab().values()) + 1


def compare_tokenizers(teacher: Checkpoint, student: Checkpoint) -> SharedVocabulary:
    """Checks that both tokenizers map the same tokens to the same ids.

    Heads may be padded to different sizes, as Qwen2.5's are (151,936 and 152,064 rows for 151,665 tokens).

    Raises:
        ConfigError: a token has two ids or is missing on one side, or a head is smaller than its vocabulary.
    """
    teacher_ids, student_ids = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    if teacher_ids != student_ids:
        differing = [
            token
            for token in teacher_ids.keys() | student_ids.keys()
            if teacher_ids.get(token) != student_ids.get(token)
        ]

        def first_id(token: str) -> tuple[int, str]:
            return min(ids[token] for ids in (teacher_ids, student_ids) if token in ids), token

        token = min(differing, key=first_id)
        raise ConfigError(
            f"Teacher and student must share a tokenizer, but {len(differing)} tokens differ, the first {token!r}: "
            f"{_id_text(teacher_ids.get(token))} in {teacher.reference!r}, "
            f"{_id_text(student_ids.get(token))} in {student.reference!r}"
        )
    vocab_size = token_count(teacher.tokenizer)
    for side in (teacher, student):
        if side.vocab_size < vocab_size:
            raise ConfigError(
                f"The tokenizer of {side.reference!r} has {vocab_size} tokens, more than the {side.vocab_size} rows "
                "of its embedding"
            )
    notes = []
    if teacher.vocab_size != student.vocab_size:
        notes.append(
            f"The heads are padded differently (teacher {teacher.vocab_size} rows, student {student.vocab_size}): "
            f"the divergence is over the {vocab_size} tokens that both have."
        )
    if set(teacher.eos_token_ids) != set(student.eos_token_ids):
        notes.append(
            f"Responses end at {_eos_text(teacher)} for the teacher and at {_eos_text(student)} for the student: "
            "the student has to be trained to stop there."
        )
    return SharedVocabulary(vocab_size, tuple(notes))


def _id_text(token_id: int | None) -> str:
    return "missing" if token_id is None else f"id {token_id}"


def _eos_text(side: Checkpoint) -> str:
    return " or ".join(str(side.tokenizer.convert_ids_to_tokens(i)) for i in side.eos_token_ids) or "no token"
