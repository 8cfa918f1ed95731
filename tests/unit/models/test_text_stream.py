"""Text of a response while it grows: every split of its tokens gives the same pieces as the whole."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import make_tokenizer
from transformers import PreTrainedTokenizerFast

from s2w.models.modes import split_thinking
from s2w.models.text_stream import TextStream
from s2w.records import Mode

OPENING = (
    "{{ messages[0].content }}{% if enable_thinking %}{{ '<think>\n' }}{% else %}{{ '<think>\n\n</think>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def streamed(tokenizer: PreTrainedTokenizerFast, text: str, mode: Mode, step: int) -> tuple[str, str]:
    """Thinking and answer, from ``step`` more tokens at a time."""
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    stream = TextStream(tokenizer, mode)
    pieces = [piece for end in range(step, len(ids), step) for piece in stream.read(ids[:end])]
    pieces += stream.read(ids, last=True)
    parts = {
        thinking: "".join(piece.text for piece in pieces if piece.thinking is thinking) for thinking in (True, False)
    }
    return parts[True], parts[False]


@pytest.mark.parametrize(
    "text",
    [
        "<think>\n2 + 3:\n\n  five.\n</think>\n\nThe answer\nis 5.<|im_end|>",
        "<think>\n\n</think>\n\n5",
        "<think>\nnever closed  \n",
        "no block, a < b, <thin, and a trailing <thi",
        "<think>a</think>b <think>c</think> d",
        "\n\n 日本語 and é \U0001f600 \n",
        "",
    ],
)
@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_pieces_are_those_of_the_whole(tokenizer: PreTrainedTokenizerFast, text: str, step: int) -> None:
    whole = split_thinking(text.removesuffix("<|im_end|>"), "think")
    assert streamed(tokenizer, text, "think", step) == (whole.thinking, whole.answer)


def test_a_prompt_that_opens_the_think_block() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = OPENING
    assert streamed(tokenizer, "two and two\n</think>\n\n4", "think", 1) == ("two and two", "4")
    assert streamed(tokenizer, "4", "no_think", 1) == ("", "4")


def test_what_is_known_is_shown_at_once_and_once(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = np.asarray(tokenizer("<think>\nfive of them", add_special_tokens=False)["input_ids"], np.int32)
    stream = TextStream(tokenizer, "think")
    assert [stream.read(ids[:end]) for end in (1, 2)] == [[], []]  # a tag, and a line break before the first word
    shown = [piece.text for end in range(3, len(ids) + 1) for piece in stream.read(ids[:end])]
    assert "".join(shown) == "five of them" and len(shown) > 3
    # An engine that aborted a response begins it anew.
    assert stream.read(ids[:4]) == [] and stream.read(ids) == []
