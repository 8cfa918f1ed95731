"""Entry point that vLLM calls in each of its processes (front end, engine core, workers)."""

from __future__ import annotations

import functools
from typing import Any


def register() -> None:
    """Registers the vocabulary mask, the teacher's scoring models, the weight transfer and the stages; idempotent.

    Engine cores and workers end with the process that started them: vLLM ends them only if that process still can.
    """
    from vllm.platforms import current_platform

    from s2w.actors import vllm_stages, vocabulary_mask
    from s2w.actors.orphans import die_with_parent
    from s2w.teacher import scoring
    from s2w.weights import backends

    die_with_parent()
    vllm_stages.register()
    vocabulary_mask.register()
    scoring.register()
    backends.register()
    if current_platform.is_cpu():
        _sleep_instead_of_spinning()
        _make_pipeline_buffers()
        _pack_when_needed()


def _sleep_instead_of_spinning() -> None:
    """Makes vLLM's processes wait for each other on their sockets.

    A process that waits for a message from another spins for up to a second first. On a CPU platform it spins on a
    core that the model's matrix products need. vLLM drops some of the notifications that it sleeps
    on (its sockets hold one at a time) and looks again after five seconds; five milliseconds are short enough here.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.SpinCondition.__init__.__defaults__ = (0.0,)  # busy_loop_s
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = 5


@functools.cache
def _make_pipeline_buffers() -> None:
    """Pipeline parallelism without torch.compile: vLLM makes the buffers between stages in a dummy run, which a CPU
    engine then leaves out."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    gather = GPUModelRunner.sync_and_gather_intermediate_tensors

    @functools.wraps(gather)
    def made(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return gather(self, *args, **kwargs)

    GPUModelRunner.sync_and_gather_intermediate_tensors = made  # type: ignore[method-assign]


@functools.cache
def _pack_when_needed() -> None:
    """Packs embeddings and heads on a CPU at their first matrix product.

    vLLM packs all of them when they are loaded, each packed copy as large as the weights. Input embeddings never have a
    product, and neither have the heads of teachers in bfloat16, whose logits are float32.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    pack = UnquantizedEmbeddingMethod.process_weights_after_loading

    @functools.wraps(pack)
    def pack_later(self: Any, layer: Any) -> None:
        def first(x: Any, weight: Any, bias: Any) -> Any:
            pack(self, layer)  # Replaces the attribute.
            return layer.cpu_linear(x, weight, bias)

        layer.cpu_linear = first

    UnquantizedEmbeddingMethod.process_weights_after_loading = pack_later  # type: ignore[method-assign]
