"""Log-probs that a probe compares, from the learner's side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, make_model

from s2w.weights.probe import ProbeError, compare, model_log_probs

PROBE = np.array([(7 * j * j + 5 * j) % VOCAB_SIZE for j in range(90)], dtype=np.int32)


def test_model_log_probs_in_chunks() -> None:
    """Rows of a chunk see the whole context: the same as one float64 pass, to float32 rounding."""
    model = make_model("untied", seed=3)
    ids = torch.as_tensor(PROBE, dtype=torch.int64)
    with torch.no_grad():
        logits = model.double()(ids[None]).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0].numpy()
    for rows in (7, 89, 512):
        np.testing.assert_allclose(model_log_probs(model.float(), PROBE, chunk_rows=rows), expected, atol=2e-5)


def test_a_difference_that_is_not_a_number_fails() -> None:
    broken = np.array([np.nan, 0.0], dtype=np.float32)
    with pytest.raises(ProbeError, match="nan"):
        compare(broken, np.zeros(2, dtype=np.float32), name="engine 1", version=3, tolerance=1.0)
