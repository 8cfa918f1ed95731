"""What `s2w doctor` makes of what it sees; tests/integration/test_doctor.py has it look at a cluster."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from s2w import cli
from s2w.launch import doctor, node_checks
from s2w.launch.node_checks import Finding

GIB = 2**30
H100 = "580.95.05, NVIDIA H100 80GB HBM3, 81559, 4\n"


@pytest.mark.parametrize(
    ("listing", "expected", "levels", "text"),
    [
        (H100 * 8, 8, ["ok"], "580.95.05, 8 x NVIDIA H100 80GB HBM3 (80 GiB)"),
        (H100 * 8, 0, ["ok"], "8 x"),
        (H100 * 7, 8, ["FAIL"], "but Ray counts 8"),
        (H100.replace("580", "570"), 1, ["FAIL"], "570.95.05"),
        (H100 + H100.replace(", 4\n", ", 40000\n"), 2, ["ok", "note"], "GPU 1: 40000 MiB"),
    ],
)
def test_gpus(listing: str, expected: int, levels: list[str], text: str) -> None:
    found = list(node_checks.check_gpus(listing, expected))
    assert [finding.level for finding in found] == levels
    assert text in found[-1].text


@pytest.mark.parametrize(
    ("total", "free", "store", "running", "level"),
    [
        (64 * 2**20, 64 * 2**20, 7 * GIB, False, "FAIL"),
        (8 * GIB, 8 * GIB, 7 * GIB, False, "ok"),
        (8 * GIB, 6 * GIB, 7 * GIB, False, "note"),
        (8 * GIB, 1 * GIB, 7 * GIB, True, "ok"),
        (6 * GIB, 6 * GIB, 7 * GIB, True, "note"),
    ],
)
def test_shared_memory(total: int, free: int, store: int, running: bool, level: str) -> None:
    found = node_checks.check_shared_memory(total, free, store, running=running)
    assert found.level == level and bool(found.remedy) == (level != "ok")
    assert found.text.startswith("64 MiB, 64 MiB free" if total < GIB else f"{total // GIB}.0 GiB, {free // GIB}.0 GiB")


def test_disks(tmp_path: Path) -> None:
    assert node_checks.judge_space("disk", "/", 100 * GIB, 1000 * GIB).level == "ok"
    assert node_checks.judge_space("disk", "/", 4 * GIB, 20 * GIB).level == "note"
    assert node_checks.judge_space("disk", "/", 49 * GIB, 1000 * GIB).level == "FAIL"
    found = node_checks.check_disk("runs", tmp_path / "not" / "yet")
    assert found.level != "FAIL" and str(tmp_path / "not" / "yet") in found.text
    assert node_checks.check_disk("runs", Path("/proc/sys/kernel/new")).level in ("FAIL", "note")


def test_network_interfaces() -> None:
    def failed(**environment: str) -> list[str]:
        return [finding.text for finding in node_checks.check_network(environment) if finding.level == "FAIL"]

    assert failed(NCCL_SOCKET_IFNAME="lo") == failed(NCCL_SOCKET_IFNAME="^docker") == failed()
    [text] = set(failed(GLOO_SOCKET_IFNAME="ib7,nope")) - set(failed())
    assert text.startswith("GLOO_SOCKET_IFNAME=ib7,nope, but the interfaces are") and "lo" in text


def test_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        open_port = server.getsockname()[1]
        assert node_checks.unreachable([("127.0.0.1", open_port)]) == []
    closed = node_checks.unreachable([("127.0.0.1", open_port)])
    assert closed == [f"127.0.0.1:{open_port}"]
    assert doctor.check_ports({"a": [], "b": []}).level == "ok"
    found = doctor.check_ports({"a": closed, "b": []})
    assert found.level == "FAIL" and found.text == f"no connection from a to 127.0.0.1:{open_port}"


def test_versions_are_the_same_everywhere() -> None:
    here = node_checks.versions()
    assert {"Python", "s2w", "ray", "torch"} < here.keys() and any(name.startswith("vllm") for name in here)
    assert doctor.compare_versions({"a": here, "b": dict(here)}).level == "ok"
    found = doctor.compare_versions({"a": here, "b": here | {"torch": "2.12.0"}, "c": here})
    assert found.level == "FAIL"
    assert found.text == f"torch {here['torch']} on a, 2.12.0 on b, {here['torch']} on c"


def test_clocks() -> None:
    assert doctor.compare_clocks({"a": 0.0, "b": -0.4}).level == "ok"
    found = doctor.compare_clocks({"a": 0.5, "b": -3.0, "c": 0.0})
    assert (found.level, found.text) == ("note", "a is 3.5 s ahead of b")


def test_time_to_save_at_job_stop() -> None:
    name = "RAY_JOB_STOP_WAIT_TIME_S"
    assert doctor.check_stop_wait({"a": "600", "b": "600"}).level == "ok"
    assert "after 3 s" in doctor.check_stop_wait({"a": "600", "b": None}).text
    assert name in doctor.check_stop_wait({"a": "10"}).remedy


def test_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    def level(**environment: str) -> tuple[str, str]:
        [finding] = doctor.check_token(environment)
        return finding.level, finding.text + finding.remedy

    assert level(RAY_AUTH_MODE="token")[0] == "FAIL"
    assert level(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="secret") == ("ok", "RAY_AUTH_MODE=token, and there is one")
    assert level(RAY_AUTH_MODE="disabled")[0] == "note"
    assert level()[0] == "note" and "--generate" in level()[1]
    (tmp_path / "token").write_text("secret")
    assert level(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))[0] == "ok"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert level(RAY_AUTH_MODE="token")[0] == "ok"
    assert "401" in level()[1] and "--generate" not in level()[1]


def test_shared_directory(tmp_path: Path) -> None:
    found = doctor.check_shared(tmp_path / "runs", lambda path: {"a": Path(path).is_file(), "b": True})
    assert found.level == "ok" and list((tmp_path / "runs").iterdir()) == []
    found = doctor.check_shared(tmp_path / "runs", lambda path: {"a": True, "b": Path(path + "-").is_file()})
    assert found.level == "FAIL" and found.text.endswith("on b")
    (tmp_path / "file").touch()
    assert doctor.check_shared(tmp_path / "file" / "runs", lambda path: {}).level == "FAIL"


def test_a_line_a_check_and_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    well, busy = Finding("ok", "disk", "70 GiB free"), Finding("note", "disk", "4 GiB free", "make room")
    merged = doctor.merge({"a": [well], "b": [Finding("ok", "disk", "80 GiB free")]})
    assert merged == [Finding("ok", "disk", "70 GiB free (first of 2 nodes)")]
    assert doctor.report(merged) == 0
    nodes = {"a": [well], **{name: [busy] for name in "bcdefg"}}
    assert doctor.merge(nodes) == [Finding("note", "disk", "b; c; d; e and 2 more: 4 GiB free", "make room")]
    assert doctor.merge({"": [busy]}) == [busy]
    assert doctor.merge({"a": [busy], "b": [busy]})[0].text == "every node: 4 GiB free"
    assert doctor.report([well, busy, Finding("FAIL", "/dev/shm", "64 MiB", "a larger one")]) == 1
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "ok    disk      70 GiB free",
        "note  disk      4 GiB free -> make room",
        "FAIL  /dev/shm  64 MiB -> a larger one",
        "1 would stop a run, 1 to know about, 1 well",
    ]


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (["--nodes", "0"], "--nodes 0: must be a whole number >= 1"),
        (["--nodes"], "--nodes needs a count"),
        (["cluster.address=auto"], "not 'cluster.address=auto'"),
        (["--address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
    ):
        assert cli.main(["doctor", *arguments]) == 2
        assert sentence in capsys.readouterr().err
