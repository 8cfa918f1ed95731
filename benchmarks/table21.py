"""The Qwen3 report's Table 21 in small: on-policy distillation against GRPO and against more off-policy learning.

    python benchmarks/table21.py --json table21.json

For each seed, on the testbed (``experiment=testbed``: a Qwen3-MoE of 1M parameters teaches a dense Qwen3 of 0.1M to add
three numbers, in both modes): off-policy learning to its plateau on held-out prompts; then, from that checkpoint,

- ``on_policy``: on-policy distillation, the second phase of the experiment;
- ``grpo``: policy gradient of the verified answers, same rollout engines, same learner;
- ``more_off_policy``: further updates on the teacher's responses.

Each arm is a run of ``s2w train``, and each of the four checkpoints is measured by ``s2w eval`` on held-out problems:
pass@1 and pass@64, both modes, sampled at temperature 1. A value is the mean over the problems of all seeds, with a
95 % interval from resampling seeds and, within them, problems.

Compute, by stage (generate, score, learn), without what the arm started from and without start-up:

- ``flops``: 2 N a token for a forward pass and 6 N for an update, N being the parameters that a token is multiplied
  with (of a MoE the experts that it visits), plus 4 x layers x heads x head size x context / 2 a token of attention for
  each of them (Kaplan et al. 2020, arXiv 2001.08361, table 1); generated tokens count their prompts once a response.
- ``core_seconds``: CPU time of the processes of each stage.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors import safe_open
from transformers import AutoConfig

from s2w.config.compose import compose, compose_as
from s2w.config.schema import Config, EvalRun
from s2w.eval.scores import ProblemCount
from s2w.eval.statistics import RESAMPLES, pass_at_k
from s2w.launch.evaluate import evaluate
from s2w.launch.run_directory import CHECKPOINTS, OFF_POLICY_CHECKPOINTS
from s2w.launch.train import train
from s2w.learner import checkpoint
from s2w.models.checkpoint import read_checkpoint
from s2w.records import Scored
from s2w.teacher_data.generate import teacher_prompts

ARMS = ("off_policy", "on_policy", "grpo", "more_off_policy")
MODES = ("think", "no_think")
KS = (1, 64)
STAGES = {"ray::RolloutEngine": "generate", "ray::TeacherEngine": "score", "ray::LearnerRank": "learn"}
"""Which stage a process of that name, with its children, works for."""
SAMPLE_S = 0.5
"""Between two looks at the processes."""
EXPERIMENT = [
    "experiment=testbed", "run.tensorboard=false", "data.heldout_prompts=32", "off_policy.heldout_responses=32",
    "teacher.tensor_parallel=1", "teacher.expert_parallel=false",
]  # fmt: skip
SETTINGS: dict[str, list[str]] = {
    "off_policy": ["loop.steps=0", "off_policy.prompts=200", "off_policy.steps=700"],
    "on_policy": [],
    "grpo": [
        "loss.objective=grpo",
        "loop.prompts_per_step=32",
        "loop.samples_per_prompt=16",
        "loop.steps=40",
        "learner.learning_rate=3e-4",
        "learner.warmup_steps=10",
    ],
    "more_off_policy": ["loop.steps=0", "off_policy.steps=1300", "off_policy.learning_rate=1e-3"],
}
"""Each arm's own settings, over those of the experiment."""


