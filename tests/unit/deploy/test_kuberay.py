"""The Kubernetes manifests, as kustomize renders them: valid, and the clusters hold the runs that they are for.

``rayjob.v1.schema.json.gz`` is KubeRay's RayJob as of August 2026 (ray-operator/config/crd, Apache-2.0): the schema of
its custom resource definition as JSON Schema, with unknown fields refused. It contains RayCluster's.
"""

from __future__ import annotations

import copy
import gzip
import json
import shlex
import shutil
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from s2w.config.bounds import check_bounds
from s2w.config.compose import compose
from s2w.config.schema import Config
from s2w.launch.plan import make_plan

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KUBERNETES = "1.33"
GPU_MEMORY_GIB = 79
"""Of the GPUs of 80 GB that the overlays ask for."""
UNITS = {"Gi": 2**30, "Ti": 2**40}

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Manifest]]:
    """Documents by file, from `make render-deploy`."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, whose kustomize renders the manifests, is not installed")
    directory = tmp_path_factory.mktemp("rendered")
    subprocess.run(["make", "render-deploy", f"RENDERED={directory}"], cwd=ROOT, check=True, capture_output=True)
    return {path.stem: list(yaml.safe_load_all(path.read_text())) for path in sorted(directory.glob("*.yaml"))}


@pytest.fixture(scope="module")
def rayjob_schema() -> dict[str, Any]:
    with gzip.open(Path(__file__).parent / "rayjob.v1.schema.json.gz") as file:
        schema: dict[str, Any] = json.load(file)
    return schema


def validate(manifest: Manifest, rayjob_schema: dict[str, Any]) -> None:
    """Raises for a field that is unknown or of another type."""
    if manifest["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    schema = rayjob_schema
    if manifest["kind"] == "RayCluster":
        cluster = schema["properties"]["spec"]["properties"]["rayClusterSpec"]
        schema = schema | {"properties": schema["properties"] | {"spec": cluster}}
    jsonschema.Draft7Validator(schema).validate(manifest)


def clusters(rendered: dict[str, list[Manifest]]) -> dict[str, Manifest]:
    """The cluster's spec of each file that has one."""
    specs = {}
    for name, documents in rendered.items():
        for document in documents:
            if document["kind"] in ("RayCluster", "RayJob"):
                specs[name] = document["spec"].get("rayClusterSpec", document["spec"])
    return specs


@pytest.fixture(scope="module")
def jobs(rendered: dict[str, list[Manifest]]) -> dict[str, tuple[Config, Manifest]]:
    """What each job runs, and its spec."""
    found = {}
    for name, documents in rendered.items():
        for document in documents:
            if document["kind"] == "RayJob":
                program, command, *overrides = shlex.split(document["spec"]["entrypoint"])
                assert (program, command) == ("s2w", "train")
                found[name] = compose(overrides), document["spec"]
    return found


def amount(text: str | int) -> float:
    """A quantity of Kubernetes in bytes, or in units."""
    text = str(text)
    return float(text[:-2]) * UNITS[text[-2:]] if text[-2:] in UNITS else float(text)


def limits(template: Manifest) -> dict[str, float]:
    [container] = template["spec"]["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"], "Ray counts on what is its own"
    return {name: amount(value) for name, value in container["resources"]["limits"].items()}


def test_every_manifest_is_valid(rendered: dict[str, list[Manifest]], rayjob_schema: dict[str, Any]) -> None:
    sizes = ("one-node", "235b", "fp8")
    assert set(rendered) == {"volumes", *(f"{size}-{kind}" for size in sizes for kind in ("cluster", "job"))}
    for name, documents in rendered.items():
        kinds = [document["kind"] for document in documents]
        assert kinds == {"cluster": ["RayCluster"], "job": ["RayJob"]}.get(name.split("-")[-1], kinds[:1] * 2)
        for document in documents:
            validate(document, rayjob_schema)
    for name, path in (
        ("235b-cluster", ("spec", "workerGroupSpecs", 0)),
        ("235b-job", ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0)),
        ("volumes", ("spec",)),
    ):
        wrong = copy.deepcopy(rendered[name][0])
        part: Any = wrong
        for key in path:
            part = part[key]
        part["replica"] = 2
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match="replica"):
            validate(wrong, rayjob_schema)


def test_a_job_has_the_cluster_of_its_overlay(
    rendered: dict[str, list[Manifest]], jobs: dict[str, tuple[Config, Manifest]]
) -> None:
    specs = clusters(rendered)
    for name, (config, job) in jobs.items():
        assert job["rayClusterSpec"] == specs[name.replace("-job", "-cluster")]
        # What makes trying again worth while.
        assert config.run.resume == "auto" and "now" not in config.run.dir and job["backoffLimit"] > 0
        assert config.run.dir.startswith("/runs/") and config.loop.checkpoint_every


def test_clusters_are_as_ray_and_s2w_need_them(rendered: dict[str, list[Manifest]]) -> None:
    [ray] = [line.partition("==")[2] for line in PROJECT["dependencies"] if line.startswith("ray[")]
    for name, spec in clusters(rendered).items():
        assert spec["rayVersion"] == ray and spec["authOptions"] == {"mode": "token"}
        head = spec["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0" and "nvidia.com/gpu" not in limits(head["template"])
        for template in (head["template"], *(group["template"] for group in spec["workerGroupSpecs"])):
            pod = template["spec"]
            [container] = pod["containers"]
            assert container["image"].endswith(f":{PROJECT['version']}"), name
            assert pod["securityContext"]["runAsNonRoot"] and pod["restartPolicy"] == "Never"
            mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert {volumes[mounted[path]]["persistentVolumeClaim"]["claimName"] for path in ("/runs", "/models")} == {
                document["metadata"]["name"] for document in rendered["volumes"]
            }
            shared = volumes[mounted["/dev/shm"]]["emptyDir"]
            assert shared["medium"] == "Memory"
            if template is not head["template"]:
                assert amount(shared["sizeLimit"]) >= 0.3 * limits(template)["memory"], "Ray's object store"
        grows = {g["groupName"] for g in spec["workerGroupSpecs"] if g["minReplicas"] != g["maxReplicas"]}
        assert grows == ({"rollout"} if spec["enableInTreeAutoscaling"] else set())


def test_clusters_hold_their_jobs(jobs: dict[str, tuple[Config, Manifest]], monkeypatch: pytest.MonkeyPatch) -> None:
    """`s2w plan` finds that each job fits its cluster and leaves none of its GPUs without work."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, (config, job) in jobs.items():
        check_bounds(config)
        nodes = []
        for group in job["rayClusterSpec"]["workerGroupSpecs"]:
            node, count = limits(group["template"]), group["minReplicas"]
            described = {"name": group["groupName"], "count": count, "gpus": int(node["nvidia.com/gpu"])}
            described |= {"cpus": node["cpu"], "memory_gib": node["memory"] / 2**30, "gpu_memory_gib": GPU_MEMORY_GIB}
            nodes += [described] * (count > 0)
        plan = make_plan(replace(config, cluster=replace(config.cluster, nodes=nodes)))
        assert plan.problems == (), name
        placement = plan.phases[-1].placement
        assert placement is not None and placement.gpus == sum(node["gpus"] * node["count"] for node in nodes), name
