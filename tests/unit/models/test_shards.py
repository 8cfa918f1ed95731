"""Weight files of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import Kind, make_checkpoint
from transformers import AutoModelForCausalLM

from s2w.learner import checkpoint
from s2w.models.shards import write_weights
from s2w.weights.stream import CheckpointStream


@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_shards_load_as_those_of_save_pretrained(tmp_path: Path, kind: Kind) -> None:
    source = make_checkpoint(tmp_path / "source", kind, seed=3)
    model = AutoModelForCausalLM.from_pretrained(source)
    stream = CheckpointStream(model, lambda: ((n, p.data) for n, p in model.named_parameters()), torch.float32)
    for limit, shards in ((10**9, 1), (300_000, 3)):
        directory = tmp_path / str(limit)
        directory.mkdir()
        write_weights(directory, stream, limit)
        checkpoint.write_texts(directory, model, source)
        assert len(list(directory.glob("model*.safetensors"))) >= shards
        files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
        written = {name: tensor for file in files for name, tensor in file.items()}
        expected = load_file(source / "model.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], expected[name]) for name in expected)
        loaded = AutoModelForCausalLM.from_pretrained(directory)
        ids = torch.arange(3, 40)[None]
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not list(tmp_path.glob("*/*.partial"))
