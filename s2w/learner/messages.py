"""What the learner group and its ranks say to each other; imports no DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s2w.config.schema import LearnerConfig, LossConfig
from s2w.learner.signal_bias import SignalSums
from s2w.models.checkpoint import ModelReference
from s2w.objectives import Objective
from s2w.records import Scored, SignalKind


class StepRefusedError(RuntimeError):
    """A step that all ranks gave up together: weights and optimizer are unchanged."""


class NonFiniteError(StepRefusedError):
    """The divergence or the signal of some sample is NaN or infinite; the message names it, and the file with the
    micro-batch of a step."""


class SignalLostError(StepRefusedError):
    """A teacher signal could not be fetched or has the wrong shape; the message names the sample."""


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What a rank is built from."""

    learner: LearnerConfig
    loss: LossConfig
    """As the objective uses it."""
    objective: Objective
    signal: SignalKind
    student: ModelReference
    """The checkpoint to start from."""
    teachers: dict[str, tuple[str, str | None]]
    """By name: hub id or path and revision of each teacher and of the reference; ``hidden`` needs their heads."""
    vocab_size: int
    """Ids that student and teacher share."""
    device: str
    """cuda or cpu."""
    dtype: str
    """float32 or bfloat16."""
    engine_dtype: str
    """Dtype of the weights that rollout engines receive."""
    seed: int
    run_dir: Path
    """Where the micro-batch of a refused step is written."""


@dataclass(frozen=True, slots=True)
class MicroBatchWork:
    """Samples of one micro-batch, all of one teacher; not ``weighted``: only run to keep the ranks in step."""

    samples: list[Scored]
    weighted: bool


@dataclass(frozen=True, slots=True)
class RankStep:
    """What one rank did in a step."""

    sums: dict[str, np.ndarray]
    """By metric, float64 [samples]: sums over each sample's response tokens, in the order of the weighted work."""
    loss_sum: float
    """The objective summed over this rank's response tokens."""
    grad_norm: float
    """Norm of the whole gradient, before clipping; the same on all ranks. Infinite: the optimizer skipped the step."""
    flawed: list[str]
    """In that case, this rank's samples whose own gradient is not finite."""
    signal_bytes: int
    fetch_seconds: float
    """Time to get and join signals, alongside the work."""
    wait_seconds: float
    """Idle time, waiting for signals."""
    signal_bias: dict[str, SignalSums]
    """For the first micro-batch, where it was asked for."""


def sequence_length(sample: Scored) -> int:
    """Tokens that the student reads: prompt and response without its last token."""
    return len(sample.rollout.prompt.token_ids) + len(sample.rollout.token_ids) - 1
