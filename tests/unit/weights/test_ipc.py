"""The form in which the learner's memory is shown to an engine on the same GPU; the memory itself needs one."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

from s2w.weights.backends import IPC, NCCL, SHARED_MEMORY, backend_of
from s2w.weights.stream import CheckpointTensor
from s2w.weights.transfer import TRANSFERS, described, exported


def test_views_are_what_torch_rebuilds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each argument is where ``rebuild_cuda_tensor`` takes it, and the memory is exported once."""
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    exports: list[torch.Tensor] = []

    def reduce_tensor(tensor: torch.Tensor) -> tuple[Any, tuple[str, ...]]:
        exports.append(tensor)
        return reductions.rebuild_cuda_tensor, tuple(f"the memory's {name}" for name in names)

    monkeypatch.setattr(reductions, "reduce_tensor", reduce_tensor)
    memory = torch.arange(64, dtype=torch.uint8)
    views = [memory[8:32].view(torch.float32).view(2, 3), memory[32:48].view(torch.bfloat16).view(8)]
    found = [dict(zip(names, arguments, strict=True)) for arguments in exported(memory, views)]
    assert len(exports) == 1
    for arguments, view in zip(found, views, strict=True):
        own = {
            "tensor_size": tuple(view.shape), "tensor_stride": view.stride(),
            "tensor_offset": view.storage_offset(), "dtype": view.dtype,
        }  # fmt: skip
        assert arguments == {name: own.get(name, f"the memory's {name}") for name in names}
        # As torch does it with the storage that it has opened.
        storage = torch.storage.TypedStorage(wrap_storage=memory.untyped_storage(), dtype=view.dtype, _internal=True)
        rebuilt = torch._utils._rebuild_tensor(storage, own["tensor_offset"], own["tensor_size"], own["tensor_stride"])
        assert torch.equal(rebuilt, view)
    # vLLM replaces the device by its own here.
    assert names.index("storage_device") == 6


def test_vllm_takes_the_update() -> None:
    tensors = [CheckpointTensor("a", torch.bfloat16, (2, 3)), CheckpointTensor("b", torch.float32, (4,))]
    info = IPCWeightTransferUpdateInfo(**described(tensors), ipc_handles=[{"GPU": ()}] * 2)
    assert (info.names, info.dtype_names, info.shapes) == (["a", "b"], ["bfloat16", "float32"], [[2, 3], [4]])


def test_the_backend_follows_the_device_and_the_share_of_it() -> None:
    assert [backend_of("cpu", 0.5), backend_of("cuda", 1), backend_of("cuda", 0.5)] == [SHARED_MEMORY, NCCL, IPC]
    assert set(TRANSFERS) == {SHARED_MEMORY, NCCL, IPC}
