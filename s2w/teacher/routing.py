"""Several teachers in one run: which of them scores a response, by its prompt's mode and task."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from s2w.actors.hardware import resolve_dtype
from s2w.actors.place import Places, anywhere
from s2w.actors.starting import Watcher, start_all
from s2w.config.options import read_options
from s2w.config.schema import Config, TeacherConfig
from s2w.errors import ConfigError
from s2w.models.checkpoint import ModelReference
from s2w.records import Fault, Mode, Prompt, Rollout, Scored, TeacherSignal
from s2w.teacher.context import Context
from s2w.teacher.pool import TeacherPool

DEFAULT = "teacher"
"""Name of the teacher that scores what no other takes."""
REFERENCE = "reference"
"""Name of the student's first weights among those that score."""


@dataclass(frozen=True, slots=True)
class Route:
    """Prompts that a further teacher takes."""

    name: str
    modes: tuple[Mode, ...]
    tasks: tuple[str, ...]
    """Empty, like ``modes``: any."""

    def takes(self, prompt: Prompt) -> bool:
        return (not self.modes or prompt.mode in self.modes) and (not self.tasks or prompt.task in self.tasks)


def teacher_settings(config: Config) -> dict[str, TeacherConfig]:
    """Settings of every teacher by name, the default one first.

    Raises:
        ConfigError: an entry of ``teachers`` has no model, a field that no teacher has, a value of the wrong type, or
            the default's name.
    """
    settings = {DEFAULT: config.teacher}
    for name, entry in config.teachers.items():
        where = f"teachers.{name}"
        if name in (DEFAULT, REFERENCE):
            raise ConfigError(f"{where}: `{name}` is the name of the section with that name; choose another")
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            raise ConfigError(f"{where} has no model: write {{model: PATH, modes: [think], tasks: [TASK]}}")
        fields = {key: value for key, value in entry.items() if key not in ("modes", "tasks")}
        # What a teacher reads is not inherited.
        base = dataclasses.replace(config.teacher, revision=None, context=None, system_prompt=None)
        settings[name] = read_options(base, fields, f"{where}.", also=("modes", "tasks"))
    return settings


def reference_settings(config: Config, model: str, revision: str | None) -> TeacherConfig:
    """Settings of the pool that runs the student's first weights, a checkpoint.

    Raises:
        ConfigError: ``reference`` has a setting that no teacher has, or a value of the wrong type.
    """
    base = dataclasses.replace(config.teacher, context=None, system_prompt=None)
    settings = read_options(base, config.reference, "reference.")
    return dataclasses.replace(settings, model=model, revision=revision)


def section(name: str) -> str:
    """Section with the settings of a teacher."""
    return name if name == DEFAULT else f"teachers.{name}"


def contexts(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Context]:
    """Privileged contexts by the name of the teacher that has one."""
    return {
        name: Context(section(name), teacher, tokenizer, config.data.chat_template_kwargs)
        for name, teacher in teacher_settings(config).items()
        if teacher.context is not None or teacher.system_prompt is not None
    }


