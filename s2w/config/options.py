"""Settings whose names are known only once another setting is: free mappings, read into a dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from s2w.config.bounds import check_bounds
from s2w.errors import ConfigError, did_you_mean

T = TypeVar("T")


def read_options(base: T, given: Mapping[str, Any], prefix: str, also: Iterable[str] = ()) -> T:
    """A dataclass of settings: the values of ``base``, replaced where ``given`` has others.

    Args:
        base: an object of the dataclass.
        prefix: prefix of the settings' names in errors, such as ``teachers.math.``.
        also: further names that the mapping may have, for suggestions in errors.

    Raises:
        ConfigError: a name that is not a field, a value of the wrong type or out of range.
    """
    known = [field.name for field in dataclasses.fields(base)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown setting {prefix}{key}{did_you_mean(key, [*known, *also])}")
    try:
        structured = OmegaConf.structured(base)
        OmegaConf.set_readonly(structured, False)  # A frozen dataclass is rebuilt.
        made = OmegaConf.to_object(OmegaConf.merge(structured, dict(given)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{prefix}{error.full_key}: {str(error).splitlines()[0]}") from error
    check_bounds(made, prefix)
    return made  # type: ignore[return-value]
