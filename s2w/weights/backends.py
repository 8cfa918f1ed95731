"""The weight-transfer backends that s2w's engines are started with, as vLLM knows them."""

from __future__ import annotations

from s2w.actors.hardware import shares_gpu

SHARED_MEMORY, NCCL, IPC = "s2w_shm", "s2w_nccl", "s2w_ipc"
"""Names in vLLM's ``WeightTransferConfig``."""
ENGINES = {
    SHARED_MEMORY: ("s2w.weights.shm_engine", "SharedMemoryTransferEngine"),
    NCCL: ("s2w.weights.gpu_engines", "NcclTransferEngine"),
    IPC: ("s2w.weights.gpu_engines", "IpcTransferEngine"),
}
"""Module and class of the worker side."""


def backend_of(device: str, gpus: float) -> str:
    """The backend for learner and engines on ``device`` (``cuda`` or ``cpu``), which reserve ``gpus`` of a GPU each:
    with less than one, they share it."""
    if device == "cpu":
        return SHARED_MEMORY
    return IPC if shares_gpu(device, gpus) else NCCL


def register() -> None:
    """Makes the backends known to vLLM; idempotent, as vLLM may load plugins more than once in a process."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    for name, (module, cls) in ENGINES.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, module, cls)
