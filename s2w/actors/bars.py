"""Progress bars of the libraries in an actor, told as stages of its start (:mod:`s2w.actors.stages`)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm
from tqdm.std import tqdm as plain_tqdm

from s2w.actors import stages

BARS = (
    ("checkpoint shards", "loading weights", "shard "),
    ("loading shards", "loading weights", "shard "),
    ("loading weights", "loading weights", "tensor "),
    ("capturing cuda graphs", "capturing CUDA graphs", ""),
)
"""A part of a bar's description in lower case; the stage's name; what is counted. The first is vLLM's, rank 0 of an
engine has it, and so are the second (``enable_multithread_load``) and the last; the third is transformers'."""
MEGABYTES = 1e6


@functools.cache
def report() -> None:
    """Has every bar of this process that :data:`BARS` knows enter its stage with each item; idempotent.

    Such bars are what vLLM and transformers themselves say about a start, whatever loader they use.
    """
    items = plain_tqdm.__iter__

    @functools.wraps(items)
    def __iter__(bar: Any) -> Iterator[Any]:
        # A bar that is switched off has no description.
        title = (getattr(bar, "desc", None) or "").lower()
        known = next(((name, unit) for part, name, unit in BARS if part in title), None)
        return items(bar) if known is None else _told(items(bar), bar.total, *known)

    plain_tqdm.__iter__ = __iter__


def _told(items: Iterable[Any], total: int | None, name: str, unit: str) -> Iterator[Any]:
    for count, item in enumerate(items, 1):
        stages.enter(name, f"{unit}{count} of {total}" if total else f"{unit}{count}")
        yield item


def downloads(model: str) -> type[tqdm]:
    """A class of bars for ``huggingface_hub.snapshot_download`` that draw nothing and tell the download's stage."""
    seen: dict[str, Any] = {"files": None, "bytes": None}

    class Download(tqdm):
        """The hub makes one bar of files, one of bytes on disk, and one of bytes from the network."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            title = kwargs.get("desc") or ""
            super().__init__(*args, **(kwargs | {"disable": True}))
            for kind, start in (("files", "Fetching"), ("bytes", "Reconstructing")):
                if title.startswith(start):
                    seen[kind] = self

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0  # The base class does not count in a bar that is not shown.
            files, size = seen["files"], seen["bytes"]
            detail = f"{files.n} of {files.total} files" if files is not None and files.total else ""
            if size is not None and size.total:
                detail = f"{detail}, " if detail else ""
                detail += f"{size.n / MEGABYTES:,.0f} of {size.total / MEGABYTES:,.0f} MB"
            stages.enter(f"downloading {model}", detail)

    return Download
