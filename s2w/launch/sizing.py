"""The memory of a run's parts in their places: of each GPU, and of each node's host, /dev/shm and object store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from s2w.actors.hardware import resolve_dtype
from s2w.config.schema import Config, RolloutConfig, TeacherConfig
from s2w.launch.check import check_engine, check_lengths, check_settings, off_policy, off_policy_prompts, on_policy
from s2w.launch.demands import GENERATE, OFF_POLICY, Engine, Phase
from s2w.launch.nodes import Machine
from s2w.launch.placement import Placement
from s2w.models.shapes import ModelShape, model_config, shape_of, student_config
from s2w.models.shards import MAX_SHARD_BYTES
from s2w.objectives import Objective
from s2w.plan.engine_memory import CPU_ACTOR_BYTES, CPU_CORE_BYTES, EngineMemory, engine_memory
from s2w.plan.learner_memory import LargestBatch, rank_memory
from s2w.plan.workload import Workload, candidate_row_bytes, off_policy_step, on_policy_step, signal_row_bytes
from s2w.teacher.routing import DEFAULT, REFERENCE, reference_settings, section

GPU_WORKER_HOST_BYTES = 3 * 2**30
"""Host memory of a process on a GPU: CUDA's libraries, pinned buffers."""
DRIVER_BYTES = 2**30
"""Of the driver, on the first node."""
RING_BYTES = 160 * 2**20
"""/dev/shm of an engine with several workers: vLLM's ring of 10 messages of 16 MiB."""
NCCL_SHM_BYTES = 64 * 2**20
"""/dev/shm of a GPU process of a group."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model as its configuration describes it."""

    config: PretrainedConfig
    shape: ModelShape

    @classmethod
    def of(cls, config: PretrainedConfig) -> Model:
        return cls(config, shape_of(config))


@dataclass(frozen=True, slots=True)
class Models:
    """A run's models."""

    teachers: Mapping[str, Model]
    student: Model

    def of(self, engine: Engine) -> Model:
        """What an engine runs."""
        if engine.name in ("rollout", REFERENCE):
            return self.student
        return self.teachers.get(engine.name, self.teachers[DEFAULT])


@dataclass(frozen=True, slots=True)
class SizedEngine:
    """An engine pool with the memory of each of its engines."""

    engine: Engine
    model: Model
    itemsize: int
    max_model_len: int
    gpu_bytes: int
    """Its share of the memory of its smallest GPU; 0 on the CPU."""
    memory: EngineMemory

    @property
    def shape(self) -> ModelShape:
        return self.model.shape


@dataclass(frozen=True, slots=True)
class SizedLearner:
    """The learner with the memory of its rank 0."""

    itemsize: int
    gpu_bytes: int
    """As of :class:`SizedEngine`."""
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of a node that are not its GPUs'."""

    actors: int
    object_store: int
    shm: int
    """/dev/shm, object store included."""

    @property
    def total(self) -> int:
        return self.actors + self.object_store


@dataclass(frozen=True, slots=True)
class SizedPhase:
    """A phase with the memory of its parts."""

    phase: Phase
    objective: Objective | None
    work: Workload
    """A step with the mean lengths; of the phase ``generate`` the whole of it."""
    engines: tuple[SizedEngine, ...]
    learner: SizedLearner | None
    signal_row: int
    """Bytes of a response token's signal; 0 where no teacher sends any."""
    store_row: int
    """Bytes of a response token in the object store: signals of teacher and reference, candidates."""
    batches: int
    """Batches whose signals are there at once."""

    @property
    def signal_bytes(self) -> int:
        """Of the signals of one step."""
        return self.signal_row * self.work.rows

    @property
    def store_bytes(self) -> int:
        """Of all that the object store holds for the phase, each once."""
        return self.store_row * self.work.rows * self.batches


