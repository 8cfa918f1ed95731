"""Several teachers in one run: which of them scores a response, by its prompt's mode and task."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from s2w.config import Config, TeacherConfig
from s2w.errors import ConfigError, did_you_mean
from s2w.hardware import resolve_dtype
from s2w.records import Mode, Prompt, Rollout, TeacherSignal
from s2w.teacher.pool import TeacherPool

DEFAULT = "teacher"
"""Name of the teacher that scores what no other one takes."""


@dataclass(frozen=True, slots=True)
class Route:
    """Which prompts a further teacher takes."""

    name: str
    modes: tuple[Mode, ...]
    tasks: tuple[str, ...]
    """Empty, as ``modes``: any."""

    def takes(self, prompt: Prompt) -> bool:
        return (not self.modes or prompt.mode in self.modes) and (not self.tasks or prompt.task in self.tasks)


def teacher_settings(config: Config) -> dict[str, TeacherConfig]:
    """Settings of every teacher by name, the default one first.

    Raises:
        ConfigError: an entry of ``teachers`` has no model, a field that no teacher has, a value of another type, or
            the default's name.
    """
    settings = {DEFAULT: config.teacher}
    known = [field.name for field in dataclasses.fields(TeacherConfig)]
    for name, entry in config.teachers.items():
        where = f"teachers.{name}"
        if name == DEFAULT:
            raise ConfigError(f"{where}: `{DEFAULT}` is the name of the section with that name; choose another")
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            raise ConfigError(f"{where} has no model: write {{model: PATH, modes: [think], tasks: [TASK]}}")
        fields = {key: value for key, value in entry.items() if key not in ("modes", "tasks")}
        for key in fields:
            if key not in known:
                nearest = did_you_mean(key, [*known, "modes", "tasks"])
                raise ConfigError(f"unknown setting {where}.{key}{nearest}")
        try:
            merged = OmegaConf.merge(OmegaConf.structured(config.teacher), {"revision": None, **fields})
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}.{error.full_key}: {str(error).splitlines()[0]}") from error
        made = OmegaConf.to_object(merged)
        assert isinstance(made, TeacherConfig)
        settings[name] = made
    return settings


def routes(config: Config) -> list[Route]:
    """Who takes what, in the order of asking.

    Raises:
        ConfigError: modes or tasks are no lists, or a mode does not exist.
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
        config: of the run.
        device: cuda or cpu.
        max_model_len: longest prompt plus response, where a teacher's own settings do not say.
        vocab_size: ids that the student and every teacher share.
    """

    def __init__(self, config: Config, device: str, max_model_len: int, vocab_size: int) -> None:
        self._routes = routes(config)
        self._pools: dict[str, TeacherPool] = {}
        self._first: dict[str, int] = {}
        replicas = 0
        for name, settings in teacher_settings(config).items():
            self._pools[name] = TeacherPool(
                settings,
                config.signal,
                config.loss.temperature,
                device=device,
                dtype=resolve_dtype(settings.dtype, device),
                max_model_len=settings.max_model_len or max_model_len,
                vocab_size=vocab_size,
            )
            self._first[name] = replicas
            replicas += settings.replicas

    async def start(self, timeout_s: float) -> None:
        """Waits until every engine of every pool has loaded its teacher; errors as of :meth:`TeacherPool.start`."""
        async with asyncio.TaskGroup() as group:
            for pool in self._pools.values():
                group.create_task(pool.start(timeout_s))

    async def score(self, rollout: Rollout) -> TeacherSignal:
        """As :meth:`TeacherPool.score`, of the teacher that takes the prompt."""
        name = teacher_name(self._routes, rollout.prompt)
        return self._named(name, await self._pools[name].score(rollout))

    async def score_batch(self, rollouts: Sequence[Rollout]) -> list[TeacherSignal]:
        """As :meth:`TeacherPool.score_batch`, each teacher's share as a whole."""
        shares: dict[str, list[int]] = {}
        for position, rollout in enumerate(rollouts):
            shares.setdefault(teacher_name(self._routes, rollout.prompt), []).append(position)
        signals: dict[int, TeacherSignal] = {}
        for name, share in shares.items():
            own = await self._pools[name].score_batch([rollouts[i] for i in share])
            signals |= {i: self._named(name, signal) for i, signal in zip(share, own, strict=True)}
        return [signals[i] for i in range(len(rollouts))]

    async def shutdown(self) -> None:
        """Ends all engines."""
        await asyncio.gather(*(pool.shutdown() for pool in self._pools.values()))

    def _named(self, name: str, signal: TeacherSignal) -> TeacherSignal:
        return dataclasses.replace(signal, name=name, teacher=self._first[name] + signal.teacher)
