"""Which replica of a teacher scores a response."""

from __future__ import annotations

import numpy as np

from s2w.records import Prompt, Rollout, VersionSpan
from s2w.teacher.pool import Dispatcher


def rollout(uid: str, sample: int, prompt: int, response: int) -> Rollout:
    taken = Prompt(uid, (), np.zeros(prompt, np.int32), "think", 0)
    ids, log_probs = np.zeros(response, np.int32), np.zeros(response, np.float32)
    return Rollout(taken, sample, ids, log_probs, (VersionSpan(0, response, 0),), "stop", 0, 0, 0)


def test_samples_of_a_prompt_stay_together_until_their_queue_outgrows_the_prompt():
    dispatcher = Dispatcher()
    # Replica 0 takes the prompt (100 + 60 tokens). Then it has 160 + 60 to do, against 0 + 160 at replica 1.
    assert dispatcher.assign(rollout("a", 0, 100, 60), [0, 1]) == (0, 160)
    assert dispatcher.assign(rollout("a", 1, 100, 60), [0, 1]) == (1, 160)
    dispatcher.release(1, 160)
    dispatcher.release(0, 160)
    # Both hold the prompt now; a prompt that none holds goes where less waits.
    assert dispatcher.assign(rollout("a", 2, 100, 60), [0, 1]) == (0, 60)
    assert dispatcher.assign(rollout("b", 0, 10, 10), [0, 1]) == (1, 20)
    # Holder 1 has 20 waiting, and the prompt of b is 10: 20 + 10 there, 60 + 20 elsewhere.
    assert dispatcher.assign(rollout("b", 1, 10, 10), [0, 1]) == (1, 10)


def test_a_replaced_replica_holds_no_prefix_and_a_dead_one_gets_nothing():
    dispatcher = Dispatcher()
    index, tokens = dispatcher.assign(rollout("a", 0, 100, 1), [0, 1])
    dispatcher.release(index, tokens)
    assert dispatcher.assign(rollout("a", 1, 100, 1), [1]) == (1, 101)
    dispatcher.forget(0)
    assert dispatcher.assign(rollout("a", 2, 100, 1), [0]) == (0, 101)