def load_models(config: Config) -> Models:
    """Checks the settings, reads the models' configurations, and checks that they go together.

    Raises:
        ConfigError: as :func:`s2w.launch.check.check`, as far as neither weights nor tokenizers nor prompts are needed.
    """
    teachers = check_settings(config)
    models = Models(
        {name: Model.of(model_config(settings.model, settings.revision)) for name, settings in teachers.items()},
        Model.of(student_config(config.student)),
    )
    engines: list[tuple[str, TeacherConfig | RolloutConfig, Model]] = [
        *((section(name), settings, models.teachers[name]) for name, settings in teachers.items()),
        ("rollout", config.rollout, models.student),
    ]
    if on_policy(config).needs_reference:
        settings = reference_settings(config, config.student.model, config.student.revision)
        engines.append((REFERENCE, settings, models.student))
    for name, engine, model in engines:
        check_engine(name, engine, model.config)
    contexts = {name: model.shape.context for name, model in models.teachers.items()}
    check_lengths(config, teachers, contexts, models.student.shape.context, generating=False)
    return models


def size_phase(
    config: Config, models: Models, phase: Phase, placement: Placement | None, machines: Sequence[Machine], device: str
) -> SizedPhase:
    """Memory of a phase's parts.

    Args:
        placement: None where the phase has no place; the largest GPU of the cluster is then taken for all.
    """
    memories = {machine.node.name: machine.gpu_bytes for machine in machines}

    def gpu_bytes(name: str, share: float) -> int:
        placed = placement.of(name) if placement else []
        whole = min((memories[node] for one in placed for node in one.nodes), default=max(memories.values()))
        return int(whole * share)

    longest = _longest(config, phase)
    engines = []
    for engine in phase.engines:
        model, itemsize = models.of(engine), itemsize_of(engine.settings.dtype, device)
        length = getattr(engine.settings, "max_model_len", None) or longest
        memory_there = gpu_bytes(engine.name, engine.settings.gpus)
        memory = engine_memory(
            model.shape,
            engine.settings,
            device=device,
            itemsize=itemsize,
            max_model_len=length,
            gpu_bytes=memory_there,
            swapped=engine.name == "rollout",
        )
        engines.append(SizedEngine(engine, model, itemsize, length, memory_there, memory))
    if phase.name == GENERATE:
        return SizedPhase(phase, None, generation_work(config), tuple(engines), None, 0, 0, 1)

    objective = off_policy(config) if phase.name == OFF_POLICY else on_policy(config)
    work = off_policy_step(config) if phase.name == OFF_POLICY else on_policy_step(config)
    rows = {
        engine.engine.name: signal_row_bytes(
            config,
            engine.shape.hidden_size,
            resolve_dtype(engine.engine.settings.dtype, device),
            sampled=objective.teacher_log_probs and engine.engine.name != REFERENCE,
        )
        for engine in engines
        if engine.engine.name != "rollout"
    }
    # A response is scored by one of the teachers, and by the reference: the largest signal counts.
    signal = max((row for name, row in rows.items() if name != REFERENCE), default=0) if objective.signals else 0
    candidates = candidate_row_bytes(config) if phase.name != OFF_POLICY else 0
    ahead = config.loop.max_staleness if phase.name != OFF_POLICY else 0
    there = gpu_bytes("learner", config.learner.gpus)
    learner = _learner(config, models, engines, work, signal, longest, there, device)
    store = signal + rows.get(REFERENCE, 0) + candidates
    return SizedPhase(phase, objective, work, tuple(engines), learner, signal, store, 1 + ahead)


