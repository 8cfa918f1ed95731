"""The worker side of the backends for GPUs: vLLM's own, with :class:`~s2w.weights.reload.CheckedReload`."""

from __future__ import annotations

from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from s2w.weights.reload import CheckedReload


class NcclTransferEngine(CheckedReload, NCCLWeightTransferEngine):
    """Receives a broadcast."""


class IpcTransferEngine(CheckedReload, IPCWeightTransferEngine):
    """Reads the learner's memory on the same GPU."""
