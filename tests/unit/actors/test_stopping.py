"""Signals that end a run."""

from __future__ import annotations

import signal
from pathlib import Path

from live_run import live_run

from s2w.actors.stopping import ending_at_once

ENDLESS = """
import asyncio, sys, time
from s2w.actors.stopping import run_stoppable, uninterrupted

@uninterrupted
async def update():
    print("busy", flush=True)
    await asyncio.sleep(100)

run_stoppable(update(), lambda: print("stopping", flush=True), lambda: "ended at once")
"""

IN_C = """
import hashlib, subprocess
from s2w.actors.stopping import ending_at_once

with ending_at_once("interrupted"):
    subprocess.Popen(["sleep", "100"])
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with live_run(["-c", ENDLESS], tmp_path / "output.txt") as run:
        run.until_said("busy")
        run.process.send_signal(signal.SIGTERM)
        run.until_said("stopping")
        run.process.send_signal(signal.SIGINT)
        assert run.wait(5) == 130
        assert run.last_line() == "s2w: ended at once"


def test_a_signal_ends_a_call_into_c_and_its_child(tmp_path: Path) -> None:
    with live_run(["-c", IN_C], tmp_path / "output.txt") as run:
        run.until_said("busy")
        assert len(run.processes("sleep")) == 1
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(5) == 130
        assert run.survivors() == []
        assert run.last_line() == "s2w: interrupted"


def test_signals_mean_afterwards_what_they_meant() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ending_at_once("interrupted"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # As ray.init does.
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
