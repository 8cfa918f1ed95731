"""How a page is rendered and written: Jinja's environment with the filters that the templates use."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from s2w.errors import ConfigError
from s2w.eval.statistics import Estimate
from s2w.models.modes import THINK_CLOSE
from s2w.report.comparison import Metric
from s2w.report.figures import Picture
from s2w.report.verdict import duration, number

PAGE = "index.html"


def environment() -> Environment:
    """For the templates of this room."""
    made = Environment(
        loader=PackageLoader("s2w.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "value": _value,
        "interval": _interval,
        "data_uri": lambda png: "data:image/png;base64," + base64.b64encode(png).decode(),
        "duration": duration,
        "moment": lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)),
        "thinking_and_answer": _thinking_and_answer,
    }
    return made


def write(directory: Path, page: str, pictures: Sequence[Picture]) -> Path:
    """Writes a page and its pictures; returns the page's path.

    Raises:
        ConfigError: they cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (directory / f"{picture.name}.png").write_bytes(picture.png)
        (directory / PAGE).write_text(page)
    except OSError as error:
        raise ConfigError(f"the report cannot be written: {error}") from error
    return directory / PAGE


def _value(estimate: Estimate | None, metric: Metric, signed: bool = False) -> str:
    return "–" if estimate is None else _number(estimate.value, metric, signed)


def _interval(estimate: Estimate, metric: Metric, signed: bool = False) -> str:
    return f"[{_number(estimate.low, metric, signed)}, {_number(estimate.high, metric, signed)}]"


def _number(value: float, metric: Metric, signed: bool) -> str:
    return ("+" if signed and value > 0 else "") + number(value, metric)


def _thinking_and_answer(response: str) -> tuple[str, str]:
    """A response split after its think block; the first part is empty if there is none."""
    head, close, tail = response.partition(THINK_CLOSE)
    return (head + close, tail) if close else ("", response)
