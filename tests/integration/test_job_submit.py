"""`ray job submit` against a local head, as a user submits to a cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tiny_models import make_checkpoint

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
GCS = re.compile(r"--address='([\d.]+:\d+)'")
DASHBOARD = re.compile(r"Dashboard head http address: ([\w.]+:\d+)")
TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True, slots=True)
class Head:
    """A Ray head that asks for a token."""

    gcs: str
    """What drivers join, HOST:PORT."""
    dashboard: str
    """What jobs are submitted to, HOST:PORT."""
    environment: dict[str, str]
    """With its token."""


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A head of its own."""
    # The job's path is a unix socket's, of at most 107 bytes.
    directory = Path("/tmp") / f"s2w-test-{os.getpid()}"
    environment = os.environ | {
        # The job client does not authenticate unless it is told to; the token is this head's own.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    (tmp_path / "token").write_text(TOKEN)
    log = tmp_path / "head.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                str(BIN / "ray"), "start", "--head", "--block", "--port=0", "--num-cpus=2", "--dashboard-port=0",
                "--include-dashboard=true", "--dashboard-agent-listen-port=0", f"--temp-dir={directory}",
                "--disable-usage-stats",
            ],
            env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        gcs = _wait_for(GCS, process, lambda: [log])
        dashboard = _wait_for(DASHBOARD, process, lambda: directory.glob("session_latest/logs/dashboard.log"))
        yield Head(gcs, dashboard, environment)
    finally:
        # The head's own processes and no others.
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        subprocess.run(["rm", "-rf", str(directory)], check=True)


def _wait_for(what: re.Pattern[str], process: subprocess.Popen[bytes], logs: Callable[[], Iterable[Path]]) -> str:
    """What the head writes into one of its logs."""
    for _ in range(1200):
        assert process.poll() is None, "the head ended"
        for path in logs():
            if found := what.search(path.read_text()):
                return found[1]
        time.sleep(0.1)
    raise AssertionError(f"the head did not write {what.pattern}")


SCORING = """
def here(response, answer, row):
    # Right if this file is the one that Ray has unpacked for the job.
    return float("working_dir_files" in __file__ and row["number"] >= 0)
"""


def the_job_of_readme() -> tuple[str, list[str]]:
    """The file ``my_job.yaml`` and the command that submits it, as README prints them."""
    section = (ROOT / "README.md").read_text().partition("### On a cluster\n")[2]
    [file] = re.findall(r"`jobs/experiment/my_job\.yaml`.*?```yaml\n(.*?)```", section, re.DOTALL)
    [command] = re.findall(r"```\n(ray job submit .*?)```", section, re.DOTALL)
    return file, shlex.split(command.replace("\\\n", " "))


def test_the_job_of_readme_trains(head: Head, tmp_path: Path) -> None:
    """On prompts and with a verifier that its working_dir brings along."""
    file, command = the_job_of_readme()
    teacher = make_checkpoint(tmp_path / "teacher", "tied", 0)
    (tmp_path / "jobs" / "experiment").mkdir(parents=True)
    (tmp_path / "jobs" / "experiment" / "my_job.yaml").write_text(file)
    (tmp_path / "jobs" / "scoring.py").write_text(SCORING)
    prompts = [{"prompt": f"What is {number} + 1?", "number": number} for number in range(6)]
    (tmp_path / "jobs" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    shared = tmp_path / "shared"
    command = [word.replace("HEAD:8265", head.dashboard).replace("/shared", str(shared)) for word in command]
    # It is a job for a cluster: here with models and sizes for this machine.
    command += [
        f"teacher.model={teacher}", f"student.model={teacher}", "student.init=fresh", "teacher.tensor_parallel=1",
        "data.verifier=scoring:here", "data.heldout_prompts=2", "data.max_prompt_tokens=256", "rollout.max_tokens=8",
        "rollout.enforce_eager=true", "teacher.enforce_eager=true", "rollout.engines=1", "learner.ranks=1",
        "learner.zero_stage=2", "loop.steps=1", "loop.prompts_per_step=2",
    ]  # fmt: skip
    for _ in range(60):
        done = subprocess.run(command, cwd=tmp_path, env=head.environment, capture_output=True, text=True, timeout=900)
        # The agent that starts jobs is up a little after the head.
        if "No available agent" not in done.stderr + done.stdout:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    run = shared / "runs" / "my_job"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["heldout"]["after"]["version"] == 1
    assert [scores["accuracy"] for scores in summary["heldout"]["after"]["by_mode"].values()] == [1.0, 1.0]
    assert (run / "checkpoints" / "latest" / "config.json").exists()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["run"]["name"] == "my_job" and config["loop"]["checkpoint_every"] == 20
    # Joining it with another token, with none, and without RAY_AUTH_MODE.
    (tmp_path / "wrong").write_text(TOKEN[::-1])
    program = f"from s2w.launch.cluster import *; check_address(ClusterConfig(address={head.gcs!r}))"
    empty = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH")}
    empty["HOME"] = str(tmp_path)
    other = head.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}
    for environment, reason in (
        (head.environment, None),
        (other, "that in the file of RAY_AUTH_TOKEN_PATH is another"),
        (empty | {"RAY_AUTH_MODE": "token"}, "there is none in ~/.ray/auth_token"),
        (empty, "none was sent, because RAY_AUTH_MODE is not"),
    ):
        joined = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert (joined.returncode == 0) == (reason is None), joined.stderr
        if reason:
            said = joined.stderr.splitlines()[-1]
            assert f"cluster.address={head.gcs}: this Ray cluster asks for its token, and {reason}" in said