@dataclass
class Arm:
    """What one arm of one seed cost, and how its student does."""

    checkpoint: Path
    rollouts: int = 0
    flops: dict[str, float] = field(default_factory=dict)
    core_seconds: dict[str, float] = field(default_factory=dict)
    wall_seconds: float = 0.0
    problems: list[ProblemCount] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--problems", type=int, default=24, help="held-out problems of a seed, in each mode")
    parser.add_argument("--samples", type=int, default=64, help="responses to each, at least the largest k")
    parser.add_argument("--directory", type=Path, default=Path("runs/table21"), help="of the runs; emptied first")
    parser.add_argument("--arms", nargs="+", choices=ARMS[1:], default=ARMS[1:])
    parser.add_argument("overrides", nargs="*", help="ARM:SETTING=VALUE, as grpo:learner.learning_rate=1e-3")
    options = parser.parse_args()
    settings = {arm: list(own) for arm, own in SETTINGS.items()}
    for override in options.overrides:
        arm, _, setting = override.partition(":")
        settings[arm].append(setting)
    shutil.rmtree(options.directory, ignore_errors=True)
    began = time.time()
    seeds = []
    for seed in range(options.seeds):
        seeds.append(run_seed(seed, options, settings))
        results = summarise(seeds)
        results |= {"seeds": len(seeds), "settings": settings, "wall_seconds": time.time() - began}
        if options.json:  # after each seed: nothing that was computed is lost
            options.json.write_text(json.dumps(results, indent=2) + "\n")
        print(table(results), flush=True)
    return 0


def run_seed(seed: int, options: argparse.Namespace, settings: dict[str, list[str]]) -> dict[str, Arm]:
    """All arms of one seed, measured."""
    root: Path = options.directory / f"seed_{seed}"
    base = [*EXPERIMENT, f"run.seed={seed}"]
    arms = {"off_policy": run_arm([*base, *settings["off_policy"]], root / "off_policy")}
    start = arms["off_policy"].checkpoint
    for arm in options.arms:
        overrides = [*base, f"student.model={start}", "student.init=checkpoint"]
        if arm == "more_off_policy":
            overrides.append(f"off_policy.path={root / 'off_policy' / 'off_policy'}")
        else:
            overrides.append("off_policy.steps=0")
        arms[arm] = run_arm([*overrides, *settings[arm]], root / arm)
    for arm, result in arms.items():
        print(f"\nseed {seed}, {arm}: {result.checkpoint}", flush=True)
        result.problems = evaluate_checkpoint(
            result.checkpoint, options.problems, options.samples, seed, output=root / arm / "eval.json"
        )
    return arms


def evaluate_checkpoint(
    model: Path, problems: int, samples: int, seed: int, output: Path | None = None
) -> list[ProblemCount]:
    """How often each held-out problem is solved, in both modes."""
    overrides = [
        f"model={model}", "cluster=local", "eval.tasks=[column_addition]", f"eval.problems={problems}",
        f"eval.samples={samples}", f"eval.seed={seed}", "rollout.max_tokens=80", "rollout.enforce_eager=true",
        "rollout.max_sequences=256", "rollout.dtype=float32",
    ]  # fmt: skip
    return evaluate(compose_as(EvalRun, [*overrides, *([f"eval.output={output}"] if output else [])])).problems


def run_arm(overrides: list[str], directory: Path) -> Arm:
    """One run of ``s2w train``, with its cost."""
    config = compose([*overrides, f"run.dir={directory}"])
    tokens = TokenCount()
    began = time.time()
    with CpuClock(directory) as clock:
        if train(config, tokens.add):
            raise SystemExit("interrupted")
    on_policy = config.loop.steps > 0
    last = checkpoint.latest(directory / (CHECKPOINTS if on_policy else OFF_POLICY_CHECKPOINTS))
    assert last is not None
    if not on_policy:
        tokens.add_off_policy(config, directory)
    arm = Arm(last, tokens.rollouts, wall_seconds=time.time() - began)
    student, teacher = Size.of(last), Size.of(Path(config.teacher.model))
    writer = student if on_policy else teacher
    arm.flops = {
        "generate": writer.forward(tokens.written, tokens.context),
        "score": teacher.forward(tokens.scored, tokens.context),
        "learn": 3 * student.forward(tokens.learned, tokens.context),
    }
    arm.core_seconds = clock.seconds("on_policy" if on_policy else "off_policy")
    return arm


