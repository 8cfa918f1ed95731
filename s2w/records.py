"""What flows between the parts: prompts, rollouts, teacher signals, step reports.

Records pass through the controller, so they hold token ids, a few scalars a token and references;
tensors stay in Ray's object store and are fetched only by the learner rank that trains on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from ray import ObjectRef

Mode = Literal["think", "no_think"]
SignalKind = Literal["hidden", "topk", "ids", "sampled"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt in one mode, rendered and tokenised once; nothing downstream re-tokenises it."""

    uid: str
    """Unique and stable over runs: ``task/split/index``."""
    messages: tuple[dict[str, str], ...]
    """Chat messages, as given to the chat template."""
    token_ids: np.ndarray
    """int32 [prompt_len], chat template applied."""
    mode: Mode
    seed: int
    """Seed of sample 0; sample i uses ``seed + i``."""
    task: str = ""
    """Name of the task whose verifier scores the answer; empty when there is none."""
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever the task's verifier needs beside the answer."""


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Response tokens ``start`` (inclusive) to ``stop`` (exclusive) were written by ``version``."""

    start: int
    stop: int
    version: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response of the student."""

    prompt: Prompt
    sample: int
    token_ids: np.ndarray
    """int32 [n], the response, end-of-sequence token included when it was sampled."""
    log_probs: np.ndarray
    """float32 [n], log-prob of each token under the policy that sampled it, in nats."""
    versions: tuple[VersionSpan, ...]
    """Empty if the teacher wrote the response."""
    finish_reason: str
    """vLLM's own: ``stop`` or ``length``."""
    engine: int
    started: float
    finished: float
    """Wall-clock seconds (``time.time``) at which the engine took and finished the request."""
    candidates: ObjectRef | None = None
    """int32 [n, k]: the student's own top-k ids at each position (signal ``ids`` only)."""
    forced: tuple[tuple[int, int], ...] = ()
    """Response tokens [start, stop) that were inserted, not sampled (the thinking budget): no version span covers
    them, their log-prob is 0, their candidates mean nothing, and nothing is learned at them."""

    @property
    def uid(self) -> str:
        return f"{self.prompt.uid}#{self.sample}"

    @property
    def input_ids(self) -> np.ndarray:
        """int32 [prompt_len + n]."""
        return np.concatenate([self.prompt.token_ids, self.token_ids])

    @property
    def sampled_rows(self) -> np.ndarray:
        """int64 [m]: response positions that were sampled, all but the forced ones; only these are learned from."""
        sampled = np.ones(len(self.token_ids), bool)
        for start, stop in self.forced:
            sampled[start:stop] = False
        return np.flatnonzero(sampled)

    @property
    def oldest_version(self) -> int:
        return min(span.version for span in self.versions)


@dataclass(frozen=True, slots=True)
class TeacherSignal:
    """What a teacher said at each response position; ``payload`` refers to the arrays.

    ``payload`` resolves to a dict of numpy arrays, see :mod:`s2w.teacher.signal`.
    """

    kind: SignalKind
    rows: int
    payload: ObjectRef
    nbytes: int
    teacher: int
    """Index of the replica that scored it, over all teachers."""
    started: float
    finished: float
    cached_tokens: int
    """Prompt tokens that the teacher's prefix cache already held."""
    put_seconds: float = 0.0
    """What it took to encode the signal, check it and put it into the object store."""
    name: str = "teacher"
    """Which teacher: `teacher`, or one of config.teachers."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A rollout with what was found out about it: what the learner trains on."""

    rollout: Rollout
    signal: TeacherSignal | None
    """None where no teacher is asked (loss.objective=grpo)."""
    advantage: float = 0.0
    """Of the verified reward, relative to the other responses to the prompt."""
    weight: float = 1.0
    """Factor on the divergence at its tokens."""


@dataclass(frozen=True, slots=True)
class Heldout:
    """Held-out KL of one policy version: fresh rollouts on held-out prompts, averaged over sampled tokens."""

    version: int
    forward_kl: float
    """KL(teacher || student), nats a token."""
    reverse_kl: float
    """KL(student || teacher), nats a token."""
    tokens: int
    """Tokens that the averages are over."""
    response_length: float
    by_mode: dict[str, dict[str, float]] = field(default_factory=dict)
    """By mode: prompts, obedience, truncated, response_length, and accuracy where prompts have a verifier; see
    :func:`s2w.eval.report.mode_scores`."""


