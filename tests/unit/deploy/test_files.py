"""What the other files of deploy/ say is what the project says: versions, files, settings."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from s2w.config.compose import compose
from s2w.launch.nodes import ACCELERATORS
from s2w.launch.plan import make_plan

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")


def test_the_image_is_that_of_the_pinned_vllm() -> None:
    assert (
        f"ARG VLLM={PROJECT['optional-dependencies']['gpu'][0].partition('==')[2]}\n"
        in (DEPLOY / "Dockerfile").read_text()
    )


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_take_files_that_are_there_and_not_ignored(name: str) -> None:
    text = (DEPLOY / name).read_text()
    taken = set(re.findall(r"type=bind,source=([\w./]+)", text))
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        taken |= set(sources.split())
    assert {"pyproject.toml", "s2w", "configs"} < taken
    included = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for path in taken:
        assert (ROOT / path).exists() and path.partition("/")[0] in included, path
    # A user without a name is what Kubernetes can tell from root.
    assert re.search(r"^USER 10001$", text, re.MULTILINE)


def test_compose_names_the_images() -> None:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())["services"]
    for name, service in services.items():
        tag = service["image"].rpartition(":")[2]
        assert tag == PROJECT["version"] + ("-cpu" if name.endswith("cpu") else "")
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_the_machines_of_skypilot_hold_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task: dict[str, Any] = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())
    gpus = task["num_nodes"] * int(task["resources"]["accelerators"].partition(":")[2])
    count, model = task["num_nodes"], task["resources"]["accelerators"].partition(":")[0]
    node = f"{{count: {count}, gpus: {gpus // count}, gpu_memory_gib: {ACCELERATORS[model]}, cpus: 32}}"
    config = compose([*shlex.split(task["envs"]["OVERRIDES"]), f"cluster.nodes=[{node}]"])
    assert make_plan(config).problems == ()
    assert config.loop.checkpoint_every
