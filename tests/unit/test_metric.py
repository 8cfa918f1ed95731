"""Definitions of metrics."""

from __future__ import annotations

import pytest

import s2w.launch.train  # noqa: F401 (it brings all rooms that define metrics)
from s2w import metric
from s2w.metric import METRICS, Metric, define, definitions


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test defines is gone after it."""
    monkeypatch.setattr(metric, "METRICS", dict(METRICS))


def test_a_metric_is_defined_once() -> None:
    made = define("surprise", "nats/token", "Minus log-prob of the sampled token.", over="tokens", column="surprise")
    assert made == Metric("surprise", "nats/token", "Minus log-prob of the sampled token.", "tokens", "surprise")
    assert metric.METRICS["surprise"] is made
    # A module that is imported again, under another name or by pickle, says the same.
    again = define("surprise", "nats/token", "Minus log-prob of the sampled token.", over="tokens", column="surprise")
    assert again == made
    with pytest.raises(ValueError, match=r"the metric 'surprise' is defined twice: .*nats/token.* and .*unit='bits'"):
        define("surprise", "bits", "Minus log-prob of the sampled token.", over="tokens", column="surprise")
    assert metric.METRICS["surprise"] is made


def test_definitions_make_the_metrics_again() -> None:
    define("surprise", "nats/token", "Minus log-prob of the sampled token.")
    values = definitions()
    assert [value["name"] for value in values] == list(metric.METRICS)
    assert [Metric(**value) for value in values] == list(metric.METRICS.values())


def test_every_metric_of_the_system_says_what_it_is() -> None:
    assert {"loss", "mode_adherence", "swap_ms", "trained_share", "tokens_per_second"} <= METRICS.keys()
    for name, defined in METRICS.items():
        assert defined.name == name and defined.unit and defined.text.endswith(".")
        format(1.0, defined.format)
