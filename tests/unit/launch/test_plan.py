"""`s2w plan` for clusters that are only described."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from s2w import cli
from s2w.config.compose import compose
from s2w.errors import ConfigError
from s2w.launch.nodes import machines

TEN = "cluster.nodes=[{count: 10, gpus: 8, gpu_memory_gib: 80}]"
LARGE = [
    "teacher=qwen3_235b_a22b",
    "student=qwen3_8b",
    "rollout.engines=32",
    "rollout.max_tokens=32768",
    "learner.ranks=16",
    "learner.activation_checkpointing=true",
]
NODE = ["teacher=qwen3_32b", "student=qwen3_4b", "learner.ranks=2", "rollout.engines=2", "rollout.max_tokens=8192"]
KEYS = {
    "fits", "nodes", "gpu_memory_gib", "object_store_gib", "step_seconds", "gpu_hours", "assumptions",
}  # fmt: skip


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and a file of prompts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1 + 1"}\n')


def planned(tmp_path: Path, *overrides: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON."""
    file = tmp_path / "plan.json"
    code = cli.main(["plan", f"data.path={tmp_path}/prompts.jsonl", *overrides, "--json", str(file)])
    return code, json.loads(file.read_text())


def test_the_235b_teacher_on_ten_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = planned(tmp_path, *LARGE, TEN)
    assert code == 0 and plan["fits"] and plan["problems"] == []
    assert plan.keys() >= KEYS
    teacher, learner = plan["gpu_memory_gib"]["teacher"], plan["gpu_memory_gib"]["learner"]
    assert teacher["weights"] == pytest.approx(54.9, abs=0.1)
    # An eighth of 470 GB, but for what all ranks have.
    assert teacher["total"] < 80 and sum(v for k, v in teacher.items() if k != "total") == pytest.approx(
        teacher["total"]
    )
    assert learner["moments"] == pytest.approx(8 * 8.19e9 / 16 / 2**30, rel=0.01)
    # 64 responses of at most 32,768 tokens, 8 KiB each.
    assert plan["signal_bytes_per_step"] == 64 * 32_768 * 8192
    assert plan["object_store_gib"]["step"] == pytest.approx(16.0)
    seconds = plan["step_seconds"]
    assert seconds["step"] == pytest.approx(
        max(seconds["generate"], seconds["score"]) + seconds["learn"] + seconds["swap"]
    )
    assert plan["bottleneck"] == "generate"
    assert plan["gpu_hours"] == pytest.approx(100 * seconds["step"] * 64 / 3600)
    assert plan["nodes"][0]["workers"]["on-policy"] == [
        {"actor": "teacher 0", "rank": gpu, "gpu": gpu} for gpu in range(8)
    ]
    text = capsys.readouterr().out
    assert "node2  learner ranks 0-7 (GPUs 0-7)" in text and text.endswith("\nfits\n")
    assert "16 GPUs of the cluster have nothing to do" in text
    for line in plan["assumptions"]:
        assert line in text


def test_a_staler_policy_overlaps_and_keeps_more_signals(tmp_path: Path) -> None:
    _, now = planned(tmp_path, *NODE, "cluster.nodes=[{gpus: 8, gpu_memory_gib: 80}]")
    _, ahead = planned(tmp_path, *NODE, "cluster.nodes=[{gpus: 8, gpu_memory_gib: 80}]", "loop.max_staleness=2")
    seconds = ahead["step_seconds"]
    assert seconds["step"] == max(seconds["generate"], seconds["score"], seconds["learn"]) + seconds["swap"]
    assert seconds["step"] < now["step_seconds"]["step"]
    assert ahead["object_store_gib"]["at_once"] == 3 * now["object_store_gib"]["at_once"]


