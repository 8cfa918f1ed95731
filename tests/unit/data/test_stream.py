"""Prompts streamed in a repeatable order, and their modes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from s2w.data.stream import PromptStream, ThinkRatio
from s2w.errors import ConfigError
from s2w.records import Prompt


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"t/train/{i}", (), np.zeros(1, np.int32), "think", 0) for i in range(count)]


def draw(stream: PromptStream, batches: int) -> list[tuple[str, int]]:
    return [(prompt.uid, prompt.seed) for _ in range(batches) for prompt in stream.next_batch()]


@pytest.mark.parametrize("batch", [1, 4, 7, 10, 23])
def test_every_prompt_once_an_epoch(batch: int) -> None:
    drawn = draw(PromptStream(prompts(10), batch, seed=1), 30)
    for start in range(0, len(drawn) - 9, 10):
        assert len({uid for uid, _ in drawn[start : start + 10]}) == 10
    assert len({seed for _, seed in drawn}) == len(drawn)
    assert [uid for uid, _ in drawn[:10]] != [uid for uid, _ in drawn[10:20]]


def test_stream_repeats_and_resumes_anywhere() -> None:
    whole = draw(PromptStream(prompts(10), 4, seed=1), 12)
    assert draw(PromptStream(prompts(10), 4, seed=1), 12) == whole
    assert draw(PromptStream(prompts(10), 4, seed=2), 12) != whole
    for batches in range(12):
        stream = PromptStream(prompts(10), 4, seed=1)
        draw(stream, batches)
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = PromptStream(prompts(10), 4, seed=1, state=state)
        assert resumed.epoch == 4 * batches // 10
        assert draw(resumed, 12 - batches) == whole[4 * batches :]


def test_batch_size_may_change_on_resume() -> None:
    stream = PromptStream(prompts(10), 4, seed=1)
    draw(stream, 1)
    resumed = PromptStream(prompts(10), 3, seed=1, state=stream.state_dict())
    assert draw(resumed, 2) == draw(stream, 2)[:6]


def both(count: int, fixed: int = 0) -> tuple[list[Prompt], list[Prompt]]:
    """The same prompts without and with thinking; the first ``fixed`` say their mode, no_think."""
    plain = [Prompt(f"t/train/{i}", (), np.zeros(1, np.int32), "no_think", 0) for i in range(count)]
    thinking = [prompt if i < fixed else replace(prompt, mode="think") for i, prompt in enumerate(plain)]
    return plain, thinking


def mixed(count: int, batch: int, first: float, last: float, steps: int, fixed: int = 0) -> PromptStream:
    plain, thinking = both(count, fixed)
    return PromptStream(plain, batch, seed=1, ratio=ThinkRatio(first, last, steps, thinking))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_think_ratio(ratio: float) -> None:
    """The nearest whole number of prompts in each batch, the ratio itself over many; a prompt's mode is not fixed."""
    stream = mixed(50, 8, ratio, ratio, 1)
    batches = [stream.next_batch() for _ in range(200)]
    counts = [sum(prompt.mode == "think" for prompt in batch) for batch in batches]
    assert set(counts) <= {int(8 * ratio), min(8, int(8 * ratio) + 1)}
    # The rounding of a batch has a deviation of at most 1/2 prompt.
    assert abs(sum(counts) / 1600 - ratio) < 4 * 0.5 / 8 / 200**0.5
    modes = {(prompt.uid, prompt.mode) for batch in batches for prompt in batch}
    assert len(modes) == (50 if ratio in (0, 1) else 100)


def test_think_ratio_leaves_prompts_that_say_their_mode() -> None:
    stream = mixed(10, 10, 1.0, 1.0, 1, fixed=4)
    assert Counter(prompt.mode for prompt in stream.next_batch()) == {"think": 6, "no_think": 4}


def test_think_ratio_follows_its_schedule_and_resumes() -> None:
    stream = mixed(1000, 100, 0.2, 0.8, 4)
    counts = [sum(prompt.mode == "think" for prompt in stream.next_batch()) for _ in range(6)]
    assert counts == [pytest.approx(share, abs=1) for share in (20, 40, 60, 80, 80, 80)]
    again = mixed(1000, 100, 0.2, 0.8, 4)
    first = [again.next_batch() for _ in range(2)]
    resumed = mixed(1000, 100, 0.2, 0.8, 4)
    resumed.load_state_dict(json.loads(json.dumps(again.state_dict())))
    assert len(first) == 2
    for _ in range(3):
        assert [(p.uid, p.mode, p.seed) for p in resumed.next_batch()] == [
            (p.uid, p.mode, p.seed) for p in again.next_batch()
        ]


def test_stream_refuses_another_runs_state() -> None:
    state = PromptStream(prompts(10), 4, seed=1).state_dict()
    for other, seed in ((prompts(11), 1), (prompts(10), 2), (prompts(10)[::-1], 1)):
        with pytest.raises(ConfigError, match="the checkpoint's prompts are not those of this run"):
            PromptStream(other, 4, seed, state)
    with pytest.raises(ConfigError, match="no training prompts"):
        PromptStream([], 4, seed=1)
