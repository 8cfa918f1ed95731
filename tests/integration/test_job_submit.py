"""`ray job submit` against a local head, as a user submits to a cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import make_checkpoint

BIN = Path(sys.executable).parent
ADDRESS = re.compile(r"http://[\d.]+:\d+")


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head of its own: its dashboard's address, and the environment to talk to it."""
    # The job's path is a unix socket's, of at most 107 bytes.
    directory = Path("/tmp") / f"s2w-test-{os.getpid()}"
    environment = os.environ | {
        # The job client does not authenticate unless it is told to; the token is this head's own.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    (tmp_path / "token").write_text("0123456789abcdef0123456789abcdef")
    log = (tmp_path / "head.log").open("w+")
    process = subprocess.Popen(
        [
            str(BIN / "ray"), "start", "--head", "--block", "--port=0", "--num-cpus=2", "--dashboard-port=0",
            "--include-dashboard=true", "--dashboard-agent-listen-port=0", f"--temp-dir={directory}",
            "--disable-usage-stats",
        ],
        env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        yield _wait_for_address(process, directory), environment
    finally:
        # The head's own processes and no others.
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        log.close()
        subprocess.run(["rm", "-rf", str(directory)], check=True)


def _wait_for_address(process: subprocess.Popen[bytes], directory: Path) -> str:
    """The dashboard writes where it listens into its log."""
    for _ in range(1200):
        assert process.poll() is None, "the head ended"
        for path in directory.glob("session_latest/logs/dashboard.log"):
            if found := re.search(r"Dashboard head http address: ([\w.]+:\d+)", path.read_text()):
                return f"http://{found[1]}"
        time.sleep(0.1)
    raise AssertionError("the dashboard did not start")


def test_a_submitted_job_trains(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = head
    teacher = make_checkpoint(tmp_path / "teacher", "tied", 0)
    run = tmp_path / "run"
    command = [
        str(BIN / "ray"), "job", "submit", "--address", address, "--",
        str(BIN / "s2w"), "train", f"teacher.model={teacher}", f"student.model={teacher}", "student.init=fresh",
        "data.tasks=[chain_sum]", "data.train_prompts=4", "data.heldout_prompts=2", "data.max_prompt_tokens=256",
        "rollout.max_tokens=8", "rollout.enforce_eager=true", "teacher.enforce_eager=true", "loop.steps=1",
        "loop.prompts_per_step=2", f"run.dir={run}",
    ]  # fmt: skip
    for _ in range(60):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        # The agent that starts jobs is up a little after the head.
        if "No available agent" not in done.stderr + done.stdout:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert summary["heldout"]["after"]["version"] == 1
    assert (run / "checkpoints" / "latest" / "config.json").exists()
