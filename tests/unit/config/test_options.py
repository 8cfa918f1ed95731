"""Settings of a free mapping, read into a dataclass."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from s2w.config.options import read_options
from s2w.config.schema import AboveZero, Positive, TeacherConfig
from s2w.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Frozen, as an objective is."""

    width: Positive = 4
    scale: AboveZero | None = None
    names: str = "a"


def test_what_is_given_takes_the_place_of_the_defaults() -> None:
    assert read_options(Options(), {}, "o.") == Options()
    assert read_options(Options(), {"width": 7, "scale": 2}, "o.") == Options(7, 2.0)
    # As a configuration file has them: OmegaConf converts.
    assert read_options(Options(), {"width": "7", "scale": None}, "o.") == Options(7, None)


def test_an_object_is_a_base_too() -> None:
    base = Options(width=9, names="b")
    assert read_options(base, {"scale": 0.5}, "o.") == Options(9, 0.5, "b")
    assert base == Options(9, None, "b")
    teacher = TeacherConfig(model="m", replicas=2)
    assert read_options(teacher, {"dtype": "float32"}, "teachers.t.") == TeacherConfig("m", dtype="float32", replicas=2)


@pytest.mark.parametrize(
    ("given", "also", "sentence"),
    [
        ({"widht": 1}, (), "unknown setting o.widht: did you mean width?"),
        ({"modus": 1}, ("modes",), "unknown setting o.modus: did you mean modes?"),
        ({"zzz": 1}, (), "unknown setting o.zzz"),
        ({"width": "many"}, (), "o.width: Value 'many' of type 'str' could not be converted to Integer"),
        ({"width": None}, (), "o.width: "),
        ({"width": 0}, (), "o.width=0: must be >= 1"),
        ({"scale": float("nan")}, (), "o.scale=nan is not a finite number: must be > 0, or null"),
    ],
)
def test_bad_options_are_refused_by_name(given: dict[str, object], also: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_options(Options(), given, "o.", also)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)
