"""Every objective from one off-policy checkpoint, for the same number of rollouts: what each does on the testbed.

    python benchmarks/objectives.py --json objectives.json

On ``experiment=testbed`` (a Qwen3-MoE of 1M parameters teaches a dense Qwen3 of 0.1M to add three numbers, in both
modes): one off-policy phase, then each arm is a run of ``s2w train`` from its checkpoint with another objective or
divergence, and ``s2w eval`` of what came out, on held-out problems sampled at temperature 1. Cost beside it: response
tokens that were sampled, the share of them that was trained on, core seconds of the processes of all stages. One seed:
the table says what runs and what moves, not which objective is best.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from table21 import EXPERIMENT, CpuClock, evaluate_checkpoint

from s2w.config.compose import compose
from s2w.launch.run_directory import CHECKPOINTS, OFF_POLICY_CHECKPOINTS
from s2w.launch.train import train
from s2w.learner import checkpoint

START = ["loop.steps=0", "off_policy.prompts=200", "off_policy.steps=700"]
REWARDED = ["loop.prompts_per_step=32", "loop.samples_per_prompt=4"]
ARMS: dict[str, list[str]] = {
    "divergence, reverse_kl": [],
    "divergence, forward_kl": ["loss.divergence=forward_kl"],
    "divergence, kl_mixture": ["loss.divergence=kl_mixture"],
    "divergence, entropy_aware_kl": ["loss.divergence=entropy_aware_kl", "loss.options.threshold=0.2"],
    "prefix": ["loss.objective=prefix"],
    "prefix, parted": [
        "loss.objective=prefix",
        "loss.options.part_nats=3",
        "loss.options.length_quantile=0.9",
        "loss.options.shortest=16",
    ],
    "stable": ["loss.objective=stable", "loss.options.reference_weight=0.01"],
    "kdrl": ["loss.objective=kdrl", "reward.weight=0.1", *REWARDED],
    "grpo": ["loss.objective=grpo", "learner.learning_rate=3e-4", *REWARDED],
    "negative": ["loss.objective=negative", "learner.learning_rate=1e-4"],
}
"""Settings of each arm, over those of the experiment. Privileged context is not among them: the testbed's models know
one form of prompt."""


@dataclass
class Result:
    """What an arm cost, and how its student does."""

    pass1: dict[str, float]
    """By mode."""
    response_length: float
    sampled_tokens: int
    trained_share: float
    core_seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--directory", type=Path, default=Path("runs/objectives"), help="of the runs; emptied first")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--problems", type=int, default=48, help="held-out problems, in each mode")
    parser.add_argument("--samples", type=int, default=16, help="responses to each")
    options = parser.parse_args()
    shutil.rmtree(options.directory, ignore_errors=True)
    base = [*EXPERIMENT, f"loop.steps={options.steps}"]
    first = options.directory / "start"
    run([*base, *START], first)
    start = checkpoint.latest(first / OFF_POLICY_CHECKPOINTS)
    assert start is not None
    results = {"start": Result(pass_at_1(start, options), float("nan"), 0, float("nan"), 0.0)}
    for name in options.arms:
        directory = options.directory / name.replace(", ", "_").replace(" ", "_")
        overrides = [*base, f"student.model={start}", "student.init=checkpoint", "off_policy.steps=0", *ARMS[name]]
        results[name] = run_arm(overrides, directory, options)
        if options.json:  # after each arm: nothing that was computed is lost
            options.json.write_text(json.dumps({key: asdict(one) for key, one in results.items()}, indent=2) + "\n")
        print(table(results), flush=True)
    return 0


def run(overrides: list[str], directory: Path) -> None:
    if train(compose([*overrides, f"run.dir={directory}"])):
        raise SystemExit("interrupted")


def run_arm(overrides: list[str], directory: Path, options: argparse.Namespace) -> Result:
    with CpuClock(directory) as clock:
        run(overrides, directory)
    last = checkpoint.latest(directory / CHECKPOINTS)
    assert last is not None
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    tokens = np.array([step["response_tokens"] for step in steps])
    trained = np.array([step.get("trained_share", 1.0) * (1 - step["left_out"]) for step in steps])
    return Result(
        pass1=pass_at_1(last, options),
        response_length=float(np.mean([step["response_length"] for step in steps[-5:]])),
        sampled_tokens=int(tokens.sum()),
        trained_share=float((trained * tokens).sum() / tokens.sum()),
        core_seconds=sum(clock.seconds("on_policy").values()),
    )


def pass_at_1(model: Path, options: argparse.Namespace) -> dict[str, float]:
    problems = evaluate_checkpoint(model, problems=options.problems, samples=options.samples, seed=0)
    modes = sorted({problem.mode for problem in problems})
    return {mode: float(np.mean([p.correct / p.samples for p in problems if p.mode == mode])) for mode in modes}


def table(results: dict[str, Result]) -> str:
    """In Markdown, a row an arm."""
    lines = [
        "| objective | think pass@1 | no_think pass@1 | length | sampled tokens | trained on | core seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in results.items():
        lines.append(
            f"| {name} | {one.pass1['think']:.3f} | {one.pass1['no_think']:.3f} | {one.response_length:.1f} | "
            f"{one.sampled_tokens:,} | {one.trained_share:.0%} | {one.core_seconds:.0f} |"
        )
    return "\n".join(lines).replace("nan%", "").replace("nan", "")


if __name__ == "__main__":
    sys.exit(main())
