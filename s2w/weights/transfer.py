"""The learner's side of a swap: how each rank takes part in moving the weights to the engines.

Every learner rank holds one :class:`Transfer`; :func:`s2w.weights.publish.publish` calls the same method on all ranks,
because gathering sharded weights is collective. Only rank 0 sends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.multiprocessing import reductions

from s2w.weights import backends, shm
from s2w.weights.stream import CheckpointStream, CheckpointTensor

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

BUCKET_BYTES = 1 << 28
"""Bytes that are broadcast at once; two buckets are in flight. A parameter larger than this has its own bucket."""


@dataclass(frozen=True)
class Update:
    """What rank 0 announces to the engines."""

    info: dict[str, Any]
    """``update_info`` of vLLM's ``update_weights``."""
    nbytes: int
    connect: dict[int, dict[str, Any]] = field(default_factory=dict)
    """``init_info`` of each engine that must connect first, by engine number."""


class Transfer(ABC):
    """One learner rank's part; methods are called in the order prepare, connect (if asked for), send.

    Args:
        stream: the weights.
        rank: this process's among the learner's ranks.
    """

    backend: str
    """Name of vLLM's weight-transfer backend, for the engines' ``WeightTransferConfig``."""

    def __init__(self, stream: CheckpointStream, rank: int) -> None:
        self.stream, self.rank = stream, rank

    @abstractmethod
    def prepare(self, workers: dict[int, int]) -> Update | None:
        """Does what can be done while the engines still generate; None on ranks other than 0.

        Args:
            workers: worker processes (tensor x pipeline parallel) of each engine, by engine number.
        """

    @abstractmethod
    def connect(self) -> None:
        """Connects to the engines; they connect at the same time."""

    @abstractmethod
    def send(self) -> None:
        """Sends the weights; the engines receive at the same time."""


class SharedMemoryTransfer(Transfer):
    """CPU: the weights are written to memory that the engines of the same node map.

    Gathering and writing come before the engines stop. One copy of the weights, in the engines' dtype, stays from the
    first swap on: allocating new memory for each would cost several times as much as the copy.
    """

    backend = backends.SHARED_MEMORY
    _segment: shm.Segment | None = None

    def prepare(self, workers: dict[int, int]) -> Update | None:
        if self.rank != 0:
            self.stream.drain()
            return None
        if self._segment is None:
            self._segment = shm.Segment(self.stream.metadata())
        self._segment.write(self.stream)
        return Update({"segment": self._segment.info}, self.stream.nbytes)

    def connect(self) -> None: ...

    def send(self) -> None: ...


class NcclTransfer(Transfer):
    """GPU: broadcast from rank 0 to every worker of every engine, by vLLM's own NCCL backend.

    Not run on a GPU yet. Weights are gathered parameter by parameter while they are broadcast in buckets, so no
    rank holds the whole model; the engines are paused for that long. Learner and engines have their own GPUs: NCCL
    refuses two ranks on one.
    """

    backend = backends.NCCL
    _engine: NCCLTrainerWeightTransferEngine | None = None
    _connected: dict[int, int] | None = None
    """Engines that the communicator spans; None until a swap over it has succeeded."""
    _workers: dict[int, int] | None = None
    """Engines of the swap in progress."""
    _address: tuple[str, int] | None = None

    def prepare(self, workers: dict[int, int]) -> Update | None:
        if self.rank != 0:
            return None
        connect = {} if workers == self._connected else self._plan(workers)
        return Update(described(self.stream.metadata()), self.stream.nbytes, connect)

    def _plan(self, workers: dict[int, int]) -> dict[int, dict[str, Any]]:
        """Ranks in the new communicator: this process is 0, then the workers of one engine after the other."""
        from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
        from vllm.utils.network_utils import get_ip, get_open_port

        self._connected = None
        self._workers, self._address = dict(workers), (get_ip(), get_open_port())
        plans, offset = {}, 1
        for engine, count in workers.items():
            plan = NCCLWeightTransferInitInfo(
                master_address=self._address[0],
                master_port=self._address[1],
                rank_offset=offset,
                world_size=1 + sum(workers.values()),
                packed=True,
                packed_buffer_size_bytes=BUCKET_BYTES,
            )
            plans[engine] = worker_init_payload(plan)
            offset += count
        return plans

    def connect(self) -> None:
        if self.rank != 0:
            return
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        assert self._workers is not None and self._address is not None
        if self._engine is not None:
            self._engine.shutdown()
        address, port = self._address
        self._engine = NCCLTrainerWeightTransferEngine.trainer_init(
            NCCLTrainerInitInfo(address, port, 1 + sum(self._workers.values()), True, BUCKET_BYTES, rank=0),
            client=_NoClient(),
            source=cast(Any, self.stream),  # Has both parts of vLLM's WeightSource interface.
        )

    def send(self) -> None:
        if self.rank != 0:
            self.stream.drain()
            return
        assert self._engine is not None
        # A connection that failed on either side, or a broken broadcast, leaves a useless communicator: the next swap
        # makes another.
        self._connected = None
        self._engine.send_weights()
        self._connected = self._workers


