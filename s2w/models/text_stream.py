"""A response's text as its tokens come: decoded piece by piece, thinking apart from the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from s2w.models.modes import THINK_CLOSE, THINK_OPEN, opens_thinking
from s2w.records import Mode

INCOMPLETE = "\ufffd"
"""What the bytes of a character decode to while some of them are missing."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text."""

    text: str
    thinking: bool
    """It is inside the think block; the tags are left out."""


class TextStream:
    """Decodes one response while it grows.

    The pieces of thinking and those of the answer are together what :func:`s2w.models.modes.split_thinking` makes of
    the whole, unless a think block is closed that was never opened.

    Args:
        mode: the prompt's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mode: Mode) -> None:
        self._tokenizer = tokenizer
        self._context = self._read = 0
        """Tokens from where on decoding is repeated, since a token's text may depend on the one before; tokens read."""
        self._splitter = _Splitter(thinking=mode == "think" and opens_thinking(tokenizer))

    def read(self, token_ids: np.ndarray, *, last: bool = False) -> list[Piece]:
        """What is new.

        Args:
            token_ids: int32 [n], all tokens so far.
            last: there will not be more.
        """
        if len(token_ids) <= self._read and not last:  # An engine has begun the response anew.
            return []
        before = self._decode(token_ids[self._context : self._read])
        text = self._decode(token_ids[self._context :])
        new = ""
        if last or not text.endswith(INCOMPLETE):
            new = text[len(before) :]
            self._context, self._read = self._read, max(self._read, len(token_ids))
        return list(self._splitter.split(new, last))

    def _decode(self, token_ids: np.ndarray) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


class _Splitter:
    """Splits growing text at the tags of its first think block.

    White space at the ends of a part is left out.
    """

    def __init__(self, thinking: bool) -> None:
        self._thinking = thinking
        self._over = False
        """The think block is closed: from here on tags are text."""
        self._pending = ""
        """The start of a tag, perhaps."""
        self._space: str | None = None
        """White space that belongs to a part if more of it follows; None at the start of a part."""

    def split(self, text: str, last: bool) -> Iterator[Piece]:
        text = self._pending + text
        while not self._over:
            tag = THINK_CLOSE if self._thinking else THINK_OPEN
            part, found, after = text.partition(tag)
            if not found:
                break
            yield from self._part(part)
            self._over, self._thinking, self._space, text = self._thinking, not self._thinking, None, after
        held = 0 if last or self._over else _overlap(text, THINK_CLOSE if self._thinking else THINK_OPEN)
        self._pending = text[len(text) - held :]
        yield from self._part(text[: len(text) - held])

    def _part(self, text: str) -> Iterator[Piece]:
        text = text.lstrip() if self._space is None else self._space + text
        kept = text.rstrip()
        if kept:
            self._space = text[len(kept) :]
            yield Piece(kept, self._thinking)
        elif self._space is not None:
            self._space = text


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of ``text`` that may be the start of ``tag``."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-size:])), 0)
