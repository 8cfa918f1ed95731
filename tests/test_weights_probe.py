"""The probe's verdict on log-probs."""

from __future__ import annotations

import numpy as np
import pytest

from s2w.weights.probe import ProbeError, compare

OLD = np.linspace(-8, -1, 20, dtype=np.float32)


def test_equal_within_the_tolerance_passes() -> None:
    result = compare(OLD + np.float32(0.01), OLD, name="engine 0", version=3, tolerance=0.02)
    assert result.mean == pytest.approx(0.01, rel=1e-3)


def test_a_difference_names_engine_version_and_figures() -> None:
    with pytest.raises(ProbeError, match=r"engine 1 .* version 7: .* 0\.03 nats .* tolerance 0\.02"):
        compare(OLD + np.float32(0.03), OLD, name="engine 1", version=7, tolerance=0.02)


def test_not_a_number_fails() -> None:
    with pytest.raises(ProbeError):
        compare(OLD * np.float32("nan"), OLD, name="engine 0", version=1, tolerance=0.02)


def test_an_engine_that_kept_the_old_weights_is_found_within_the_tolerance() -> None:
    new = OLD + np.float32(0.005)
    noise = np.float32(1e-5)
    compare(new + noise, new, OLD, name="engine 0", version=2, tolerance=0.02)
    with pytest.raises(ProbeError, match=r"engine 0 still computes with the weights before version 2"):
        compare(OLD + noise, new, OLD, name="engine 0", version=2, tolerance=0.02)


def test_no_movement_is_no_alarm() -> None:
    compare(OLD, OLD, OLD, name="engine 0", version=1, tolerance=0.02)
