"""A verifier outside of s2w: the rows of prompts.jsonl name it as ``sums:adds_up``."""

from __future__ import annotations

from typing import Any


def adds_up(response: str, answer: str | None, row: dict[str, Any]) -> float:
    """1 if the response is the sum of the row's terms, and nothing else; the rows have no reference answer.

    Args:
        response: what the student wrote after its think block.
        answer: the row's ``answer``; None here.
        row: the whole row, with any columns that the verifier needs.
    """
    return float(response.strip() == str(sum(row["terms"])))