@dataclass
class TokenCount:
    """Tokens of a run's training batches; held-out ones do not count."""

    rollouts: int = 0
    written: int = 0
    scored: int = 0
    learned: int = 0

    @property
    def context(self) -> float:
        """Mean length of a sequence."""
        return self.learned / max(1, self.rollouts)

    def add(self, samples: list[Scored]) -> None:
        """An on-policy batch."""
        if "/heldout/" in samples[0].rollout.prompt.uid:
            return
        tokens = sum(len(sample.rollout.input_ids) for sample in samples)
        self.rollouts += len(samples)
        self.written += tokens
        self.learned += tokens
        self.scored += sum(len(sample.rollout.input_ids) for sample in samples if sample.signal)

    def add_off_policy(self, config: Config, directory: Path) -> None:
        """The off-policy phase: what the teacher wrote, if it wrote any, and what was learned of it."""
        steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        responses = sum(step["responses"] for step in steps)
        prompts = teacher_prompts(config, read_checkpoint(config.student.model).tokenizer)
        prompt_length = float(np.mean([len(prompt.token_ids) for prompt in prompts]))
        length = sum(step["response_tokens"] for step in steps) / responses + prompt_length
        self.learned = int(responses * length)
        self.rollouts = responses
        filters = json.loads((directory / "off_policy" / "filters.json").read_text())
        generated = any((directory / "off_policy").glob("shard-*"))
        self.written = int(filters["responses"] * length) if generated else 0