@pytest.mark.parametrize(
    ("overrides", "sentences"),
    [
        (
            [*NODE, "teacher.tensor_parallel=1", "cluster.nodes=[{gpus: 8, gpu_memory_gib: 48}]"],
            [r"^teacher: \d+\.\d GiB of weights and working memory and .* are \d+\.\d GiB more than the 43\.2 GiB of "
             r"teacher\.gpu_memory_utilization=0\.9: write teacher\.tensor_parallel=2, an FP8 checkpoint"],
        ),
        (
            [*NODE, "learner.zero_stage=1", "cluster.nodes=[{gpus: 8, gpu_memory_gib: 80}]"],
            [r"^learner: a rank takes \d+\.\d GiB \(activations .* more than the 76\.0 GiB of its GPU that can be "
             r"filled: write learner\.activation_checkpointing=true$"],
        ),
        (
            [*NODE, "cluster.nodes=[{gpus: 4, gpu_memory_gib: 80}]"],
            [r"^phase on-policy: the run asks for 8 GPUs \(teacher 4, rollout 2, learner 2\) and the cluster has 4$"],
        ),
        (
            [*LARGE, "loop.prompts_per_step=512", "loop.samples_per_prompt=16",
             "cluster.nodes=[{count: 10, gpus: 8, gpu_memory_gib: 80, memory_gib: 2000}]"],
            [r"^node0 and \d more nodes: \d+\.\d GiB of object store are needed, \d+\.\d GiB more than there are: a "
             r"step has 2048\.0 GiB of signals: write signal\.dtype=float8"],
        ),
        (
            [*NODE, "rollout.gpu_memory_utilization=0.98", "learner.activation_checkpointing=true",
             "cluster.nodes=[{gpus: 8, gpu_memory_gib: 80, shm_gib: 0.06}]"],
            [r"^rollout: weight transfer take .* write rollout\.gpu_memory_utilization=0\.9\d",
             r"^node: \d+\.\d GiB of /dev/shm are needed"],
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_has_its_number_and_a_remedy(
    tmp_path: Path, overrides: list[str], sentences: list[str]
) -> None:
    code, plan = planned(tmp_path, *overrides)
    assert code == 2 and not plan["fits"]
    for sentence in sentences:
        assert any(re.search(sentence, problem) for problem in plan["problems"]), plan["problems"]


def test_the_remedy_fits(tmp_path: Path) -> None:
    nodes = "cluster.nodes=[{gpus: 8, gpu_memory_gib: 80}]"
    code, _ = planned(tmp_path, *NODE, "learner.zero_stage=1", "learner.activation_checkpointing=true", nodes)
    assert code == 0


def test_both_phases(tmp_path: Path) -> None:
    code, plan = planned(
        tmp_path, *NODE, "off_policy={steps: 100, loss: divergence}", "learner.activation_checkpointing=true",
        "cluster.nodes=[{gpus: 8, gpu_memory_gib: 80}]",
    )  # fmt: skip
    assert code == 0
    phases = plan["phases"]
    assert list(phases) == ["generate", "off-policy", "on-policy"]
    assert (phases["generate"]["gpus"], phases["off-policy"]["gpus"], phases["on-policy"]["gpus"]) == (4, 6, 8)
    assert phases["off-policy"]["stages"]["score"] > 0
    assert plan["gpu_hours"] == pytest.approx(sum(phase["gpu_hours"] for phase in phases.values()))
    assert plan["gpu_memory_gib"].keys() == {"generator", "teacher", "rollout", "learner"}


def test_the_testbed_on_a_machine_without_gpus(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    nodes = "cluster.nodes=[{cpus: 2, memory_gib: 24}]"
    assert cli.main(["plan", "experiment=testbed", nodes, "--json", str(file)]) == 0
    plan = json.loads(file.read_text())
    assert plan["device"] == "cpu" and plan["gpu_memory_gib"] == {} and plan["gpu_hours"] == 0
    assert plan["process_memory_gib"].keys() == {"generator", "teacher", "rollout", "learner"}
    assert 2 < plan["process_memory_gib"]["teacher"]["total"] < 5
    assert plan["host_memory_gib"]["node"] < 24


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("cluster.nodes=[{gpus: 8}]", "cluster.nodes[0] has GPUs of unknown memory: add gpu_memory_gib: 80"),
        ("cluster.nodes=[{gpu: 8}]", "unknown setting cluster.nodes[0].gpu: did you mean gpus?"),
        ("cluster.nodes=[{count: 0}]", "cluster.nodes[0].count=0: must be >= 1"),
        ("cluster.nodes=[{gpus: a}]", "cluster.nodes[0].gpus: Value 'a'"),
        ("cluster.nodes=[{cpus: 1},{cpus: 2}]", "cluster.nodes has two nodes called 'node'"),
        ("cluster={device: cuda, nodes: [{cpus: 1}]}", "cluster.device=cuda, but cluster.nodes has no GPUs"),
        ("rollout.max_tokens=40000", "data.max_prompt_tokens + rollout.max_tokens = 41024 is more than the teacher's"),
        ("teacher.tensor_parallel=3", "teacher.tensor_parallel=3 does not divide the 64 attention heads"),
        ("learner.zero_stage=0", "learner.zero_stage=0 would accumulate gradients in bfloat16"),
        ("plan.prefill_utilization=2", "plan.prefill_utilization=2.0: must be > 0 and <= 1"),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, sentence: str) -> None:
    arguments = ["plan", f"data.path={tmp_path}/prompts.jsonl", *NODE, TEN, override]
    if override.startswith("cluster"):
        arguments.remove(TEN)
    assert cli.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_a_json_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", f"data.path={tmp_path}/prompts.jsonl", *NODE, TEN, "--json", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert "is a directory: write the name of a file" in capsys.readouterr().err


def test_machines_have_names_and_memory() -> None:
    entries = "[{count: 2, name: gpu, gpus: 8, gpu_memory_gib: 80, memory_gib: 1000}, {name: head, cpus: 16}]"
    config = compose(["experiment=testbed", "cluster.device=auto", f"cluster.nodes={entries}"])
    found, device = machines(config)
    assert device == "cuda" and [machine.node.name for machine in found] == ["gpu0", "gpu1", "head"]
    assert [machine.node.gpus for machine in found] == [8, 8, 0] and found[2].gpu_bytes == 0
    assert found[0].gpu_bytes == 80 * 2**30
    assert found[0].object_store == 200 * 10**9 and found[2].object_store is None
    with pytest.raises(ConfigError, match="has GPUs of unknown memory"):
        machines(compose(["experiment=testbed", "cluster.nodes=[{gpus: 1}]"]))
