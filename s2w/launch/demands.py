"""What each phase of a run starts at once: the demands that :mod:`s2w.launch.placement` finds places for."""

from __future__ import annotations

from dataclasses import dataclass

from s2w.config.schema import Config, RolloutConfig, TeacherConfig
from s2w.launch.check import off_policy, on_policy, uses_off_policy
from s2w.launch.placement import Demand
from s2w.teacher.routing import REFERENCE, reference_settings, section, teacher_settings
from s2w.teacher_data.generate import engine_settings

LEARNER = "learner"
"""The name of the learner's demand."""
GENERATE, OFF_POLICY, ON_POLICY = "generate", "off-policy", "on-policy"
"""Phases: the teacher's responses are generated, the student is trained on them, then on its own."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine pool of a phase."""

    name: str
    settings: TeacherConfig | RolloutConfig
    section: str
    """Of the settings."""
    copies: int

    def demand(self, device: str) -> Demand:
        engine = self.settings
        return Demand(
            self.name,
            "engine",
            engine.tensor_parallel * engine.pipeline_parallel,
            self.copies,
            engine.cpus,
            engine.gpus if device == "cuda" else 0.0,
            engine.tensor_parallel,
            self.section,
        )


@dataclass(frozen=True, slots=True)
class Phase:
    """Parts that are up at the same time."""

    name: str
    engines: tuple[Engine, ...]
    learner: bool

    def demands(self, config: Config, device: str) -> list[Demand]:
        """Of all parts; the learner's is called :data:`LEARNER`."""
        found = [engine.demand(device) for engine in self.engines]
        if self.learner:
            learner = config.learner
            share = learner.gpus if device == "cuda" else 0.0
            found.append(Demand(LEARNER, "ranks", learner.ranks, 1, learner.cpus, share, setting="learner"))
        return found


def generation(config: Config) -> Phase:
    """The engines that generate the teacher's responses, beside which nothing is up."""
    settings = engine_settings(config)
    return Phase(GENERATE, (Engine("generator", settings, "teacher", settings.engines),), False)


def phases(config: Config) -> list[Phase]:
    """The phases of a run in order, those that it has."""
    found = []
    off = config.off_policy
    if uses_off_policy(config) and off.path is None:
        found.append(generation(config))
    if off.steps:
        scoring = _teachers(config) if off_policy(config).signals else ()
        found.append(Phase(OFF_POLICY, scoring, True))
    if config.loop.steps:
        engines = list(_teachers(config))
        if on_policy(config).needs_reference:
            reference = reference_settings(config, config.student.model, config.student.revision)
            engines.append(Engine(REFERENCE, reference, REFERENCE, reference.replicas))
        engines.append(Engine("rollout", config.rollout, "rollout", config.rollout.engines))
        found.append(Phase(ON_POLICY, tuple(engines), True))
    return found


def phase_of(config: Config, name: str) -> Phase:
    """The phase of a run with a name."""
    return next(phase for phase in phases(config) if phase.name == name)


def _teachers(config: Config) -> tuple[Engine, ...]:
    return tuple(
        Engine(name, settings, section(name), settings.replicas) for name, settings in teacher_settings(config).items()
    )
