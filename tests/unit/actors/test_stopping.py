"""Signals that end a run."""

from __future__ import annotations

import signal
from pathlib import Path

from live_run import live_run

ENDLESS = """
import asyncio, sys, time
from s2w.actors.stopping import run_stoppable, uninterrupted

@uninterrupted
async def update():
    print("busy", flush=True)
    await asyncio.sleep(100)

run_stoppable(update(), lambda: print("stopping", flush=True), lambda: "ended at once")
"""


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with live_run(["-c", ENDLESS], tmp_path / "output.txt") as run:
        run.until_said("busy")
        run.process.send_signal(signal.SIGTERM)
        run.until_said("stopping")
        run.process.send_signal(signal.SIGINT)
        assert run.wait(5) == 130
        assert run.last_line() == "s2w: ended at once"
