"""What an objective is: what it needs, what each sample counts for, and what is minimised at each token.

An objective is one file in this package: a frozen dataclass, decorated with :func:`register`, whose fields are its
settings (``loss.options``). The launcher asks what it needs, the controller has it credit the samples of a batch, the
learner asks for the loss of each micro-batch; none of them knows its name. CONTRIBUTING.md has the steps,
distillation.py is the shortest one to copy.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar, Literal, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from s2w.config.documentation import documentation, summary
from s2w.config.options import read_options
from s2w.config.schema import Config, LossConfig
from s2w.errors import ConfigError, did_you_mean
from s2w.eval.grading import Graded
from s2w.metric import define
from s2w.objectives.kernel import PolicyRows, TeacherRows
from s2w.records import Scored, SignalKind

Phase = Literal["on_policy", "off_policy"]

TRAINED = define(
    "trained_share", "share", "Response tokens that the objective trains on, where it leaves some out.", over="tokens"
)
EVERY_KIND: tuple[SignalKind, ...] = ("hidden", "topk", "ids", "sampled")


@dataclass(frozen=True)
class TokenLoss:
    """What is minimised at the N sampled tokens of a micro-batch; parts that are None are left out."""

    teacher: TeacherRows | None = None
    """Teacher of the divergence ``loss.divergence``."""
    weights: Tensor | None = None
    """[N], weights of the tokens in the divergence's sum."""
    policy: PolicyRows | None = None
    """A policy gradient."""
    reference: TeacherRows | None = None
    """Signal of the student's first weights: the reverse KL to them is added."""
    reference_weights: Tensor | None = None
    """[N], weights of the tokens in that sum."""
    metrics: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """[N] each, by name: metrics over tokens that :mod:`s2w.metric` has under that name."""


@dataclass(frozen=True)
class TokenBatch:
    """The N sampled tokens of a micro-batch: those of one response after the other, forced ones left out."""

    samples: Sequence[Scored]
    ids: Tensor
    """int64 [N]."""
    log_probs: Tensor
    """float32 [N], of the policy that sampled, nats."""
    teacher: TeacherRows | None
    """The teacher's signals; None if there are none."""
    reference: TeacherRows | None
    """Signals of the student's first weights, where the objective needs them."""
    teacher_log_probs: Tensor | None
    """float32 [N], the teacher's log-prob of the sampled token, where the objective needs it."""
    token_weight: float
    """Weight of a token in the mean over all tokens of the step."""

    @property
    def counts(self) -> list[int]:
        """Tokens of each response."""
        return [len(sample.rollout.sampled_rows) for sample in self.samples]

    def each(self, values: Sequence[float]) -> Tensor:
        """float32 [N]: the value of each response, at each of its tokens."""
        return torch.from_numpy(np.repeat(np.asarray(values, np.float32), self.counts)).to(self.ids.device)

    @property
    def weights(self) -> Tensor:
        """float32 [N]: weights of the tokens in the mean, times those of their samples."""
        return self.each([self.token_weight * sample.weight for sample in self.samples])

    def advantages(self) -> Tensor:
        """float32 [N]: advantage of each token."""
        rows = [
            np.full(count, sample.advantage, np.float32)
            if sample.token_advantages is None
            else sample.token_advantages[sample.rollout.sampled_rows]
            for sample, count in zip(self.samples, self.counts, strict=True)
        ]
        return torch.from_numpy(np.concatenate(rows)).to(self.ids.device)

    def responses(self) -> Iterator[slice]:
        """Where the tokens of each response are."""
        start = 0
        for count in self.counts:
            yield slice(start, start + count)
            start += count


