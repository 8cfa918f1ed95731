"""What the type of a setting says besides its Python type: its range, and whether a resumed run may change it.

A range is an annotation: ``Annotated[int, Ge(1)]`` and the like (the package annotated-types), :class:`OneOf` for
strings, :class:`Or` for a number outside the range that has its own meaning. :data:`RESUMABLE` stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from s2w.errors import ConfigError


class OneOf:
    """The strings that a setting may be, or true and false beside them.

    Args:
        choices: the values; ``documented`` has those that need explaining, each with its sentence.
    """

    def __init__(self, *choices: str | bool, **documented: str) -> None:
        self.documented = documented
        self.choices = (*choices, *documented)


@dataclass(frozen=True, slots=True)
class Or:
    """A number that is allowed besides the range."""

    value: float


@dataclass(frozen=True, slots=True)
class _Resumable:
    """Marks a setting that does not change what is computed."""


RESUMABLE = _Resumable()
"""The mark of a setting that may differ when a run is resumed."""


def resumable(config: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of the settings below a dataclass that a resumed run may change."""
    for name, hint in type_hints(config).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from resumable(hint, f"{prefix}{name}.")
        elif RESUMABLE in _marks(hint):
            yield prefix + name


def check_bounds(config: Any, prefix: str = "") -> None:
    """Compares every setting of a dataclass of :mod:`s2w.config.schema` with its range.

    Every number must be finite, those in lists and free mappings too.

    Args:
        prefix: prefix of the settings' names, such as ``teachers.NAME.``.

    Raises:
        ConfigError: names the first setting out of range, and its range.
    """
    hints = type_hints(type(config))
    for field in fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            check_bounds(value, f"{name}.")
            continue
        hint = hints[field.name]
        marks, null = ranges(hint), ", or null" if _takes_none(hint) else ""
        for one in _leaves(value):
            if isinstance(one, float) and not math.isfinite(one):
                range_text = f": must be {describe(hint)}{null}" if marks else ""
                raise ConfigError(f"{name}={value} is not a finite number{range_text}")
            if one is not None and not _allowed(one, marks):
                raise ConfigError(f"{name}={value}: must be {describe(hint)}{null}")


def type_hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields by name, ranges included."""
    return get_type_hints(kind, include_extras=True)


def ranges(hint: Any) -> tuple[Any, ...]:
    """Ranges in a type, including those of list elements and optional values; empty if there are none."""
    return tuple(mark for mark in _marks(hint) if mark is not RESUMABLE)


def describe(hint: Any) -> str:
    """The range of a type in words, to follow "must be"; empty if it has none."""
    return ", or ".join(_words(mark) for mark in ranges(hint))


def choices(hint: Any) -> dict[str, str]:
    """The documented strings of a type by name; empty if it has none."""
    return {name: text for mark in ranges(hint) if isinstance(mark, OneOf) for name, text in mark.documented.items()}


def _marks(hint: Any) -> tuple[Any, ...]:
    """All annotations of a type and of its parts."""
    own = tuple(hint.__metadata__) if get_origin(hint) is Annotated else ()
    parts = get_args(hint)[:1] if own else get_args(hint)
    return own + tuple(mark for part in parts for mark in _marks(part))


def _words(mark: Any) -> str:
    if isinstance(mark, OneOf):
        return f"one of {', '.join(str(c).lower() if isinstance(c, bool) else c for c in mark.choices)}"
    if isinstance(mark, Or):
        return f"{mark.value:g}"
    ge, gt, le, lt = _limits(mark)
    if le is not None:
        return f"between {ge} and {le}" if gt is None else f"> {gt} and <= {le}"
    if lt is not None:
        return f">= {ge} and < {lt}" if gt is None else f"> {gt} and < {lt}"
    return f">= {ge}" if gt is None else f"> {gt}"


def _allowed(value: Any, marks: tuple[Any, ...]) -> bool:
    """Whether a value is in one of the ranges; without ranges, any value is allowed."""
    return not marks or any(_fits(value, mark) for mark in marks)


def _fits(value: Any, mark: Any) -> bool:
    if isinstance(mark, OneOf):
        return value in mark.choices
    if isinstance(mark, Or):
        return bool(value == mark.value)
    ge, gt, le, lt = _limits(mark)
    return (
        (ge is None or value >= ge)
        and (gt is None or value > gt)
        and (le is None or value <= le)
        and (lt is None or value < lt)
    )


def _limits(mark: Any) -> tuple[Any, Any, Any, Any]:
    """The ge, gt, le and lt of a Ge, Gt or Interval, None where there is no such limit."""
    ge, gt, le, lt = (getattr(mark, name, None) for name in ("ge", "gt", "le", "lt"))
    return ge, gt, le, lt


def _takes_none(hint: Any) -> bool:
    return type(None) in get_args(hint) or any(map(_takes_none, get_args(hint)))


def _leaves(value: Any) -> Iterator[Any]:
    """Values in lists and mappings, at any depth; for anything else, itself."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value
