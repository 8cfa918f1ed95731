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


def test_an_engine_that_kept_a_part_of_the_old_weights_is_found_within_the_tolerance() -> None:
    """Rounding of 0.01 nats, an update of 0.5, and an engine that lacks a tenth of it."""
    noise, update = normal(0, 0.01, 0.5, size=20)
    usual = compare(OLD + noise, OLD, name="engine 0", version=1, tolerance=0.25).median
    assert usual == pytest.approx(np.median(np.abs(noise)), rel=1e-3)
    compare(OLD + update + noise[::-1], OLD + update, OLD, usual, name="engine 0", version=2, tolerance=0.25)
    with pytest.raises(ProbeError, match=r"engine 0 computes with some weights from before version 2: .* most before"):
        compare(OLD + 0.9 * update + noise, OLD + update, OLD, usual, name="engine 0", version=2, tolerance=0.25)


def test_what_is_lacking_shows_in_the_direction_of_the_update_when_rounding_hides_its_size() -> None:
    """A thousand engines in order, then one that lacks 12 % of an update of 1 nat, with rounding of 0.1 nats in all: in
    learner and engine, before and after."""
    for seed in range(1000):
        true, old, before, after, own = normal(seed, 1, 1, 0.1, 0.1, 0.1, size=255)
        previous, learner = old + before, old + true + after
        compare(old + true + own, learner, previous, 0.1, name="engine 0", version=2, tolerance=0.25)
    engine = old + np.float32(0.88) * true + own
    assert np.median(np.abs(engine - learner)) < 0.15
    with pytest.raises(ProbeError, match=r"engine 0 computes with some weights from before version 2"):
        compare(engine, learner, previous, 0.1, name="engine 0", version=2, tolerance=0.25)


def test_rounding_far_above_the_update_is_no_alarm() -> None:
    """The learner's own rounding is in its movement too: by it alone every engine would fall short."""
    for seed in range(1000):
        before, after, own = normal(seed, 0.05, 0.05, 0.05, size=255)
        compare(own, after, before, 0.05, name="engine 0", version=2, tolerance=0.25)


def normal(seed: int, *deviations: float, size: int) -> list[np.ndarray]:
    """Float32 arrays of independent normal numbers, one of each standard deviation."""
    generator = np.random.default_rng(seed)
    return [generator.normal(0, deviation, size).astype(np.float32) for deviation in deviations]


def test_more_rounding_than_before_is_no_alarm_where_the_update_is_far_larger() -> None:
    """A student that has just begun to learn: its log-probs, and their rounding, become larger by the step."""
    new = OLD + np.float32(1)
    compare(new + np.float32(0.04), new, OLD, 0.01, name="engine 0", version=2, tolerance=0.25)
    with pytest.raises(ProbeError):
        compare(new + np.float32(0.06), new, OLD, 0.01, name="engine 0", version=2, tolerance=0.25)


def test_no_movement_is_no_alarm() -> None:
    compare(OLD, OLD, OLD, name="engine 0", version=1, tolerance=0.02)
