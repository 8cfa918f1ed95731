"""What flows between the parts: prompts, rollouts, teacher signals, held-out results.

Records pass through the controller, so they hold token ids, a few scalars per token and references;
tensors stay in Ray's object store and are fetched only by the learner rank that trains on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from ray import ObjectRef

Mode = Literal["think", "no_think"]
SignalKind = Literal["hidden", "topk", "ids", "sampled"]
HiddenDtype = Literal["auto", "bfloat16", "float8"]
"""How hidden states travel; ``auto``: in the teacher's own dtype."""


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
    """Name of the verifier that scores the answer (:func:`s2w.data.verifiers.verifier_of`); empty when none does."""
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever the verifier needs besides the answer."""
    place: str = ""
    """File and row that it was read from, for messages; empty if it was generated."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn from a distribution."""

    temperature: float
    """0 is greedy."""
    top_p: float
    """1 keeps every token."""
    top_k: int
    """-1 keeps every token."""


@dataclass(frozen=True, slots=True)
class Request:
    """What an engine is asked for: one response."""

    prompt: Prompt
    sample: int = 0
    """Number of the response to this prompt; its seed is ``prompt.seed + sample``."""
    max_tokens: int | None = None
    """Longest response, in tokens; None takes the pool's setting."""
    thinking_budget: int | None = None
    """For a prompt in think mode, response tokens after which an open think block is closed; None takes the pool's
    setting. One that leaves no room for an answer does nothing."""
    sampling: Sampling | None = None
    """None takes the pool's settings."""

    @property
    def uid(self) -> str:
        return f"{self.prompt.uid}#{self.sample}"


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Response tokens ``start`` (inclusive) to ``stop`` (exclusive) were sampled by ``version``."""

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
    """Empty if the teacher generated the response."""
    finish_reason: str
    """As vLLM reports it: ``stop`` or ``length``."""
    engine: int
    started: float
    finished: float
    """Wall-clock seconds (``time.time``) at which the engine took and finished the request."""
    candidates: ObjectRef | None = None
    """int32 [n, k]: the student's own top-k ids at each position (signal ``ids`` only)."""
    forced: tuple[tuple[int, int], ...] = ()
    """Response tokens [start, stop) that were inserted, not sampled (the thinking budget): no version span covers
    them, their log-prob is 0, their candidates are meaningless, and they are not trained on."""

    @property
    def uid(self) -> str:
        return f"{self.prompt.uid}#{self.sample}"

    @property
    def input_ids(self) -> np.ndarray:
        """int32 [prompt_len + n]."""
        return np.concatenate([self.prompt.token_ids, self.token_ids])

    @property
    def sampled_rows(self) -> np.ndarray:
        """int64 [m]: response positions that were sampled, all but the forced ones; only these are trained on."""
        sampled = np.ones(len(self.token_ids), bool)
        for start, stop in self.forced:
            sampled[start:stop] = False
        return np.flatnonzero(sampled)

    @property
    def oldest_version(self) -> int:
        return min(span.version for span in self.versions)


@dataclass(frozen=True, slots=True)
class TeacherSignal:
    """A teacher's signal at each response position; ``payload`` refers to the arrays.

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
    """Time to encode the signal, check it and put it into the object store."""
    name: str = "teacher"
    """Which teacher: `teacher`, or one of config.teachers."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A rollout with its signals and what it counts for: what the learner trains on."""

    rollout: Rollout
    signal: TeacherSignal | None
    """None where the objective needs no teacher."""
    advantage: float = 0.0
    """From the verified reward, relative to the other responses to the prompt."""
    weight: float = 1.0
    """Factor on the divergence at its tokens."""
    token_advantages: np.ndarray | None = None
    """float32 [n], in place of ``advantage`` where it differs from token to token."""
    reference: TeacherSignal | None = None
    """Signal of the student's first weights on the same tokens, where the objective keeps the student near them."""

    @property
    def counts(self) -> bool:
        """Whether anything of it is trained on: an objective may leave a sample out."""
        return bool(self.weight or self.advantage) or self.token_advantages is not None


@dataclass(frozen=True, slots=True)
class Heldout:
    """A held-out evaluation of one policy version: fresh rollouts on held-out prompts, KL averaged over sampled
    tokens. Or the teacher's own responses to the same prompts, whose KL to the teacher is 0."""

    version: int | None
    """None: the teacher's own responses."""
    forward_kl: float
    """KL(teacher || student), nats/token."""
    reverse_kl: float
    """KL(student || teacher), nats/token."""
    tokens: int
    """Tokens that the averages are taken over."""
    response_length: float
    by_mode: dict[str, dict[str, float]] = field(default_factory=dict)
    """By mode, the means of :func:`s2w.eval.heldout.mean_scores`: prompts, forward_kl, reverse_kl, mode_adherence,
    truncated, repetitive, response_length; where prompts have a verifier, how many (verified), and accuracy."""
    by_teacher: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same by the teacher that scores the prompt, if several do."""
    by_task: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same by task, if there are several; an empty name is that of prompts without a verifier."""


@dataclass(frozen=True, slots=True)
class HeldoutResponse:
    """One response of a held-out evaluation as numbers, as ``heldout_responses.jsonl`` holds it: from these any
    interval and any paired test can be recomputed."""

    version: int | None
    """None: the teacher's own response."""
    uid: str
    """Of the prompt; the same prompts are asked at every version."""
    mode: Mode
    tokens: int
    """Sampled tokens, which the KL is averaged over."""
    forward_kl: float
    """Mean over its tokens, nats."""
    reverse_kl: float
    correct: bool | None
    """None if the prompt has no verifier."""
    adherent: bool
    truncated: bool
    repetitive: bool | None = None
    """It repeats itself over and over, see :func:`s2w.eval.heldout.is_repetitive`; None: written by s2w 0.2."""
    length: int | None = None
    """All its tokens, those of a thinking budget too; None as above."""
    teacher: str = ""
    """Name of the teacher that scores the prompt; empty as above."""
    task: str = ""
    """Of the prompt; empty if it has no verifier, and as above."""


@dataclass(frozen=True, slots=True)
class HeldoutSample:
    """One response of a held-out evaluation in full, as ``samples.jsonl`` holds it."""

    version: int | None
    """None: the teacher's own response."""
    uid: str
    mode: Mode
    prompt: str
    """The last user message."""
    response: str
    """Without special tokens; think tags stay."""
    correct: bool | None
    """None if the prompt has no verifier."""
    adherent: bool
    finish_reason: str


@dataclass(frozen=True, slots=True)
class OffPolicyHeldout:
    """Loss on held-out responses of the teacher, after ``step`` updates of the off-policy phase."""

    step: int
    loss: float
    """Cross-entropy or divergence, nats per response token."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Fault:
    """Something died or hung, and what became of it, as ``events.jsonl`` holds it."""

    time: float
    """When it was found, wall-clock seconds."""
    kind: str
    """``rollout engine``, ``teacher``."""
    what: str
    """Its name, with its number."""
    why: str
    replacement: str | None
    """The name of what has taken its place; None if nothing has."""
    seconds: float | None
    """From when it was found until its replacement had loaded."""
