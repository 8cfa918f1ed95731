"""The text of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from s2w.launch.placement import Placed, Placement
from s2w.launch.planned import REPORT_GPU_HOURS, Plan, PlannedPhase
from s2w.plan.engine_memory import GIB


def table(plan: Plan) -> str:
    """Places, memory, time, what does not fit, advice and assumptions."""
    lines: list[str] = []
    for phase in plan.phases:
        gpus = phase.placement.gpus if phase.placement else 0
        there = sum(machine.node.gpus for machine in plan.machines)
        lines.append(f"phase {phase.name}" + (f": {gpus} of {there} GPUs" if plan.device == "cuda" else ""))
        lines += places_of(phase.placement) if phase.placement else ["  no place, see below"]
        lines += ["", *_memory(phase, plan.device), ""]
    main = plan.phases[-1]
    lines += [*_bytes(main), ""]
    lines += [_time(phase, plan.device) for phase in plan.phases]
    if plan.device == "cuda":
        lines.append(
            f"{plan.gpu_hours:,.0f} GPU hours, {plan.cluster_hours:,.0f} if the whole cluster is held "
            f"(Qwen3's report for an 8B student: {REPORT_GPU_HOURS:,})"
        )
    for title, sentences in (("assumptions", plan.assumptions), ("advice", plan.advice)):
        if sentences:
            lines += ["", title, *(f"- {sentence}" for sentence in sentences)]
    verdict = [f"- {problem}" for problem in plan.problems]
    return "\n".join([*lines, "", *(["does not fit", *verdict] if verdict else ["fits"])])


def places_of(placement: Placement) -> Iterator[str]:
    """A line for each node that something runs on; neighbours with the same on them in one."""
    lines: list[tuple[str, str]] = []
    for node in placement.nodes:
        here = [
            (placed, [r for r, w in enumerate(placed.workers) if w.node == node.name]) for placed in placement.placed
        ]
        texts = ", ".join(_kinds([(placed, ranks) for placed, ranks in here if ranks]))
        if texts:
            lines.append((node.name, texts))
    width = max(len(name) for name, _ in lines)
    for name, texts in lines:
        yield f"  {name:{width}}  {texts}"


def _kinds(here: Sequence[tuple[Placed, list[int]]]) -> Iterator[str]:
    """What of each demand is on a node, with its GPUs: ``teacher 0 (GPUs 0-7)``."""
    kinds: dict[str, list[tuple[Placed, list[int]]]] = {}
    for placed, ranks in here:
        kinds.setdefault(placed.demand.name, []).append((placed, ranks))
    for name, members in kinds.items():
        gpus = [placed.workers[rank].gpu for placed, ranks in members for rank in ranks]
        where = f" ({'GPU' if len(gpus) == 1 else 'GPUs'} {_ranges(g for g in gpus if g is not None)})"
        placed, ranks = members[0]
        if placed.demand.kind == "ranks":
            what = f"{name} {'rank' if len(ranks) == 1 else 'ranks'} {_ranges(ranks)}"
        elif len(ranks) < len(placed.workers):
            what = f"{placed.name}, workers {_ranges(ranks)}"
        elif placed.demand.copies > 1:
            what = f"{name} {_ranges(one.copy for one, _ in members)}"
        else:
            what = name
        yield what + (where if gpus[0] is not None else "")


def _memory(phase: PlannedPhase, device: str) -> Iterator[str]:
    """Parts by actor, GiB."""
    columns = phase.parts
    limits = {sized.engine.name: sized.gpu_bytes for sized in phase.sized.engines}
    if phase.sized.learner is not None:
        limits["learner"] = phase.sized.learner.gpu_bytes
    names = list(dict.fromkeys(part for parts in columns.values() for part, size in parts.items() if size))
    yield f"  {'GiB of a GPU' if device == 'cuda' else 'GiB of processes':24}" + "".join(f"{n:>14}" for n in columns)
    for part in names:
        yield f"  {part:24}" + "".join(_gib(parts.get(part)) for parts in columns.values())
    yield f"  {'together':24}" + "".join(_gib(sum(parts.values())) for parts in columns.values())
    if device == "cuda":
        yield f"  {'of':24}" + "".join(_gib(limits[name]) for name in columns)
    for sized in phase.sized.engines:
        longest, mean = sized.max_model_len, phase.sized.work.sequence
        held = f"{sized.memory.sequences(longest):,} sequences of {longest:,} tokens"
        more = f", {sized.memory.sequences(mean):,} of {mean:,}" if mean != longest else ""
        yield f"  KV cache of {sized.engine.name}: {held}{more}; {sized.memory.kv_token:,} bytes a token"


def _bytes(phase: PlannedPhase) -> Iterator[str]:
    sized = phase.sized
    yield (
        f"signals: {sized.signal_row:,} bytes a token, {sized.signal_bytes / GIB:,.2f} GiB a step; "
        f"{sized.store_bytes / GIB:,.2f} GiB in the object store at once"
    )
    if phase.hosts:
        for what, values in (
            ("host memory", {name: host.total for name, host in phase.hosts.items()}),
            ("object store", {name: host.object_store for name, host in phase.hosts.items()}),
            ("/dev/shm", {name: host.shm for name, host in phase.hosts.items()}),
        ):
            most = max(values, key=lambda name: values[name])
            yield f"{what}: at most {values[most] / GIB:,.1f} GiB on a node ({most})"


def _time(phase: PlannedPhase, device: str) -> str:
    """Seconds of a step by stage, and what the phase takes."""
    hours = f"{phase.seconds / 3600:,.1f} h"
    whole = f"{hours}, {phase.gpu_hours:,.0f} GPU hours" if device == "cuda" else hours
    if phase.steps == 1:
        return f"{phase.name}: {whole}"
    stages = ", ".join(f"{stage} {_seconds(value)}" for stage, value in phase.stages.items() if stage != "step")
    step = f"a step {_seconds(phase.stages['step'])} ({stages}; most of it {phase.bottleneck})"
    return f"{phase.name}: {step}, {phase.steps:,} steps {whole}"


def _gib(size: int | None) -> str:
    return f"{'':>14}" if size is None else f"{size / GIB:14.2f}"


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s"


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3, 5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