@dataclass(frozen=True)
class Size:
    """What a model multiplies a token with."""

    parameters: int
    """Of matrices that a token visits: the head and the experts it is sent to, not the embedding."""
    attention: int
    """layers x heads x head size."""

    @classmethod
    def of(cls, path: Path) -> Size:
        config = AutoConfig.from_pretrained(path)
        parameters = 0.0
        with safe_open(path / "model.safetensors", "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                shape = tensors.get_slice(name).get_shape()
                if len(shape) < 2 or (name.endswith("embed_tokens.weight") and not config.tie_word_embeddings):
                    continue
                share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1.0
                parameters += share * int(np.prod(shape))
        return cls(int(parameters), config.num_hidden_layers * config.num_attention_heads * config.head_dim)

    def forward(self, tokens: int, context: float) -> float:
        """FLOPs of forward passes over ``tokens`` in sequences of ``context`` tokens."""
        return tokens * (2.0 * self.parameters + 4.0 * self.attention * context / 2)


class CpuClock:
    """Watches the CPU time of a run's processes from a thread; a context manager.

    A phase is measured between its first and its last step, and the first one, with which the start-up ends, is added
    as a mean one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.looks: list[tuple[dict[str, int], dict[str, float]]] = []
        """Progress of each phase (steps done, responses' shards written) and CPU seconds of each stage."""
        self._of_process: dict[tuple[int, float], tuple[str, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CpuClock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def seconds(self, phase: str) -> dict[str, float]:
        """CPU seconds of ``phase`` by stage; of off_policy also what the teacher's generation took."""
        spent = self._between(phase)
        if phase == "off_policy" and (shards := self._between("shards")):
            spent["generate"] = shards.get("generate", 0.0)
        return spent

    def _between(self, what: str) -> dict[str, float]:
        looks = [(progress[what], cpu) for progress, cpu in self.looks if progress.get(what)]
        if not looks:
            return {}
        (first, start), (last, stop) = looks[0], next(look for look in looks if look[0] == looks[-1][0])
        if last == first:
            return {}
        return {stage: (stop[stage] - start.get(stage, 0.0)) * last / (last - first) for stage in stop}

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.looks.append((self._progress(), self._cpu()))

    def _progress(self) -> dict[str, int]:
        metrics = self.directory / "metrics.jsonl"
        counts: defaultdict[str, int] = defaultdict(int)
        if metrics.exists():
            for line in metrics.read_text().splitlines():
                counts["on_policy" if '"phase": "on_policy"' in line else "off_policy"] += 1
        counts["shards"] = len(list((self.directory / "off_policy").glob("shard-*")))
        return counts

    def _cpu(self) -> dict[str, float]:
        """CPU seconds of each stage so far, of processes that have ended too."""
        for process in psutil.Process().children(recursive=True):  # not those of other runs on this machine
            try:
                name = " ".join(process.cmdline())
                stage = next((stage for prefix, stage in STAGES.items() if name.startswith(prefix)), None)
                if stage:
                    for one in (process, *process.children(recursive=True)):
                        times = one.cpu_times()
                        self._of_process[one.pid, one.create_time()] = (stage, times.user + times.system)
            except psutil.Error:
                continue
        totals: defaultdict[str, float] = defaultdict(float)
        for stage, spent in self._of_process.values():
            totals[stage] += spent
        return dict(totals)


def summarise(seeds: Sequence[dict[str, Arm]]) -> dict[str, Any]:
    """``table21.json``: means over seeds, and each seed's own values."""
    arms: dict[str, Any] = {}
    for arm in seeds[0]:
        runs = [seed[arm] for seed in seeds]
        entry: dict[str, Any] = {}
        for mode in MODES:
            entry[mode] = {}
            for k in KS:
                values = [
                    [pass_at_k(p.samples, p.correct, k) for p in run.problems if p.mode == mode and p.samples >= k]
                    for run in runs
                ]
                if all(values):
                    entry[mode][f"pass{k}"] = interval(values)
                    entry[mode][f"pass{k}_by_seed"] = [float(np.mean(own)) for own in values]
        for name in ("flops", "core_seconds"):
            by_stage = {
                stage: float(np.mean([getattr(run, name).get(stage, 0.0) for run in runs])) for stage in STAGES.values()
            }
            entry[name] = sum(by_stage.values())
            entry[f"{name}_by_stage"] = by_stage
        entry["rollouts"] = float(np.mean([run.rollouts for run in runs]))
        entry["wall_seconds"] = float(np.mean([run.wall_seconds for run in runs]))
        arms[arm] = entry
    return {"arms": arms}


def interval(values: Sequence[Sequence[float]]) -> list[float]:
    """[mean, low, high]: 95 % percentile bootstrap that draws seeds, and then problems of each seed drawn."""
    random = np.random.default_rng(0)
    by_seed = np.asarray(values)
    seeds, problems = by_seed.shape
    drawn = random.integers(seeds, size=(RESAMPLES, seeds))
    means = np.zeros(RESAMPLES)
    for place in range(seeds):
        which = random.integers(problems, size=(RESAMPLES, problems))
        means += by_seed[drawn[:, place][:, None], which].mean(1) / seeds
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(by_seed.mean()), float(low), float(high)]


def table(results: dict[str, Any]) -> str:
    """The report's table, as text."""

    def cell(entry: list[float] | None) -> str:
        return f"{entry[0]:.3f} [{entry[1]:.3f}, {entry[2]:.3f}]" if entry else "-"

    head = [f"{mode} pass@{k}" for mode in MODES for k in KS]
    lines = [
        "",
        f"{'arm':<16}" + "".join(f"{name:>22}" for name in head) + f"{'GFLOP':>10}{'core s':>9}{'rollouts':>10}",
    ]
    for arm, entry in results["arms"].items():
        cells = [cell(entry[mode].get(f"pass{k}")) for mode in MODES for k in KS]
        lines.append(
            f"{arm:<16}"
            + "".join(f"{text:>22}" for text in cells)
            + f"{entry['flops'] / 1e9:>10,.0f}{entry['core_seconds']:>9,.0f}{entry['rollouts']:>10,.0f}"
        )
    lines.append("\ncore seconds by stage: " + "; ".join(_stages(arm, entry) for arm, entry in results["arms"].items()))
    return "\n".join(lines)


def _stages(arm: str, entry: dict[str, Any]) -> str:
    return f"{arm} " + ", ".join(f"{stage} {spent:,.0f}" for stage, spent in entry["core_seconds_by_stage"].items())


if __name__ == "__main__":
    sys.exit(main())
