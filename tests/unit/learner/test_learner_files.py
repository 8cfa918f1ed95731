"""Directories of checkpoints, the learning-rate schedule and packing, without ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import ray

from s2w.config.schema import LearnerConfig
from s2w.learner import checkpoint
from s2w.learner.schedule import learning_rate
from s2w.learner.worker import pack
from s2w.records import Prompt, Rollout, Scored, TeacherSignal


def test_commit_keeps_the_last_and_hides_the_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.latest(tmp_path) is None
    for step in (1, 2, 30):
        partial = checkpoint.begin(tmp_path, step)
        (partial / "weights").write_text(str(step))
        assert checkpoint.latest(tmp_path) != checkpoint.step_dir(tmp_path, step)
        checkpoint.commit(partial, {"step": step}, keep=2)
        assert checkpoint.read_state(checkpoint.latest(tmp_path) or tmp_path) == {"step": step}
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000002", "step_000030"]

    # A save that dies leaves the last checkpoint in place, and its rest is cleared by the next one.
    (checkpoint.begin(tmp_path, 31) / "weights").write_text("half")
    assert checkpoint.latest(tmp_path) == checkpoint.step_dir(tmp_path, 30)
    partial = checkpoint.begin(tmp_path, 32)
    assert list(tmp_path.glob("*.partial")) == [partial] and list(partial.iterdir()) == []

    # A deletion that dies leaves nothing that is taken for a checkpoint.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        checkpoint.commit(partial, {"step": 32}, keep=1)
    assert checkpoint.latest(tmp_path) == checkpoint.step_dir(tmp_path, 32)
    assert not checkpoint.step_dir(tmp_path, 2).exists()
    checkpoint.commit(checkpoint.begin(tmp_path, 33), {"step": 33}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000033"]


def killed(path: Path) -> None:
    """A deletion that ends after its first file."""
    next(path.iterdir()).unlink()
    raise KeyboardInterrupt


def test_schedule() -> None:
    config = LearnerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine", min_lr_ratio=0.2)
    rates = [learning_rate(config, step, 15) for step in range(16)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[9] == pytest.approx(0.6)  # halfway between steps 4 and 14
    assert rates[14] == rates[15] == pytest.approx(0.2)
    assert sorted(rates[4:], reverse=True) == rates[4:]
    config.schedule = "constant"
    assert [learning_rate(config, step, 15) for step in (3, 4, 14)] == [1.0, 1.0, 1.0]


def test_pack_points_at_the_rows_before_each_response_token() -> None:
    samples = []
    for prompt_ids, response in (([5, 6, 7], [8, 9]), ([10], [11, 12, 13])):
        prompt = Prompt("p", (), np.array(prompt_ids, np.int32), "think", 0)
        ids = np.array(response, np.int32)
        rollout = Rollout(prompt, 0, ids, np.zeros(len(ids), np.float32), (), "stop", 0, 0.0, 0.0)
        samples.append(Scored(rollout, TeacherSignal("hidden", len(ids), ray.ObjectRef.nil(), 0, 0, 0.0, 0.0, 0)))
    tokens = pack(samples)
    assert tokens.input_ids.tolist() == [[5, 6, 7, 8], [10, 11, 12, 0]]
    assert tokens.targets.tolist() == [8, 9, 11, 12, 13]
    # Each row holds the token just before its target.
    assert tokens.input_ids.flatten()[tokens.rows].tolist() == [7, 8, 10, 11, 12]
