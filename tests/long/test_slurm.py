"""deploy/slurm/s2w.sbatch under Slurm itself: two nodes on this machine (Debian: slurm-wlm, munge), as root."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        os.getuid() != 0 or any(shutil.which(program) is None for program in ("munged", "slurmctld", "slurmd")),
        reason="starting Slurm takes root, slurm-wlm and munge",
    ),
]

ROOT = Path(__file__).parents[2]
NODES = ("n1", "n2")
CONFIGURATION = """
ClusterName=s2w
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Two nodes; runs one of Slurm's commands and returns what it prints."""
    root = tmp_path_factory.mktemp("slurm")
    (root / "state").mkdir()
    root.chmod(0o755)
    (root / "munge.key").write_bytes(os.urandom(128))
    (root / "munge.key").chmod(0o600)
    configuration = root / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    configuration.write_text(CONFIGURATION.format(host=host, root=root, ports=free_ports(3)))
    munge = [f"--{name}={root}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={root}/munge.key", *munge],
        ["slurmctld", "-D", "-f", str(configuration)],
        *(["slurmd", "-D", "-N", node, "-f", str(configuration)] for node in NODES),
    ]
    environment = os.environ | {
        "SLURM_CONF": str(configuration),
        "S2W_VENV": sys.prefix,
        "PYTHONPATH": str(ROOT),
    }
    running = []
    with (root / "daemons.log").open("w") as log:
        for command in daemons:
            running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
            time.sleep(1)

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + (root / "daemons.log").read_text()[-3000:]
        return done.stdout.strip()

    try:
        yield run
    finally:
        run("scancel", "--user=root")
        wait_until(lambda: run("squeue", "--noheader") == "", 90)
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.5)


def submit(slurm: Callable[..., str], log: Path, *overrides: str) -> str:
    """The job's number."""
    script = str(ROOT / "deploy" / "slurm" / "s2w.sbatch")
    return slurm("sbatch", "--parsable", "--nodes=2", f"--output={log}", script, *overrides)


def ended(slurm: Callable[..., str], job: str, state: str) -> Callable[[], bool]:
    """Whether the job is in this final state; fails if it is in another."""

    def condition() -> bool:
        description = slurm("scontrol", "show", "job", job)
        found = re.search(r"JobState=(\w+) Reason=(\w+)", description)
        assert found is not None
        if found.groups() == ("PENDING", "BeginTime"):
            slurm("scontrol", "update", f"jobid={job}", "starttime=now")  # Slurm waits two minutes otherwise.
        if found[1] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"):
            return False
        assert found[1] == state, description
        return True

    return condition


def test_a_job_that_is_signalled_saves_and_continues(slurm: Callable[..., str], tmp_path: Path) -> None:
    log, run = tmp_path / "job.out", tmp_path / "runs" / "run"
    job = submit(
        slurm,
        log,
        "experiment=testbed",
        f"run.dir={run}",
        "off_policy.steps=0",
        "loop.steps=6",
        "loop.prompts_per_step=32",
    )

    def steps() -> list[int]:
        file = run / "metrics.jsonl"
        return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []

    wait_until(lambda: len(steps()) >= 2, 400)
    slurm("scancel", "--batch", "--signal=USR1", job)
    wait_until(ended(slurm, job, "COMPLETED"), 500)
    assert steps() == [1, 2, 3, 4, 5, 6]
    text = log.read_text()
    assert len(re.findall("the same on 2 nodes", text)) == text.count("all up after") == 2
    assert re.search(r"interrupted; step [2-5] is saved in", text)
    assert "exit code 130" in text and "queued again" in text and "exit code 0" in text
    assert "Restarts=1" in slurm("scontrol", "show", "job", job)
    assert json.loads((run / "summary.json").read_text())["heldout"]["after"]["version"] == 6
    assert not Path(f"/tmp/s2w-{job}").exists() and not list(run.parent.glob(".s2w*"))


def test_bad_settings_are_not_queued_again(slurm: Callable[..., str], tmp_path: Path) -> None:
    log = tmp_path / "job.out"
    job = submit(slurm, log, "experiment=testbed", f"run.dir={tmp_path / 'run'}", "rollout.engine=2")
    wait_until(ended(slurm, job, "FAILED"), 200)
    text = log.read_text()
    assert "unknown setting rollout.engine: did you mean rollout.engines?" in text and "Ray at" not in text
    assert "ExitCode=2:0" in slurm("scontrol", "show", "job", job)

    job = submit(slurm, log, "experiment=testbed")
    wait_until(ended(slurm, job, "FAILED"), 60)
    assert "write run.dir=DIR" in log.read_text()
