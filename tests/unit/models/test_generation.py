"""generation_config.json: where responses end and how they are sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_checkpoint
from transformers import GenerationConfig

from s2w.models.checkpoint import read_checkpoint
from s2w.models.generation import generation_config, recommended_sampling
from s2w.records import Sampling

DOCUMENT_END, TURN_END = 506, 508
RUN = Sampling(1.0, 0.9, -1)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models"), "tied", 0)


def written(directory: Path, values: dict[str, Any] | None, sampling: Sampling = RUN) -> dict[str, Any]:
    """The file of a student whose base's file has ``values``, as transformers reads it too."""
    path = directory / "generation_config.json"
    path.unlink(missing_ok=True)
    if values is not None:
        path.write_text(json.dumps(values))
    text = generation_config(read_checkpoint(str(directory)), sampling)
    (directory / "made.json").write_text(text)
    read = GenerationConfig.from_pretrained(directory, "made.json")
    assert {name: getattr(read, name) for name in json.loads(text)} == json.loads(text)
    (directory / "made.json").unlink()
    return json.loads(text)


def test_a_base_model_whose_own_end_is_that_of_a_document(tied: Path) -> None:
    made = written(tied, {"eos_token_id": DOCUMENT_END, "do_sample": False, "max_new_tokens": 2048})
    assert made["eos_token_id"] == [TURN_END, DOCUMENT_END]
    assert made["pad_token_id"] == DOCUMENT_END
    assert made["max_new_tokens"] == 2048
    # It says nothing of sampling, so the run's own holds; 0 keeps every token.
    assert (made["do_sample"], made["temperature"], made["top_p"], made["top_k"]) == (True, 1.0, 0.9, 0)


def test_what_the_base_says_of_sampling_stays(tied: Path) -> None:
    qwen3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    made = written(tied, {**qwen3, "eos_token_id": [TURN_END, DOCUMENT_END], "_from_model_config": True})
    assert made == {**qwen3, "eos_token_id": [TURN_END, DOCUMENT_END], "pad_token_id": DOCUMENT_END}


def test_without_a_file_and_greedy(tied: Path) -> None:
    assert written(tied, None, Sampling(0.0, 1.0, -1)) == {
        "do_sample": False, "eos_token_id": TURN_END, "pad_token_id": DOCUMENT_END,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "think", "no_think"),
    [
        # A hybrid Qwen3's file has the values of think mode alone.
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, Sampling(0.6, 0.95, 20), Sampling(0.7, 0.8, 20)),
        ({"temperature": 0.5, "top_p": 0.9}, Sampling(0.5, 0.9, -1), Sampling(0.5, 0.9, -1)),
        ({"top_k": 0, "do_sample": True}, Sampling(1.0, 1.0, -1), Sampling(1.0, 1.0, -1)),
        ({"do_sample": False}, Sampling(0.6, 0.95, 20), Sampling(0.7, 0.8, 20)),
    ],
)
def test_recommended_sampling(tied: Path, values: dict[str, Any], think: Sampling, no_think: Sampling) -> None:
    (tied / "generation_config.json").write_text(json.dumps(values))
    checkpoint = read_checkpoint(str(tied))
    assert recommended_sampling(checkpoint, "think") == think
    assert recommended_sampling(checkpoint, "no_think") == no_think