@dataclass(frozen=True)
class Objective(ABC):
    """What a phase minimises; instances are immutable, and are sent to the learner's ranks.

    The class says what it needs. Its docstring's first paragraph is the formula, as ``--help`` and docs/objectives.md
    show it.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    """Where it comes from: a paper, with section or equation."""
    when: ClassVar[str]
    """When to use it, one sentence."""
    phases: ClassVar[tuple[Phase, ...]] = ("on_policy",)
    signals: ClassVar[tuple[SignalKind, ...]] = EVERY_KIND
    """Kinds of teacher signal that it can be trained on. Empty: no teacher scores training samples."""
    reward_needed: ClassVar[Literal["unused", "used", "required"]] = "unused"
    """Whether answers are verified for it; ``required``: every prompt must have a verifier."""
    groups: ClassVar[bool] = False
    """Several responses to a prompt are compared with each other."""
    own_samples_only: ClassVar[bool] = False
    """Trains on the log-probs of what the student sampled: it must sample at the loss's temperature, without top-p or
    top-k."""
    teacher_log_probs: ClassVar[bool] = False
    """Needs the teacher's log-prob of each sampled token besides its signal."""

    @classmethod
    def make(cls, config: Config) -> Self:
        """The objective with the settings of a run.

        Raises:
            ConfigError: a setting of ``loss.options`` has the wrong type or is out of range.
        """
        own = {key: value for key, value in config.loss.options.items() if key in cls.options()}
        sections = {field.name: getattr(config, field.name) for field in fields(cls) if field.name not in cls.options()}
        return dataclasses.replace(read_options(cls(), own, "loss.options."), **sections)

    @classmethod
    def options(cls) -> list[str]:
        """Names of its settings. A field that is a section of the configuration, such as ``reward``, is not one."""
        made = cls()
        return [field.name for field in fields(cls) if not is_dataclass(getattr(made, field.name))]

    def check(self, config: Config) -> None:  # noqa: B027 (most objectives have nothing to refuse)
        """Refuses combinations of settings; called before anything starts.

        Raises:
            ConfigError: names the settings.
        """

    @property
    def needs_reference(self) -> bool:
        """Whether the student's first weights score the samples too."""
        return False

    def loss_settings(self, loss: LossConfig) -> LossConfig:
        """The section ``loss`` as the learner uses it."""
        return loss

    def credit(self, samples: Sequence[Scored], graded: Sequence[Graded]) -> list[Scored]:
        """What each sample of a batch counts for: its weight and its advantage.

        Args:
            samples: of one batch, with weight 1 and advantage 0. A sample that is left with neither is left out.
            graded: their grades, in order.
        """
        return list(samples)

    @abstractmethod
    def loss(self, batch: TokenBatch) -> TokenLoss:
        """What is minimised at each token of a micro-batch."""

    def next_length_limit(self, trained_tokens: Sequence[float], longest: int) -> int:
        """Most tokens that a response of the next batches may have.

        Args:
            trained_tokens: of each response of the step, how many of its first tokens had a weight.
            longest: ``rollout.max_tokens``.
        """
        return longest


OBJECTIVES: dict[str, type[Objective]] = {}
"""Every objective by name."""

O = TypeVar("O", bound=type[Objective])  # noqa: E741


def register(name: str) -> Callable[[O], O]:
    """Class decorator: makes an objective available under ``name``."""

    def add(cls: O) -> O:
        cls.name = name
        OBJECTIVES[name] = cls
        return cls

    return add


def objective_class(name: str, setting: str, phase: Phase) -> type[Objective]:
    """The objective that a setting names.

    Raises:
        ConfigError: there is none, or it is not for ``phase``.
    """
    fitting = [known for known, cls in OBJECTIVES.items() if phase in cls.phases]
    if name not in OBJECTIVES:
        hint = did_you_mean(name, OBJECTIVES) or ":"
        raise ConfigError(f"{setting}={name}: there is no such objective{hint} known are {', '.join(fitting)}")
    if name not in fitting:
        other = {"on_policy": "off-policy", "off_policy": "on-policy"}[phase]
        raise ConfigError(f"{setting}={name}: that is an objective of the {other} phase; write {' or '.join(fitting)}")
    return OBJECTIVES[name]


def help_text() -> str:
    """Every objective with its settings, as ``s2w train --help`` lists them."""
    lines = ["Objectives (loss.objective=NAME, off_policy.loss=NAME; settings: loss.options.SETTING=VALUE):"]
    for name, cls in OBJECTIVES.items():
        lines.append(f"  {name}  ({' and '.join(phase.replace('_', '-') for phase in cls.phases)}; {cls.source})")
        lines += [f"      {line}" for line in summary(cls).splitlines()]
        for option in cls.options():
            text = " ".join(documentation(cls).get(option, "").split())
            lines.append(f"      {option}  (default: {getattr(cls(), option)}) {text}")
    return "\n".join(lines) + "\n"
