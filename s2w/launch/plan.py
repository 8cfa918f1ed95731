"""The program behind ``s2w plan``: whether a run fits a cluster, where everything goes, what a step and the run take.

From settings and configurations alone: nothing loads a model, and a cluster that is only described need not exist.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from s2w.config.schema import Config, TeacherConfig
from s2w.launch.check import check_gradients, check_output
from s2w.launch.demands import GENERATE, OFF_POLICY, ON_POLICY, phases
from s2w.launch.nodes import Machine, machines
from s2w.launch.placement import DoesNotFitError, Placement, place
from s2w.launch.plan_table import table
from s2w.launch.planned import Plan, PlannedPhase
from s2w.launch.remedies import (
    engine_problems,
    host_problems,
    idle_parts,
    learner_problem,
    small_caches,
)
from s2w.launch.sizing import HostMemory, Models, SizedEngine, SizedPhase, hosts, load_models, size_phase
from s2w.plan.duration import Rates, decoding, learning, scoring, swapping


def plan(config: Config, output: str | None = None) -> int:
    """Prints the plan; returns 0, or 2 where the run does not fit.

    Args:
        output: a JSON file to write.

    Raises:
        ConfigError: bad input.
    """
    if output is not None:
        check_output("--json", Path(output))
    made = make_plan(config)
    print(table(made))
    if output is not None:
        Path(output).write_text(json.dumps(made.as_json(), indent=2) + "\n")
    return 2 if made.problems else 0


def make_plan(config: Config) -> Plan:
    """The plan of a run.

    Raises:
        ConfigError: bad settings, an unknown model, or a cluster that does not answer.
    """
    models = load_models(config)
    found, device = machines(config)
    check_gradients(config, device)
    nodes = [machine.node for machine in found]
    widest = max(node.gpus for node in nodes)
    planned: list[PlannedPhase] = []
    problems: list[str] = []
    for phase in phases(config):
        placement = None
        try:
            placement = place(nodes, phase.demands(config, device))
        except DoesNotFitError as error:
            problems.append(f"phase {phase.name}: {error}")
        sized = size_phase(config, models, phase, placement, found, device)
        beside: dict[str, HostMemory] = {}
        if placement is not None:
            beside = hosts(config, sized, placement, device)
            problems += host_problems(sized, beside, found)
        problems += engine_problems(sized, widest)
        if problem := learner_problem(config, models, sized, placement, found):
            problems.append(problem)
        stages, steps = _stages(config, models, sized, placement, found, device)
        planned.append(PlannedPhase(sized, placement, beside, stages, steps))
    main = planned[-1]
    advice = list(small_caches(main.sized))
    if main.name == ON_POLICY and main.placement is not None and not problems:
        advice += idle_parts(config, main.stages, main.placement)
        if unused := sum(node.gpus for node in nodes) - max(p.placement.gpus for p in planned if p.placement):
            advice.append(f"{unused} GPUs of the cluster have nothing to do")
    return Plan(
        device,
        tuple(found),
        tuple(planned),
        tuple(dict.fromkeys(problems)),
        tuple(advice),
        tuple(_assumptions(config, planned, found, device)),
    )


def _stages(
    config: Config,
    models: Models,
    sized: SizedPhase,
    placement: Placement | None,
    found: Sequence[Machine],
    device: str,
) -> tuple[dict[str, float], int]:
    """Seconds by stage of a step, and the number of steps."""
    plan, work = config.plan, sized.work

    def rates(workers: int) -> Rates:
        """Of one worker: on the CPU the parts work in turn, and each shares the cores among its workers."""
        whole = Rates.of(plan, device)
        cores = min(sum(machine.node.cpus for machine in found), 1024)
        part = cores / workers if device == "cpu" else 1.0
        return Rates(whole.flops * part, whole.fp8_flops * part, whole.memory * part)

    def generated(engine: SizedEngine, longest: int) -> float:
        settings, held = engine.engine.settings, engine.memory.sequences(work.sequence)
        workers = settings.tensor_parallel * settings.pipeline_parallel * engine.engine.copies
        return decoding(
            engine.shape, settings, plan, rates(workers), work,
            engines=engine.engine.copies, held=held, longest=longest, itemsize=engine.itemsize,
            ahead=config.loop.max_staleness if sized.phase.name == ON_POLICY else 0,
        )  # fmt: skip

    if sized.phase.name == GENERATE:
        seconds = generated(sized.engines[0], config.off_policy.max_tokens)
        return {"generate": seconds, "step": seconds}, 1
    scores = []
    for engine in sized.engines:
        settings = engine.engine.settings
        if isinstance(settings, TeacherConfig) and sized.signal_row:
            world = settings.tensor_parallel * settings.pipeline_parallel
            head, itemsize = config.signal.kind != "hidden", engine.itemsize
            scores.append(scoring(engine.shape, settings, plan, rates(world), work, head=head, itemsize=itemsize))
    # Each response has one of the teachers: as long as the slowest would take for all.
    score = max(scores, default=0.0)
    width = max((e.shape.hidden_size for e in sized.engines if e.engine.name != "rollout"), default=0)
    ranks = placement.of("learner") if placement else []
    one_node = all(len(placed.nodes) == 1 for placed in ranks)
    learn = learning(
        models.student.shape, config.learner, plan, rates(config.learner.ranks), work,
        teacher_width=width if config.signal.kind == "hidden" and sized.signal_row else 0,
        itemsize=sized.learner.itemsize if sized.learner else 2, one_node=one_node,
    ).total  # fmt: skip
    if sized.phase.name == OFF_POLICY:
        return {"score": score, "learn": learn, "step": score + learn}, config.off_policy.steps
    rollout = next(engine for engine in sized.engines if engine.engine.name == "rollout")
    generate = generated(rollout, config.rollout.max_tokens)
    swap = swapping(
        models.student.shape, plan, itemsize=rollout.itemsize, device=device,
        one_node=placement is not None and len({n for p in placement.placed for n in p.nodes}) == 1,
    )  # fmt: skip
    ahead = max(generate, score)
    step = max(ahead, learn) + swap if config.loop.max_staleness else ahead + learn + swap
    stages = {"generate": generate, "score": score, "learn": learn, "swap": swap, "step": step}
    return stages, config.loop.steps


def _assumptions(config: Config, planned: Sequence[PlannedPhase], found: Sequence[Machine], device: str) -> list[str]:
    plan, work = config.plan, planned[-1].sized.work
    rates = Rates.of(plan, device)
    longest = "" if plan.response_tokens else ", the longest (plan.response_tokens)"
    unit = "GPU" if device == "cuda" else "core"
    lines = [
        f"prompts of {work.prompt_tokens:,} and responses of {work.response_tokens:,} tokens{longest}",
        f"a {unit}: {rates.flops / 1e12:g} TFLOP/s, {rates.fp8_flops / 1e12:g} in FP8, {rates.memory / 1e9:g} GB/s",
        f"shares of these rates: prefill {plan.prefill_utilization:g}, decoding {plan.decode_utilization:g}, learner "
        f"{plan.learner_utilization:g}; {plan.decode_overhead_ms:g} ms beside reading memory in each decoding step",
        f"between GPUs: {plan.node_gb_per_s:g} GB/s in a node, {plan.network_gb_per_s:g} between nodes, of which "
        f"{plan.network_utilization:g}; {plan.swap_pause_s:g} s of a swap beside the broadcast",
        "generation and scoring overlap; "
        + ("the learner works meanwhile" if config.loop.max_staleness else "the learner waits for both"),
        "not counted: held-out evaluations, checkpoints, grading, the start",
    ]
    if device == "cuda":
        lines.append("memory of GPUs by rule (docs/plan.md); not measured on a GPU yet")
    if any(machine.memory is None for machine in found):
        lines.append("host memory of the nodes is not known (memory_gib): it is not compared")
    if any(teacher.context or teacher.system_prompt for teacher in [config.teacher]):
        lines.append("what a teacher's context adds to a prompt is not counted")
    if config.data.path is not None and any(phase.name == GENERATE for phase in planned):
        lines.append("the teacher answers as many prompts as the updates need (off_policy.prompts)")
    return lines
