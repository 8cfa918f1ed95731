"""Ranges of settings, and which may change when a run is resumed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

import pytest
from annotated_types import Ge, Gt, Interval

from s2w.config.bounds import RESUMABLE, OneOf, Or, check_bounds, choices, describe, ranges, resumable, type_hints
from s2w.config.compose import help_text, settings
from s2w.config.schema import Config, EvalRun, Positive, Resumable, Temperature
from s2w.errors import ConfigError


def numbers(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and types of the settings that are numbers, or lists of them."""
    for name, hint in type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from numbers(hint, f"{prefix}{name}.")
        elif kinds(hint) & {int, float}:
            yield prefix + name, hint


def kinds(hint: Any) -> set[Any]:
    """The plain types in a type; a mapping's are free."""
    parts = get_args(hint)
    return set().union(*map(kinds, parts)) if parts else {hint}


@pytest.mark.parametrize("kind", [Config, EvalRun])
def test_every_number_has_a_range_and_is_finite(kind: type) -> None:
    found = dict(numbers(kind))
    assert {"rollout.top_p", "rollout.threads"} <= found.keys()
    assert [name for name, hint in found.items() if not ranges(hint)] == []
    check_bounds(kind())
    for name, hint in found.items():
        if float in kinds(hint):
            for value in (math.nan, math.inf, -math.inf):
                with pytest.raises(ConfigError, match=re.escape(f"{name}={value} is not a finite number")):
                    check_bounds(with_setting(kind(), name, value))
        if list not in kinds(hint) and not name.endswith(("temperature", "top_k")):
            with pytest.raises(ConfigError, match=re.escape(f"{name}=-1")):
                check_bounds(with_setting(kind(), name, -1))


def with_setting(config: Any, name: str, value: Any) -> Any:
    *sections, field = name.split(".")
    section = config
    for part in sections:
        section = getattr(section, part)
    setattr(section, field, value)
    return config


Animal = Annotated[str, OneOf("cat", dog="Barks.")]


@dataclass
class Inner:
    """A section."""

    animal: Resumable[Animal] = "cat"
    many: list[Animal] = field(default_factory=list)
    size: Positive | None = None


@dataclass
class Outer:
    """Sections, and settings beside them."""

    inner: Inner = field(default_factory=Inner)
    heat: Resumable[Temperature] = 1.0
    maybe: Resumable[Positive | None] = None
    free: dict[str, Any] = field(default_factory=dict)
    name: Resumable[str] = ""
    fixed: str = ""


def test_resumable_settings_are_those_that_are_marked() -> None:
    assert list(resumable(Outer)) == ["inner.animal", "heat", "maybe", "name"]
    may_change = set(resumable(Config))
    assert may_change <= {name for name, _, _ in settings()}
    assert {"loop.steps", "teacher.replicas", "rollout.threads", "cluster.address", "run.dir"} <= may_change
    computed = {
        "learner.learning_rate", "loop.prompts_per_step", "signal.kind", "run.seed", "student.model", "teachers",
        "loss.options", "off_policy.steps", "data.path",
    }  # fmt: skip
    assert not may_change & computed


def test_the_mark_is_no_range() -> None:
    hints = type_hints(Outer)
    assert ranges(hints["name"]) == () and describe(hints["name"]) == ""
    assert RESUMABLE not in ranges(hints["heat"]) and len(ranges(hints["heat"])) == 2
    check_bounds(Outer(name="anything", fixed="anything"))


@pytest.mark.parametrize(
    ("mark", "text", "inside", "outside"),
    [
        (Ge(0), ">= 0", (0, 5), (-1,)),
        (Ge(2), ">= 2", (2, 9), (1, -2)),
        (Gt(0), "> 0", (0.1,), (0.0,)),
        (Interval(ge=0, le=1), "between 0 and 1", (0, 1), (-0.1, 1.1)),
        (Interval(gt=0, le=1), "> 0 and <= 1", (1,), (0, 2)),
        (Interval(gt=0, lt=1), "> 0 and < 1", (0.5,), (0, 1)),
        (Interval(ge=0, lt=8), ">= 0 and < 8", (0, 7), (8,)),
        (OneOf("a", "b"), "one of a, b", ("a", "b"), ("c", "A", "")),
        (OneOf("a", b="The second."), "one of a, b", ("a", "b"), ("The second.",)),
    ],
)
def test_ranges(mark: Any, text: str, inside: tuple[Any, ...], outside: tuple[Any, ...]) -> None:
    @dataclass
    class Section:
        """One setting."""

        value: Any = None

    Section.__annotations__["value"] = Annotated[Any, mark]
    assert describe(Annotated[Any, mark]) == text
    for value in inside:
        check_bounds(Section(value))
    for value in outside:
        with pytest.raises(ConfigError, match=re.escape(f"s.value={value}: must be {text}") + "$"):
            check_bounds(Section(value), "s.")


def test_a_number_beside_the_range() -> None:
    assert describe(Annotated[int, Ge(1), Or(-1)]) == ">= 1, or -1"
    check_bounds(Outer(heat=0.0))
    with pytest.raises(ConfigError, match=r"^heat=0\.001: must be between 0\.01 and 2, or 0$"):
        check_bounds(Outer(heat=0.001))


def test_a_range_holds_in_sections_in_lists_and_beside_null() -> None:
    check_bounds(Outer(Inner("dog", ["cat", "dog"], 3), maybe=None))
    for bad, sentence in (
        (Outer(Inner("cow")), "inner.animal=cow: must be one of cat, dog"),
        (Outer(Inner(many=["cat", "cow"])), "inner.many=['cat', 'cow']: must be one of cat, dog"),
        (Outer(Inner(size=0)), "inner.size=0: must be >= 1, or null"),
        (Outer(maybe=0), "maybe=0: must be >= 1, or null"),
        (Outer(free={"a": [1.0, {"b": math.nan}]}), "free={'a': [1.0, {'b': nan}]} is not a finite number"),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
            check_bounds(bad)


def test_choices_that_need_a_sentence_have_it() -> None:
    assert choices(Animal) == {"dog": "Barks."}
    assert choices(list[Animal]) == choices(Resumable[Animal | None]) == {"dog": "Barks."}  # type: ignore[misc]
    assert choices(Annotated[str, OneOf("a", "b")]) == choices(str) == {}
    kinds = choices(type_hints(type(Config().signal))["kind"])
    assert list(kinds) == ["hidden", "topk", "ids", "sampled"]
    text = help_text()
    for name, meaning in kinds.items():
        assert f"      {name}: {meaning}\n" in text