def hosts(config: Config, phase: SizedPhase, placement: Placement, device: str) -> dict[str, HostMemory]:
    """Memory beside the GPUs, by the name of the node."""
    actors = dict.fromkeys((node.name for node in placement.nodes), 0)
    shm, made, read = dict(actors), dict.fromkeys(actors, 0.0), dict.fromkeys(actors, 0.0)
    actors[placement.nodes[0].name] += DRIVER_BYTES
    sized = {engine.engine.name: engine for engine in phase.engines}
    scorers = [one for one in placement.placed if one.demand.name in sized and one.demand.name != "rollout"]
    for placed in placement.placed:
        first, count = placed.workers[0].node, len(placed.workers)
        if engine := sized.get(placed.demand.name):
            if device == "cpu":
                actors[first] += engine.memory.total
            else:
                actors[first] += CPU_ACTOR_BYTES + CPU_CORE_BYTES
            if placed in scorers:
                made[first] += 1 / len(scorers)
            shm[first] += RING_BYTES if count > 1 else 0
        for rank, worker in enumerate(placed.workers):
            if device == "cuda":
                actors[worker.node] += GPU_WORKER_HOST_BYTES
                shm[worker.node] += NCCL_SHM_BYTES if count > 1 else 0
            if placed.demand.name == "learner" and phase.learner is not None:
                read[worker.node] += 1 / count
                actors[worker.node] += _rank_host(config, phase.learner, rank, device)
    step = phase.store_row * phase.work.rows
    found = {}
    for name in actors:
        # A rank's signals are copied to its node, unless a teacher on it has made them.
        share = made[name] * phase.batches + read[name] * (1 - made[name])
        store = round(step * share)
        found[name] = HostMemory(actors[name], store, shm[name] + store)
    return found


def generation_work(config: Config) -> Workload:
    """All of the teacher's responses that the off-policy phase generates."""
    off = config.off_policy
    modes = len(config.data.modes) or 2
    count = off.prompts or (config.data.train_prompts if config.data.tasks else None)
    if count is None:  # A file, which is not read here: as many as the updates need.
        count = -(-off.steps * off.responses_per_step // (modes * off.samples_per_prompt))
    one = off_policy_step(config)
    return Workload(count * modes, count * modes * off.samples_per_prompt, one.prompt_tokens, one.response_tokens)


def itemsize_of(dtype: str, device: str) -> int:
    """Bytes of a number in the dtype of a setting."""
    return getattr(torch, resolve_dtype(dtype, device)).itemsize


def _longest(config: Config, phase: Phase) -> int:
    """Longest prompt plus response of a phase, tokens."""
    longest = config.rollout.max_tokens
    if phase.name in (GENERATE, OFF_POLICY):
        longest = config.off_policy.max_tokens
    elif off_policy_prompts(config.loop):
        longest = max(longest, config.off_policy.max_tokens)
    return config.data.max_prompt_tokens + longest


def _learner(
    config: Config,
    models: Models,
    engines: Sequence[SizedEngine],
    work: Workload,
    signal: int,
    longest: int,
    gpu_bytes: int,
    device: str,
) -> SizedLearner:
    learner, itemsize = config.learner, itemsize_of(config.learner.dtype, device)
    hidden = config.signal.kind == "hidden" and signal > 0
    scoring = [engine for engine in engines if engine.engine.name != "rollout"]
    # A micro-batch is as full as the budget allows, and no fuller than a rank's share of the step.
    tokens = max(longest, min(learner.tokens_per_micro_batch, -(-work.samples // learner.ranks) * longest))
    response = longest - config.data.max_prompt_tokens
    parts = rank_memory(
        models.student.shape,
        learner,
        LargestBatch(tokens, longest, tokens * response // longest, config.loss.chunk_rows),
        device=device,
        itemsize=itemsize,
        heads=[engine.shape.hidden_size for engine in scoring] if hidden else [],
        signal_row=signal,
        engine_itemsize=itemsize_of(config.rollout.dtype, device),
    )
    return SizedLearner(itemsize, gpu_bytes, parts)


def _rank_host(config: Config, learner: SizedLearner, rank: int, device: str) -> int:
    """Host memory of a rank: on the CPU all of it; beside a GPU the student that it reads, and a checkpoint's shard."""
    if device == "cpu":
        return learner.total - (learner.parts["swap segment"] if rank else 0)
    # Every rank reads the whole student on the host, at ZeRO stage 3 rank 0 alone.
    stage3 = config.learner.zero_stage == 3
    whole = learner.parts["weights"] * (config.learner.ranks if stage3 else 1)
    shard = min(MAX_SHARD_BYTES, whole) if rank == 0 else 0
    return (0 if stage3 and rank else whole) + shard
