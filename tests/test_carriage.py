"""The table of signals and divergences."""

from __future__ import annotations

import pytest

from s2w.learner.carriage import KINDS, carries, markdown_table
from s2w.learner.divergence import DIVERGENCES


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_hidden_rows_carry_everything(divergence: str) -> None:
    assert carries("hidden", divergence).strength == "exact"


@pytest.mark.parametrize("kind", ["topk", "ids"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sparse_rows_bound_f_divergences(kind: str, divergence: str) -> None:
    expected = "estimate" if divergence == "adaptive_kl" else "lower bound"
    assert carries(kind, divergence).strength == expected


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sampled_tokens_carry_reverse_kl_alone(divergence: str) -> None:
    expected = "estimate" if divergence == "reverse_kl" else "not possible"
    assert carries("sampled", divergence).strength == expected


def test_reasons_are_one_sentence() -> None:
    for kind in KINDS:
        for divergence in DIVERGENCES:
            reason = carries(kind, divergence).reason
            assert reason and ". " not in reason and not reason.endswith(".")


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown signal 'logits': known are hidden, topk, ids, sampled"):
        carries("logits", "forward_kl")
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        carries("hidden", "kl")


def test_table_has_every_pair() -> None:
    lines = markdown_table().splitlines()
    assert lines[0] == "| divergence | hidden | topk | ids | sampled |"
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines[2:]}
    assert cells == {name: [carries(kind, name).strength for kind in KINDS] for name in DIVERGENCES}
