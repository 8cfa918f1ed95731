"""The table of signals and divergences, and the tables of docs/signals.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from s2w.objectives.divergences import DIVERGENCES
from s2w.objectives.support import KINDS, markdown_table, signal_support
from s2w.records import SignalKind
from s2w.teacher.signal import bytes_per_row, encode, nbytes

DOCUMENT = (Path(__file__).parents[3] / "docs" / "signals.md").read_text()
COUPLED = ("adaptive_kl", "entropy_aware_kl", "clipped_forward_kl")
"""Divergences that merging tokens may raise."""
WIDTH, TOP_K = 4096, 64
"""Qwen3-235B-A22B's hidden size, and the document's k."""


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_hidden_rows_carry_everything(divergence: str) -> None:
    assert signal_support("hidden", divergence).strength == "exact"


@pytest.mark.parametrize("kind", ["topk", "ids"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sparse_rows_bound_f_divergences(kind: str, divergence: str) -> None:
    expected = "estimate" if divergence in COUPLED else "lower bound"
    assert signal_support(kind, divergence).strength == expected


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sampled_tokens_carry_reverse_kl_alone(divergence: str) -> None:
    expected = "estimate" if divergence == "reverse_kl" else "not possible"
    assert signal_support("sampled", divergence).strength == expected


def test_reasons_are_one_sentence() -> None:
    for kind in KINDS:
        for divergence in DIVERGENCES:
            reason = signal_support(kind, divergence).reason
            assert reason and ". " not in reason and not reason.endswith(".")


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown signal 'logits': known are hidden, topk, ids, sampled"):
        signal_support("logits", "forward_kl")
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        signal_support("hidden", "kl")


def test_table_has_every_pair() -> None:
    lines = markdown_table().splitlines()
    assert lines[0] == "| divergence | hidden | topk | ids | sampled |"
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines[2:]}
    assert cells == {name: [signal_support(kind, name).strength for kind in KINDS] for name in DIVERGENCES}


def test_the_document_has_the_table() -> None:
    assert DOCUMENT.count(f"\n\n{markdown_table()}\n") == 1


def documented(signal: str) -> tuple[str, int]:
    """The cells of a signal's row in the first table: its bytes as a formula, and the number for the large teacher."""
    [row] = re.findall(
        rf"^\| {re.escape(signal)} \| [^|]+ \| ([^|]+) \| ([\d,]+)(?: at k = {TOP_K})? \|$", DOCUMENT, re.M
    )
    return row[0], int(row[1].replace(",", ""))


@pytest.mark.parametrize(
    ("signal", "kind", "dtype", "formula", "size"),
    [
        ("`hidden`", "hidden", "bfloat16", "2 d", 2 * WIDTH),
        ("`hidden`, `signal.dtype=float8`", "hidden", "float8_e4m3fn", "d + 4", WIDTH + 4),
        ("`topk`", "topk", "", "8 k + 4", 8 * TOP_K + 4),
        ("`ids`", "ids", "", "8 k + 4", 8 * TOP_K + 4),
        ("`sampled`", "sampled", "", "4", 4),
    ],
)
def test_the_document_has_the_bytes_that_travel(
    signal: str, kind: SignalKind, dtype: str, formula: str, size: int
) -> None:
    assert documented(signal) == (formula, size)
    assert bytes_per_row(kind, top_k=TOP_K, hidden_size=WIDTH, dtype=dtype) == size
    rows = {
        "hidden": torch.zeros(3, WIDTH, dtype=torch.bfloat16),
        "topk": torch.zeros(3, 2 * TOP_K + 1, dtype=torch.int32),
        "ids": torch.zeros(3, TOP_K + 1),
        "sampled": torch.zeros(3, 1),
    }[kind]
    candidates = torch.zeros(3, TOP_K, dtype=torch.int32).numpy()
    payload = encode(kind, rows, candidates, "float8" if "float8" in dtype else "auto")
    assert nbytes(payload) == 3 * size