@dataclass(frozen=True, slots=True)
class HeldoutResponse:
    """One response of a held-out evaluation in figures, as ``heldout_responses.jsonl`` holds it: from these any
    interval and any paired test can be made again."""

    version: int
    uid: str
    """Of the prompt; the same prompts are asked at every version."""
    mode: Mode
    tokens: int
    """Sampled ones, which the KL is over."""
    forward_kl: float
    """Mean over its tokens, nats."""
    reverse_kl: float
    correct: bool | None
    """None if the prompt has no verifier."""
    obedient: bool
    truncated: bool


@dataclass(frozen=True, slots=True)
class HeldoutSample:
    """One response of a held-out evaluation in full, as ``samples.jsonl`` holds it."""

    version: int
    uid: str
    mode: Mode
    prompt: str
    """The last user message."""
    response: str
    """Without special tokens; think tags stay."""
    correct: bool | None
    """None if the prompt has no verifier."""
    obedient: bool
    finish_reason: str


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step of the loop, as ``metrics.jsonl`` holds it. KL and entropies are in nats a response token."""

    step: int
    """Updates done, this one included; also the policy version that the update published."""
    loss: float
    """The objective: the divergence, times temperature^2 where that is set, and the policy gradient's value."""
    divergence: float
    """With loss.objective=grpo the policy gradient's value; what needs a teacher is then NaN."""
    student_entropy: float
    teacher_entropy: float
    agreement: float
    """Share of positions where both have the same most likely token."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    skipped: int
    """1 if the gradient was not finite, and the weights are those of the step before."""
    prompts: int
    response_tokens: int
    response_length: float
    finish: dict[str, float]
    """Share of responses by finish reason."""
    staleness_mean: float
    """Versions between writing and learning, mean over response tokens."""
    staleness_max: int
    tokens_per_second: dict[str, float]
    """generate: response tokens; score: prompt and response tokens that the teacher computed; learn: prompt and
    response tokens. Each over the seconds in which that stage was at work."""
    busy: dict[str, float]
    """Share of the step's wall time in which generate, score, learn and swap were at work."""
    signal_bytes_per_token: float
    signal_seconds: dict[str, float]
    """The signals' way: put (encoded, checked and stored, over all teachers), fetch (taken out and joined, over all
    learner ranks, beside their work), wait (the longest that a rank stood still for one)."""
    swap_ms: float
    """From the pause of the engines to their resumption; NaN if the swap failed."""
    probe_error: float
    """Mean |log-prob difference| between engine and learner after the swap, nats; NaN if it failed."""
    seconds: float
    """Wall time of the step."""
    signal_bias: dict[str, dict[str, float]]
    """In steps of signal.bias_every: what each cheaper signal would have said, see
    :func:`s2w.learner.signal_bias.summarise`; else empty."""
    by_mode: dict[str, dict[str, float]] = field(default_factory=dict)
    """By mode, of the responses that the student wrote: responses, divergence, student_entropy, teacher_entropy,
    response_length, truncated, obedience, and accuracy where prompts have a verifier."""
    phase: Literal["on_policy"] = "on_policy"


@dataclass(frozen=True, slots=True)
class OffPolicyReport:
    """One step of the off-policy phase, as ``metrics.jsonl`` holds it. Loss and entropies: nats a response token."""

    step: int
    """Updates of this phase done, this one included."""
    epoch: float
    """Times that each response has been learned, this step included."""
    loss: float
    """The objective: cross-entropy, or the divergence, times temperature^2 where that is set."""
    divergence: float
    """The objective without temperature^2."""
    student_entropy: float
    agreement: float
    """Share of positions where the student's most likely token is the response's (loss=cross_entropy) or the
    teacher's (loss=divergence)."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    skipped: int
    """1 if the gradient was not finite, and the weights are those of the step before."""
    responses: int
    response_tokens: int
    tokens_per_second: float
    """Prompt and response tokens over the seconds of the update."""
    seconds: float
    """Wall time of the step, teacher signals included."""
    phase: Literal["off_policy"] = "off_policy"


@dataclass(frozen=True, slots=True)
class OffPolicyHeldout:
    """Loss on held-out responses of the teacher, after ``step`` updates of the off-policy phase."""

    step: int
    loss: float
    """Cross-entropy or divergence, nats a response token."""
    tokens: int
