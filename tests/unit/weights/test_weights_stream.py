"""The stream of checkpoint tensors and the shared-memory segment that carries it; no engines."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from memory_segments import open_segments
from safetensors.torch import load_file
from tiny_models import KINDS, Kind, make_checkpoint, make_model
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from s2w.weights.shm import ALIGNMENT, Segment, read_segment
from s2w.weights.stream import CheckpointStream
from s2w.weights.transfer import SharedMemoryTransfer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded", [True, False], ids=["from_pretrained", "from_config"])
def test_stream_equals_saved_checkpoint(kind: Kind, loaded: bool, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, kind, seed=0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) if loaded else make_model(kind, seed=0)
    saved = load_file(path / "model.safetensors")
    stream = CheckpointStream(model, model.named_parameters, torch.float32)
    streamed = {name: tensor.clone() for name, tensor in stream}
    assert streamed.keys() == saved.keys()
    assert all(torch.equal(streamed[name], saved[name]) for name in saved)
    declared = {tensor.name: tensor.shape for tensor in stream.metadata()}
    assert declared == {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert stream.nbytes == sum(tensor.nbytes for tensor in saved.values())


def test_stream_casts_to_the_engines_dtype() -> None:
    model = make_model("moe", seed=0)
    stream = CheckpointStream(model, model.named_parameters, torch.bfloat16)
    reference = dict(CheckpointStream(model, model.named_parameters, torch.float32))
    for name, tensor in stream:
        assert torch.equal(tensor, reference[name].to(torch.bfloat16)), name


def test_stream_refuses_another_order_and_a_short_pass() -> None:
    model = make_model("tied", seed=0)
    pairs = list(model.named_parameters())
    with pytest.raises(ValueError, match="not the next one"):
        list(CheckpointStream(model, lambda: [pairs[1], pairs[0], *pairs[2:]], torch.float32))
    with pytest.raises(ValueError, match=r"ended before model\.norm\.weight"):
        list(CheckpointStream(model, lambda: pairs[:-1], torch.float32))


def test_stream_refuses_parameters_that_a_checkpoint_merges() -> None:
    """As for a model whose checkpoints keep gate and up projection in one tensor (Phi-3, GLM)."""
    model = make_model("tied", seed=0)
    halves = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    converter = WeightConverter("mlp.gate_up_proj.weight", halves, [Chunk(dim=0)])
    object.__setattr__(model, "_weight_conversions", [converter])
    with pytest.raises(ValueError, match=r"mlp\.\w+_proj\.weight cannot be sent by itself"):
        CheckpointStream(model, model.named_parameters, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segment_round_trip(dtype: torch.dtype) -> None:
    model = make_model("moe", seed=1)
    stream = CheckpointStream(model, model.named_parameters, dtype)
    segment = Segment(stream.metadata())
    segment.write(stream)
    assert all(offset % ALIGNMENT == 0 for _, _, _, offset in segment.info["tensors"])
    info = segment.info
    read = dict(read_segment(info))
    del segment
    # Views outlive the segment; writing to them is private.
    assert [name for name, _ in stream] == list(read)
    for name, tensor in stream:
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor), name
    with pytest.raises(FileNotFoundError, match="on one node"):
        read_segment(info)


def test_all_swaps_use_the_same_memory() -> None:
    model = make_model("tied", seed=0)
    fail = False

    def parameters() -> Iterator[tuple[str, torch.Tensor]]:
        yield from islice(model.named_parameters(), 1 if fail else None)
        if fail:
            raise ConnectionError("a rank is gone")

    before = open_segments()
    transfer = SharedMemoryTransfer(CheckpointStream(model, parameters, torch.float32), rank=0)
    first = transfer.prepare({0: 1})
    fail = True
    with pytest.raises(ConnectionError):
        transfer.prepare({0: 1})
    fail = False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    again = transfer.prepare({0: 1})
    assert again == first
    assert again is not None
    assert open_segments() == before + 1
    for (name, value), parameter in zip(read_segment(again.info["segment"]), model.parameters(), strict=True):
        assert torch.equal(value, parameter), name
    del transfer, value  # what was read keeps the memory too
    gc.collect()  # the error above is part of a cycle
    assert open_segments() == before


def test_other_ranks_take_part_in_gathering_and_send_nothing() -> None:
    model = make_model("tied", seed=0)
    gathered = []

    def parameters() -> Iterator[tuple[str, torch.Tensor]]:
        for name, _ in model.named_parameters():
            gathered.append(name)
            yield name, torch.empty(0)  # ZeRO-3: valid on rank 0 only.

    assert SharedMemoryTransfer(CheckpointStream(model, parameters, torch.float32), rank=1).prepare({0: 1}) is None
    assert gathered == [name for name, _ in model.named_parameters()]
