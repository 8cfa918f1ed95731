"""Hidden rows of several samples, taken as if they were one tensor."""

from __future__ import annotations

import pytest
import torch

from s2w.learner.signal_fetch import HiddenParts, joined
from s2w.teacher.signal import HiddenDtype, decode, encode, hidden_rows

SIZES, WIDTH = (3, 1, 5), 8


def parts_on(wire: HiddenDtype) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(size, WIDTH, generator=generator) for size in SIZES]
    return [decode(encode("hidden", each, dtype=wire)) for each in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wire", ["auto", "bfloat16", "float8"])
def test_every_cut_is_that_of_the_rows_one_after_the_other(wire: HiddenDtype, dtype: torch.dtype) -> None:
    parts = parts_on(wire)
    rows, whole = HiddenParts(parts, dtype), hidden_rows(joined(parts), dtype)
    assert len(rows) == len(whole) == sum(SIZES)
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 3):
            assert torch.equal(rows[start:stop], whole[start:stop])
    assert torch.equal(rows[:], whole)


def test_a_cut_inside_of_one_sample_is_not_copied() -> None:
    parts = parts_on("auto")
    rows = HiddenParts(parts, torch.float32)
    assert rows[4:6].data_ptr() == parts[2]["hidden"].data_ptr()
    assert rows[5:9].data_ptr() == parts[2]["hidden"][1:].data_ptr()
