"""The teacher's responses on disk: Parquet shards with their provenance, each written completely or not at all.

Columns: ``uid``, ``mode`` and ``sample``; ``task``, ``answer`` and ``metadata`` (JSON) for the verifier; ``prompt``
(messages: role and content) and ``response`` (text); ``prompt_token_ids`` and ``response_token_ids`` (int32);
``finish_reason``. The file metadata holds the provenance as JSON under ``s2w``. A shard can also be used as a dataset
(``off_policy.path``, :mod:`s2w.teacher_data.dataset`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from s2w.errors import ConfigError
from s2w.records import Prompt
from s2w.teacher_data.response import Key, Response

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("mode", pa.string()),
        ("sample", pa.int32()),
        ("task", pa.string()),
        ("answer", pa.string()),
        ("metadata", pa.string()),
        ("prompt", pa.list_(MESSAGE)),
        ("response", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("response_token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
    ]
)
METADATA_KEY = b"s2w"
VOCABULARY = "vocabulary_sha256"
"""Name of :func:`vocabulary_hash` in the provenance: token ids have a meaning only in this vocabulary."""
SHARDS = "shard-*.parquet"
DROPPED = "dropped.parquet"
"""What the filters of a generation dropped; not part of a dataset."""


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's tokens and ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def response_files(path: Path) -> list[Path]:
    """The file, or the Parquet files of the directory, that ``off_policy.path`` names.

    Raises:
        ConfigError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"off_policy.path={path}: there is no such file or directory")
    files = [file for file in sorted(path.glob("*.parquet")) if file.name != DROPPED]
    if not files:
        raise ConfigError(f"off_policy.path={path}: the directory contains no .parquet file")
    return files


def provenance_of(path: Path) -> dict[str, Any]:
    """What a Parquet file says about its origin; empty if s2w did not write it."""
    metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata.get(METADATA_KEY, b"{}"))


class ShardStore:
    """The shards of one generation.

    Args:
        directory: created if missing.
        provenance: JSON values that the responses depend on.

    Raises:
        ConfigError: the directory holds responses with another provenance.
    """

    def __init__(self, directory: Path, provenance: dict[str, Any]) -> None:
        self.directory, self.provenance = directory, provenance
        directory.mkdir(parents=True, exist_ok=True)
        for path in self._paths():
            there = provenance_of(path)
            differing = sorted(
                name for name in there.keys() | provenance.keys() if there.get(name) != provenance.get(name)
            )
            if differing:
                name = differing[0]
                raise ConfigError(
                    f"{path} was generated with {name}={there.get(name)}, not {provenance.get(name)}: "
                    "choose another run.dir, or the settings of those responses"
                )

    def keys(self) -> set[Key]:
        """Keys of all responses that are there."""
        found: set[Key] = set()
        for path in self._paths():
            columns = pq.read_table(path, columns=["uid", "mode", "sample"]).to_pydict()
            found |= set(zip(columns["uid"], columns["mode"], columns["sample"], strict=True))
        return found

    def add(self, responses: Sequence[Response]) -> Path:
        """Writes one shard; returns its path."""
        paths = self._paths()
        number = int(paths[-1].stem.removeprefix("shard-")) + 1 if paths else 0
        path = self.directory / f"shard-{number:06d}.parquet"
        write_responses(path, responses, self.provenance)
        return path

    def read(self, prompts: Iterable[Prompt], samples: int) -> list[Response]:
        """The first ``samples`` responses to each of ``prompts``, in that order, however they are stored."""
        by_key = {(prompt.uid, prompt.mode): (i, prompt) for i, prompt in enumerate(prompts)}
        found: list[tuple[int, Response]] = []
        columns = ["uid", "mode", "sample", "response", "response_token_ids", "finish_reason"]
        for path in self._paths():
            table = pq.read_table(path, columns=columns)
            token_ids = table["response_token_ids"]
            for number, row in enumerate(table.drop_columns("response_token_ids").to_pylist()):
                position, prompt = by_key.get((row["uid"], row["mode"]), (-1, None))
                if prompt is not None and row["sample"] < samples:
                    ids = token_ids[number].values.to_numpy()
                    response = Response(prompt, row["sample"], ids, row["response"], row["finish_reason"])
                    found.append((position, response))
        found.sort(key=lambda pair: (pair[0], pair[1].sample))
        return [response for _, response in found]

    def _paths(self) -> list[Path]:
        return sorted(self.directory.glob(SHARDS))


def write_responses(
    path: Path, responses: Sequence[Response], provenance: dict[str, Any], reasons: Sequence[str] | None = None
) -> None:
    """Writes a Parquet file under a temporary name and renames it; ``reasons`` become a further column ``reason``."""
    columns: dict[str, Any] = {
        "uid": [response.prompt.uid for response in responses],
        "mode": [response.prompt.mode for response in responses],
        "sample": [response.sample for response in responses],
        "task": [response.prompt.task for response in responses],
        "answer": [response.prompt.answer for response in responses],
        "metadata": [json.dumps(response.prompt.metadata, default=str) for response in responses],
        "prompt": [list(response.prompt.messages) for response in responses],
        "response": [response.text for response in responses],
        "prompt_token_ids": [response.prompt.token_ids for response in responses],
        "response_token_ids": [response.token_ids for response in responses],
        "finish_reason": [response.finish_reason for response in responses],
    }
    schema = SCHEMA
    if reasons is not None:
        columns["reason"] = list(reasons)
        schema = schema.append(pa.field("reason", pa.string()))
    schema = schema.with_metadata({METADATA_KEY: json.dumps(provenance, sort_keys=True).encode()})
    partial = path.with_suffix(".partial")
    pq.write_table(pa.table(columns, schema=schema), partial, compression="zstd")
    partial.replace(path)