def context_lengths(config: Config, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> dict[str, int]:
    """The most tokens that each teacher's context adds to a prompt.

    Raises:
        ConfigError: a template asks for something that a prompt does not have.
    """
    found = routes(config)
    return {
        name: context.longest([prompt for prompt in prompts if teacher_name(found, prompt) == name])
        for name, context in contexts(config, tokenizer).items()
    }


def routes(config: Config) -> list[Route]:
    """Who takes what, in the order of asking.

    Raises:
        ConfigError: modes or tasks are not lists, or a mode does not exist.
    """
    found = []
    for name, entry in config.teachers.items():
        lists: dict[str, tuple[Any, ...]] = {}
        for key in ("modes", "tasks"):
            value = entry.get(key) or []
            if not isinstance(value, list):
                raise ConfigError(f"teachers.{name}.{key}={value}: write a list, as [{value}]")
            lists[key] = tuple(value)
        for mode in lists["modes"]:
            if mode not in get_args(Mode):
                raise ConfigError(f"teachers.{name}.modes has {mode!r}; a mode is {' or '.join(get_args(Mode))}")
        found.append(Route(name, lists["modes"], lists["tasks"]))
    return found


def teacher_name(found: Sequence[Route], prompt: Prompt) -> str:
    """Name of the teacher that scores responses to ``prompt``, of those that :func:`routes` found."""
    return next((route.name for route in found if route.takes(prompt)), DEFAULT)


class Teachers:
    """The pools of all teachers; each response goes to the one that takes its prompt.

    Args:
        config: the run's.
        device: cuda or cpu.
        max_model_len: longest prompt plus response, where a teacher's own settings give none.
        vocab_size: ids that the student and every teacher share.
        tokenizer: the student's.
        context_tokens: from :func:`context_lengths`; such a teacher's sequences are this much longer.
        sampled: they return the log-prob of each sampled token besides their signals.
        reference: the student's first weights, which score too; None for none.
        places: finds places for the engines of a teacher, by its name.
        on_fault: see :class:`s2w.actors.pool.Pool`.
    """

    def __init__(
        self,
        config: Config,
        device: str,
        max_model_len: int,
        vocab_size: int,
        *,
        tokenizer: PreTrainedTokenizerBase,
        context_tokens: Mapping[str, int],
        sampled: bool = False,
        reference: ModelReference | None = None,
        places: Callable[[str], Places] = lambda name: anywhere,
        on_fault: Callable[[Fault], None] = lambda fault: None,
    ) -> None:
        self._routes = routes(config)
        self._contexts = contexts(config, tokenizer)
        self._numbers: dict[tuple[str, int], int] = {}

        def pool(name: str, settings: TeacherConfig, *, sampled: bool) -> TeacherPool:
            for replica in range(settings.replicas):
                self._number(name, replica)
            return TeacherPool(
                settings,
                config.signal,
                config.loss.temperature,
                device=device,
                dtype=resolve_dtype(settings.dtype, device),
                max_model_len=settings.max_model_len or max_model_len + max(0, context_tokens.get(name, 0)),
                vocab_size=vocab_size,
                sampled=sampled,
                name=name if name in (DEFAULT, REFERENCE) else f"teacher {name}",
                cluster=config.cluster,
                place=places(name),
                on_fault=on_fault,
            )

        self._pools = {
            name: pool(name, settings, sampled=sampled) for name, settings in teacher_settings(config).items()
        }
        self._reference: TeacherPool | None = None
        if reference is not None:
            settings = reference_settings(config, reference.reference, reference.revision)
            self._reference = pool(REFERENCE, settings, sampled=False)

    @property
    def _all(self) -> list[TeacherPool]:
        return [*self._pools.values(), *([self._reference] if self._reference else [])]

    async def start(self, timeout_s: float, watcher: Watcher | None = None) -> None:
        """Waits until every engine of every pool has loaded its model; as :meth:`TeacherPool.start`."""
        starts = {pool.pool.name: partial(pool.start, timeout_s, watcher) for pool in self._all}
        await start_all(starts, in_turn=any(pool.shares_gpu for pool in self._all))

    async def score(self, rollout: Rollout) -> TeacherSignal:
        """Like :meth:`TeacherPool.score`, by the teacher that takes the prompt."""
        name = teacher_name(self._routes, rollout.prompt)
        return self._named(name, await self._pools[name].score(self._as_seen(name, rollout)))

    async def score_batch(self, rollouts: Sequence[Rollout]) -> list[TeacherSignal]:
        """Like :meth:`TeacherPool.score_batch`, with each teacher's share as a whole."""
        shares: dict[str, list[int]] = {}
        for position, rollout in enumerate(rollouts):
            shares.setdefault(teacher_name(self._routes, rollout.prompt), []).append(position)
        signals: dict[int, TeacherSignal] = {}
        for name, share in shares.items():
            own = await self._pools[name].score_batch([self._as_seen(name, rollouts[i]) for i in share])
            signals |= {i: self._named(name, signal) for i, signal in zip(share, own, strict=True)}
        return [signals[i] for i in range(len(rollouts))]

    async def refer(self, rollout: Rollout) -> TeacherSignal | None:
        """Signal of the student's first weights for a response; None if they do not score."""
        if self._reference is None:
            return None
        return self._named(REFERENCE, await self._reference.score(rollout))

    async def refer_batch(self, rollouts: Sequence[Rollout]) -> list[TeacherSignal | None]:
        """The same for a batch, repeatable bit for bit."""
        if self._reference is None:
            return [None] * len(rollouts)
        return [self._named(REFERENCE, signal) for signal in await self._reference.score_batch(list(rollouts))]

    async def lost(self, samples: Sequence[Scored]) -> list[int]:
        """Indices of the samples with a signal whose engine has died, and the signal with it."""
        pools = [*self._pools.items(), *([(REFERENCE, self._reference)] if self._reference else [])]
        alive = {self._number(name, number) for name, pool in pools for number in await pool.alive()}
        return [
            i
            for i, sample in enumerate(samples)
            if any(signal and signal.teacher not in alive for signal in (sample.signal, sample.reference))
        ]

    async def shutdown(self) -> None:
        """Ends all engines."""
        await asyncio.gather(*(pool.shutdown() for pool in self._all))

    def _as_seen(self, name: str, rollout: Rollout) -> Rollout:
        context = self._contexts.get(name)
        return context.rollout(rollout) if context else rollout

    def _named(self, name: str, signal: TeacherSignal) -> TeacherSignal:
        return dataclasses.replace(signal, name=name, teacher=self._number(name, signal.teacher))

    def _number(self, name: str, number: int) -> int:
        """Number among the engines of all teachers of engine ``number`` of one of them."""
        return self._numbers.setdefault((name, number), len(self._numbers))
