"""Rows of JSONL, Parquet and CSV files, each with its place; malformed files are refused, with the place of the error.

A place is the file and, in JSONL, the line, counted from 1 as editors do; elsewhere the row, counted from 0.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from s2w.errors import ConfigError

Row = dict[str, Any]
Placed = tuple[str, Row]
"""A place, such as ``'prompts.jsonl', line 3``, and the row there."""
BATCH = 1024
"""Rows of a Parquet file in memory at once."""


def read_rows(path: Path) -> list[Placed]:
    """All rows of a file, with their places.

    Raises:
        ConfigError: as in :func:`rows`; there is no such file, or it is empty.
    """
    if not path.is_file():
        raise ConfigError(f"There is no prompt file {str(path.absolute())!r}")
    found = list(rows(path))
    if not found:
        raise ConfigError(f"{str(path)!r} contains no prompts")
    return found


def rows(file: Path) -> Iterator[Placed]:
    """The rows of a file with their places, read as they are asked for.

    Raises:
        ConfigError: its suffix is another one, or its content is not what its suffix says.
    """
    readers = {".jsonl": json_rows, ".parquet": parquet_rows, ".csv": csv_rows}
    if file.suffix not in readers:
        *others, last = readers
        raise ConfigError(f"{str(file)!r} must end in {', '.join(others)} or {last}")
    yield from readers[file.suffix](file)


def json_rows(file: Path) -> Iterator[Placed]:
    """The objects of a JSONL file; blank lines are skipped.

    Raises:
        ConfigError: it is not UTF-8 text, or a line is not a JSON object; the message gives its number.
    """
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        where = f"{str(file)!r}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{where}, is not a JSON object")
        yield where, row


def csv_rows(file: Path) -> Iterator[Placed]:
    """The rows of a CSV file, keyed by the names in its first line.

    Raises:
        ConfigError: it is not UTF-8 text, or not CSV.
    """
    try:
        yield from _numbered(file, csv.DictReader(_lines(file, newline="")))
    except csv.Error as error:
        raise ConfigError(f"{str(file)!r} is not a CSV file: {error}") from error


def parquet_rows(file: Path) -> Iterator[Placed]:
    """The rows of a Parquet file.

    Raises:
        ConfigError: it is cut off or damaged.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(file).iter_batches(BATCH)
        yield from _numbered(file, (row for batch in batches for row in batch.to_pylist()))
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{str(file)!r} is not a complete Parquet file: {reason}") from error


def _numbered(file: Path, found: Iterable[Row]) -> Iterator[Placed]:
    for number, row in enumerate(found):
        yield f"{str(file)!r}, row {number}", row


def _lines(file: Path, newline: str | None = None) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8", newline=newline) as lines:
            yield from lines
    except UnicodeDecodeError as error:
        at = f"0x{error.object[error.start]:02x}"
        raise ConfigError(f"{str(file)!r} is not UTF-8 text: {error.reason}, {at}") from error
    except OSError as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error.strerror}") from error