class _NoClient:
    """vLLM's trainer can drive the engines itself; here ``publish`` does, so that it can time and repair a swap."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class IpcTransfer(Transfer):
    """One GPU: the engines map a copy of the weights that rank 0 keeps there, by vLLM's CUDA IPC backend.

    Like :class:`SharedMemoryTransfer`: gathering and writing come before the engines stop, and the copy, in the
    engines' dtype, stays from the first swap on. Not run on a GPU yet.
    """

    backend = backends.IPC
    _copy: list[torch.Tensor] | None = None
    _handles: list[dict[str, Any]] | None = None
    """For each tensor the arguments of torch's ``rebuild_cuda_tensor``, by the id by which vLLM picks its own GPU."""

    def prepare(self, workers: dict[int, int]) -> Update | None:
        if self.rank != 0:
            self.stream.drain()
            return None
        metadata = self.stream.metadata()
        if self._copy is None:
            offsets, size = shm.place(metadata)
            memory = torch.empty(size, dtype=torch.uint8, device="cuda")
            self._copy = [
                memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                for tensor, offset in zip(metadata, offsets, strict=True)
            ]
            gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            self._handles = [{gpu: handle} for handle in exported(memory, self._copy)]
        for target, (_, value) in zip(self._copy, self.stream, strict=True):
            target.copy_(value)
        torch.cuda.synchronize()
        return Update({**described(metadata), "ipc_handles": self._handles}, self.stream.nbytes)

    def connect(self) -> None: ...

    def send(self) -> None: ...


def exported(memory: torch.Tensor, views: Sequence[torch.Tensor]) -> list[tuple[Any, ...]]:
    """Arguments of torch's ``rebuild_cuda_tensor`` for ``views`` of ``memory``, which lives as long as this process.

    The memory is exported once: torch wraps it anew at each export, and each wrapper would stay.
    """
    _, arguments = reductions.reduce_tensor(memory)
    cls, _, _, _, storage_cls, _, *rest = arguments
    return [
        (cls, tuple(view.shape), view.stride(), view.storage_offset(), storage_cls, view.dtype, *rest) for view in views
    ]


def described(tensors: Sequence[CheckpointTensor]) -> dict[str, Any]:
    """The part of vLLM's ``update_info`` that its NCCL and CUDA IPC backends have in common."""
    return {
        "names": [tensor.name for tensor in tensors],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
        "shapes": [list(tensor.shape) for tensor in tensors],
    }


TRANSFERS: dict[str, type[Transfer]] = {
    transfer.backend: transfer for transfer in (SharedMemoryTransfer, NcclTransfer, IpcTransfer)
}
"""Transfers by vLLM's name of their backend."""
