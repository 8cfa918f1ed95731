"""What does not fit, with the number that is over, and the settings that would help; what is idle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from s2w.config.schema import Config, LearnerConfig, RolloutConfig
from s2w.errors import ConfigError
from s2w.launch.nodes import Machine
from s2w.launch.placement import Placement
from s2w.launch.sizing import HostMemory, Models, SizedEngine, SizedLearner, SizedPhase, size_phase
from s2w.models.parallel import check_parallel
from s2w.plan.engine_memory import GIB, engine_memory
from s2w.plan.learner_memory import GPU_LIMIT

LAYOUTS = [(tensor, stages) for stages in (1, 2, 4) for tensor in (1, 2, 4, 8)]
"""Tensor and pipeline parallel sizes that are tried, smallest first."""
SMALL_CHUNK = 256
"""Rows of the loss's buffers below which its products become slow."""
IDLE = 0.35
"""Share of a step below which a part is called mostly idle."""


def engine_problems(phase: SizedPhase, widest: int) -> Iterator[str]:
    """Engines that do not fit their GPUs.

    Args:
        widest: GPUs of the largest node.
    """
    for sized in phase.engines:
        if not sized.gpu_bytes:
            continue
        name, memory, section = sized.engine.name, sized.memory, sized.engine.section
        utilization = sized.engine.settings.gpu_memory_utilization
        cache, sequences = memory.parts["KV cache"], memory.sequences(sized.max_model_len)
        if sequences < 1:
            needs = sum(size for part, size in memory.parts.items() if part != "KV cache")
            one = memory.kv_token * sized.max_model_len
            over = (needs + one - memory.share) / GIB
            yield (
                f"{name}: {needs / GIB:.1f} GiB of weights and working memory and {one / GIB:.1f} GiB of KV cache for "
                f"one sequence of {sized.max_model_len:,} tokens are {over:.1f} GiB more than the "
                f"{memory.share / GIB:.1f} GiB of {section}.gpu_memory_utilization={utilization:g}: "
                f"{_layout(sized, widest)}"
            )
        elif (beside := sum(memory.beside.values())) > sized.gpu_bytes - memory.share:
            what, free = " and ".join(memory.beside), sized.gpu_bytes - memory.share
            fitting = (sized.gpu_bytes - beside) / sized.gpu_bytes
            yield (
                f"{name}: {what} take {beside / GIB:.1f} GiB beside what vLLM accounts for, "
                f"{(beside - free) / GIB:.1f} GiB more than it leaves free: write {section}.gpu_memory_utilization="
                f"{int(fitting * 100) / 100:g}, which leaves {cache / GIB - (beside - free) / GIB:.1f} GiB of KV cache"
            )


