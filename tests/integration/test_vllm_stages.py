"""What vLLM's own code tells about a start, and transformers', on a checkpoint of several shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import make_checkpoint, make_model

from s2w.actors import bars, stages
from s2w.learner.student_model import load_student


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("stages") / "sharded", "untied", 1)
    (path / "model.safetensors").unlink()
    make_model("untied", 1).save_pretrained(path, max_shard_size="700KB")
    assert len(list(path.glob("model-*.safetensors"))) == 3
    return path


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Stages as this process, an actor, enters them."""
    monkeypatch.setattr(stages, "_file", None)
    monkeypatch.setenv("S2W_STAGE_BOARD", "")
    stages.open_board()
    seen: list[str] = []
    enter = stages.enter

    def telling(name: str, detail: str = "") -> None:
        enter(name, detail)
        stage = stages.current()
        seen.append(f"{stage.name}, {stage.detail}")

    monkeypatch.setattr(stages, "enter", telling)
    bars.report()
    yield seen
    assert stages._file is not None
    os.close(stages._file)


def test_vllm_tells_the_shard_that_it_loads(sharded: Path, told: list[str]) -> None:
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    names = [name for name, _ in safetensors_weights_iterator(list(map(str, sharded.glob("*.safetensors"))), True)]
    assert len(names) == len(set(names)) > 20
    assert told == [f"loading weights, shard {i} of 3" for i in (1, 2, 3)]


def test_transformers_tells_the_tensor_that_it_loads(sharded: Path, told: list[str]) -> None:
    student = load_student(sharded, torch.float32, "sdpa", None)
    count = len(student.state_dict())
    assert told == [f"loading weights, tensor {i} of {count}" for i in range(1, count + 1)]
