"""DeepSpeed's configuration for the learner; known without importing DeepSpeed."""

from __future__ import annotations

from typing import Any

from s2w.config.schema import LearnerConfig

BUCKET_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Gradient elements that the ranks reduce at once, by device: enough for a message to be worth sending. DeepSpeed takes
8 bytes for each (the gradient, a flat copy of it, that in float32); with its default, 5e8, a small model's gradients
would all be held three times. A larger parameter is reduced by itself."""


def deepspeed_settings(learner: LearnerConfig, dtype: str, device: str) -> dict[str, Any]:
    """DeepSpeed's configuration: gradients accumulate over any number of micro-batches, in float32.

    Raises:
        ValueError: bfloat16 at stage 0, where DeepSpeed would accumulate gradients in bfloat16.
    """
    if learner.zero_stage == 0 and dtype == "bfloat16":
        raise ValueError("learner.zero_stage=0 with bfloat16 would accumulate gradients in bfloat16: use stage 1")
    return {
        # Micro-batches differ in size and number: the learner scales the loss and ends the accumulation itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "steps_per_print": None,
        "gradient_clipping": learner.max_grad_norm if learner.zero_stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": learner.zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS[device],
            "overlap_comm": device == "cuda" and learner.zero_stage >= 2,
        },
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
