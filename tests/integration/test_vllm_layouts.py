"""Layouts of engines against vLLM's own functions."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

from qwen3_moe import moe_config

from s2w.errors import ConfigError
from s2w.models.parallel import check_parallel
from s2w.plan.engine_memory import stage_layers


def test_quantized_experts_as_vllm_takes_them() -> None:
    """Block-quantized FP8 experts against vLLM's own functions, over widths, blocks and layouts."""
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import refine_fp8_moe_block_shape

    refused = []
    for width, block, workers in itertools.product((768, 1536, 1408, 640), ([128, 128], [64, 128]), (1, 2, 4, 8, 32)):
        if width % workers:
            continue
        share = width // workers
        sizes = SimpleNamespace(intermediate_size_per_partition=share, tp_size=workers, hidden_dim=4096)
        whole = share % block[0] == 0 and (workers == 1 or share % block[1] == 0)
        takes = whole or refine_fp8_moe_block_shape(sizes, block) is not None  # type: ignore[arg-type]
        config = moe_config(block, moe_intermediate_size=width, num_key_value_heads=64)
        try:
            check_parallel("teacher", config, tensor_parallel=workers)
        except ConfigError as error:
            assert not takes and "teacher.expert_parallel=true, or a smaller teacher.tensor_parallel" in str(error)
            refused.append((width, workers))
            check_parallel("teacher", config, tensor_parallel=workers, expert_parallel=True)
        else:
            assert takes, (width, block, workers)
    assert (768, 32) in refused and (1536, 8) not in refused


def test_layers_of_a_pipeline_stage_as_vllm_divides_them() -> None:
    from vllm.distributed.utils import get_pp_indices

    for layers, stages in itertools.product((28, 36, 47, 94), (1, 2, 3, 4, 8)):
        ends = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
        assert stage_layers(layers, stages) == [stop - start for start, stop in ends], (layers, stages)
