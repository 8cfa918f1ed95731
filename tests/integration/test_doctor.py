"""`s2w doctor` on a cluster that it joins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from s2w import cli
from s2w.launch.doctor import Examiner, wait_for_nodes


def test_doctor_looks_at_every_node(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", "--address", address, "--nodes", "1", "--dir", str(tmp_path / "runs")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"s2w doctor: the cluster at {address}: ")
    # A FAIL may be the machine's own, a full disk for one.
    assert code == int(any(line.startswith("FAIL") for line in lines))
    checks = {line[6:].split("  ")[0]: line[:4].strip() for line in lines[1:-1]}
    assert {"driver", "NCCL", "/dev/shm", "models", "versions", "clocks", "ports", "job stop", "token"} <= checks.keys()
    for check in ("versions", "clocks", "ports", "shared directory", "models"):
        assert checks[check] == "ok", lines
    assert list((tmp_path / "runs").iterdir()) == []
    assert not ray.is_initialized()


def test_doctor_waits_for_nodes(address: str) -> None:
    ray.init(address=address, log_to_driver=False)
    try:
        [node] = wait_for_nodes(1, 10)
        assert wait_for_nodes(2, 1) == [node]
        # What another node would connect to.
        examiner: Any = ray.remote(num_cpus=0)(Examiner).remote()
        there = ray.get(examiner.listen.remote())
        assert ray.get(examiner.unreachable.remote([there])) == []
    finally:
        ray.shutdown()
