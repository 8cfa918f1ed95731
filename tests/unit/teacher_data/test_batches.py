"""Batches of the teacher's responses: what is held out, and the order of the rest."""

from __future__ import annotations

from collections import Counter

import pytest
from teacher_responses import response

from s2w.errors import ConfigError
from s2w.teacher_data.batches import ResponseStream, split


def test_held_out_prompts_are_not_trained_on() -> None:
    responses = [
        response(f"answer {i} {sample}", question=f"{i}?", mode=mode, sample=sample)
        for i in range(10)
        for mode in ("think", "no_think")
        for sample in range(2)
    ]
    parts = split(responses, 6, seed=0)
    assert len(parts.heldout) == 8 and len(parts.train) == 32
    assert not {r.prompt.uid for r in parts.heldout} & {r.prompt.uid for r in parts.train}
    assert [r.key for r in split(responses, 6, seed=0).train] == [r.key for r in parts.train]
    assert split(responses, 0, seed=0).heldout == []
    with pytest.raises(ConfigError, match=r"off_policy\.heldout_responses=37 leaves none of 40 responses"):
        split(responses, 37, seed=0)


def test_every_response_is_in_every_epoch_once() -> None:
    responses = [response(f"answer {i}", question=f"{i}?") for i in range(10)]
    stream = ResponseStream(responses, 4, seed=3)
    used = [r.prompt.uid for step in range(5) for r in stream.batch(step)]
    assert Counter(used[:10]) == Counter(used[10:]) == Counter(r.prompt.uid for r in responses)
    assert used[:10] != used[10:]
    # A batch is a function of its number alone, so a resumed run needs nothing but that.
    assert [r.key for r in ResponseStream(responses, 4, seed=3).batch(3)] == [r.key for r in stream.batch(3)]
    assert stream.fingerprint() == ResponseStream(list(responses), 4, seed=3).fingerprint()
    assert stream.fingerprint() != ResponseStream(responses[::-1], 4, seed=3).fingerprint()
    assert stream.fingerprint() != ResponseStream([*responses[:9], response("other", "9?")], 4, seed=3).fingerprint()
