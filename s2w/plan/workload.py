"""What a step moves: tokens, and the bytes of signals that the object store holds."""

from __future__ import annotations

from dataclasses import dataclass

from s2w.config.schema import Config
from s2w.records import SignalKind
from s2w.teacher.signal import bytes_per_row

SAMPLED_BYTES = 4
"""Of the log-prob of a sampled token beside a signal of another kind."""
CANDIDATE_BYTES = 4
"""Of an id that the student offers to the teacher (signal ``ids``)."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The samples of one step, all of the same lengths."""

    prompts: int
    samples: int
    """Responses to all prompts."""
    prompt_tokens: int
    response_tokens: int

    @property
    def rows(self) -> int:
        """Response tokens of the step."""
        return self.samples * self.response_tokens

    @property
    def sequence(self) -> int:
        """Tokens of a sample."""
        return self.prompt_tokens + self.response_tokens


def on_policy_step(config: Config) -> Workload:
    """A step of the on-policy phase, with the mean lengths of ``plan``, else the longest."""
    loop, plan = config.loop, config.plan
    return Workload(
        loop.prompts_per_step,
        loop.prompts_per_step * loop.samples_per_prompt,
        plan.prompt_tokens or config.data.max_prompt_tokens,
        plan.response_tokens or config.rollout.max_tokens,
    )


def off_policy_step(config: Config) -> Workload:
    """An update of the off-policy phase; each response comes with its own prompt."""
    off, plan = config.off_policy, config.plan
    return Workload(
        off.responses_per_step,
        off.responses_per_step,
        plan.prompt_tokens or config.data.max_prompt_tokens,
        plan.off_policy_tokens or off.max_tokens,
    )


def signal_row_bytes(config: Config, hidden_size: int, teacher_dtype: str, *, sampled: bool = False) -> int:
    """Bytes that a teacher sends for each response token; what :func:`s2w.teacher.signal.nbytes` counts.

    Args:
        hidden_size: the teacher's.
        teacher_dtype: resolved, as ``bfloat16``.
        sampled: the log-prob of the sampled token is sent too.
    """
    kind: SignalKind = config.signal.kind
    given = {"auto": teacher_dtype, "float8": "float8_e4m3fn"}
    dtype = given.get(config.signal.dtype, config.signal.dtype)
    row = bytes_per_row(kind, top_k=config.signal.top_k, hidden_size=hidden_size, dtype=dtype)
    return row + (SAMPLED_BYTES if sampled and kind != "sampled" else 0)


def candidate_row_bytes(config: Config) -> int:
    """Bytes of the ids that a rollout engine stores for each response token: signal ``ids`` alone."""
    return CANDIDATE_BYTES * config.signal.top_k if config.signal.kind == "ids" else 0