def learner_problem(
    config: Config, models: Models, phase: SizedPhase, placement: Placement | None, machines: Sequence[Machine]
) -> str | None:
    """Why the learner does not fit its GPUs."""
    learner = phase.learner
    if learner is None or not learner.gpu_bytes:
        return None
    over = _over(config.learner, learner)
    if over <= 0:
        return None
    largest = sorted(learner.parts.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    limit = learner.gpu_bytes * GPU_LIMIT
    sentence = (
        f"learner: a rank takes {learner.total / GIB:.1f} GiB ({parts}), {over / GIB:.1f} GiB more than the "
        f"{limit / GIB:.1f} GiB of its GPU that can be filled"
    )

    def fits(changes: Mapping[str, object]) -> bool:
        return _over_with(config, changes, models, phase, placement, machines) <= 0

    tried: dict[str, object] = {}
    for setting, value in _steps(config):
        tried[setting] = value
        if fits(tried):
            for name in list(tried):  # Those that the last one makes unnecessary.
                fewer = {other: value for other, value in tried.items() if other != name}
                tried = fewer if fits(fewer) else tried
            return f"{sentence}: write {_written(tried)}"
    return f"{sentence}, and not with {_written(tried)} either: write a smaller rollout.max_tokens"


def host_problems(phase: SizedPhase, found: Mapping[str, HostMemory], machines: Sequence[Machine]) -> Iterator[str]:
    """Nodes whose host memory, /dev/shm or object store is too small; the worst of each."""
    known = {machine.node.name: machine for machine in machines}
    # Of each: what it is called, bytes needed, bytes there, what helps.
    limits: list[tuple[str, Callable[[HostMemory], int], Callable[[Machine], int | None], str]] = [
        ("of object store", lambda host: host.object_store, lambda node: node.object_store, _fewer_bytes(phase)),
        ("of /dev/shm", lambda host: host.shm, lambda node: node.shm, "give the container more (--shm-size)"),
        ("of host memory", lambda host: host.total, lambda node: node.memory, "write fewer actors, or add nodes"),
    ]
    for what, need, limit, remedy in limits:
        over = {}
        for name, host in found.items():
            if (there := limit(known[name])) is not None and need(host) > there:
                over[name] = need(host) - there
        if over:
            worst = max(over, key=lambda name: over[name])
            count = f" and {len(over) - 1} more nodes" if len(over) > 1 else ""
            yield (
                f"{worst}{count}: {need(found[worst]) / GIB:.1f} GiB {what} are needed, {over[worst] / GIB:.1f} GiB "
                f"more than there are: {remedy}"
            )


def idle_parts(config: Config, seconds: Mapping[str, float], placement: Placement) -> Iterator[str]:
    """Parts whose GPUs do nothing for most of a step."""
    ways = {
        "teacher": ("score", "teacher.replicas", config.teacher.replicas),
        "rollout": ("generate", "rollout.engines", config.rollout.engines),
        "learner": ("learn", "", 1),
    }
    idle = False
    for name, (stage, setting, count) in ways.items():
        gpus = sum(len(placed.workers) for placed in placement.of(name) if placed.workers[0].gpu is not None)
        busy = seconds[stage] / seconds["step"] if seconds["step"] else 1.0
        if gpus and busy < IDLE:
            idle = True
            fewer = max(1, math.ceil(count * busy / (2 * IDLE)))
            instead = f": {setting}={fewer} would do" if fewer < count else ""
            which = f"{gpus} GPUs work" if gpus > 1 else "GPU works"
            yield f"the {name}'s {which} {busy:.0%} of a step{instead}"
    if idle and config.loop.max_staleness == 0:
        yield "loop.max_staleness=1 generates and scores the next batch while the learner works"


def small_caches(phase: SizedPhase) -> Iterator[str]:
    """Engines that generate, and whose KV cache holds fewer sequences than they may run."""
    for sized in phase.engines:
        settings, sequence = sized.engine.settings, phase.work.sequence
        if not sized.gpu_bytes or not isinstance(settings, RolloutConfig):
            continue
        if 0 < (held := sized.memory.sequences(sequence)) < settings.max_sequences:
            yield (
                f"{sized.engine.name}: its KV cache holds {held} sequences of {sequence:,} tokens, not the "
                f"{settings.max_sequences} of {sized.engine.section}.max_sequences: what is above waits"
            )


def _layout(sized: SizedEngine, widest: int) -> str:
    """The smallest layout that fits, as advice."""
    settings, section = sized.engine.settings, sized.engine.section
    for tensor, stages in LAYOUTS:
        if tensor > widest or tensor * stages <= settings.tensor_parallel * settings.pipeline_parallel:
            continue
        other = dataclasses.replace(settings, tensor_parallel=tensor, pipeline_parallel=stages)
        try:
            check_parallel(
                section,
                sized.model.config,
                tensor_parallel=tensor,
                pipeline_parallel=stages,
                expert_parallel=other.expert_parallel,
            )
        except ConfigError:
            continue
        memory = engine_memory(
            sized.shape,
            other,
            device="cuda",
            itemsize=sized.itemsize,
            max_model_len=sized.max_model_len,
            gpu_bytes=sized.gpu_bytes,
            swapped=sized.engine.name == "rollout",
        )
        if memory.sequences(sized.max_model_len) >= 1:
            split = f" {section}.pipeline_parallel={stages}" if stages != settings.pipeline_parallel else ""
            return f"write {section}.tensor_parallel={tensor}{split}, an FP8 checkpoint, or fewer tokens"
    return "take an FP8 checkpoint, fewer tokens, or GPUs with more memory"


def _steps(config: Config) -> Iterator[tuple[str, object]]:
    """Settings of the learner that save memory, cheapest first; each is tried on top of those before it."""
    learner = config.learner
    if not learner.activation_checkpointing:
        yield "learner.activation_checkpointing", True
    if config.loss.chunk_rows > SMALL_CHUNK:
        yield "loss.chunk_rows", SMALL_CHUNK
    if learner.zero_stage < 2:
        yield "learner.zero_stage", 2
    if learner.zero_stage < 3 and learner.ranks > 1:
        yield "learner.zero_stage", 3
    for factor in (2, 4, 8):
        yield "learner.ranks", learner.ranks * factor
        if learner.zero_stage < 3:
            yield "learner.zero_stage", 3


def _over_with(
    config: Config,
    changes: Mapping[str, object],
    models: Models,
    phase: SizedPhase,
    placement: Placement | None,
    machines: Sequence[Machine],
) -> float:
    """Bytes that the learner is over with some settings changed."""
    sections: dict[str, dict[str, object]] = {"learner": {}, "loss": {}}
    for setting, value in changes.items():
        section, _, name = setting.partition(".")
        sections[section][name] = value
    other = dataclasses.replace(
        config,
        learner=dataclasses.replace(config.learner, **sections["learner"]),  # type: ignore[arg-type]
        loss=dataclasses.replace(config.loss, **sections["loss"]),  # type: ignore[arg-type]
    )
    learner = size_phase(other, models, phase.phase, placement, machines, "cuda").learner
    assert learner is not None
    return _over(other.learner, learner)


def _over(settings: LearnerConfig, learner: SizedLearner) -> float:
    return learner.total - learner.gpu_bytes * GPU_LIMIT


def _fewer_bytes(phase: SizedPhase) -> str:
    return (
        f"a step has {phase.store_row * phase.work.rows / GIB:.1f} GiB of signals: write signal.dtype=float8, "
        "signal.kind=topk, or a smaller loop.prompts_per_step"
    )


def _written(changes: Mapping[str, object]) -> str:
    """Settings as on a command line."""
    return " ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in changes.items()
    )
