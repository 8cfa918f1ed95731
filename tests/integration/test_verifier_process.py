"""The verifier's process: an answer that never ends costs one time limit, and the process ends with its run."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_run import live_run
from verifiable import prompt

from s2w.data.tasks import generate
from s2w.data.verifier_process import VerifierClosedError, VerifierProcess
from s2w.errors import ConfigError
from s2w.records import Prompt

ROOT = Path(__file__).parents[2]

BUSY = """
import sys
sys.path[:0] = {path}
from verifiable import prompt
from s2w.data.tasks import generate
from s2w.data.verifier_process import VerifierProcess
if __name__ == "__main__":
    entry = generate("countdown", 1, 1, seed=0)[0][0]
    verifier = VerifierProcess(timeout_s=5.0)
    print("verifies", flush=True)
    verifier.verify(prompt("countdown", entry["answer"], entry=entry), "9**9**9")
"""


def test_a_verifier_in_an_endless_answer_does_not_outlive_its_run(tmp_path: Path) -> None:
    script = tmp_path / "busy.py"
    script.write_text(BUSY.format(path=[str(ROOT / "tests" / "helpers"), str(ROOT)]))
    with live_run([str(script)], tmp_path / "output.txt") as run:
        run.until_said("verifies")
        run.until(lambda: any(process.cpu_percent(0.1) > 20 for process in run.processes()))
        run.process.kill()
        assert run.family and run.survivors() == []


def test_answer_that_never_ends_scores_zero() -> None:
    """In this process the scorer would not come back; the next answer is scored as if nothing had been."""
    entry = generate("countdown", 1, 1, seed=0)[0][0]
    countdown = prompt("countdown", entry["answer"], entry=entry)
    with VerifierProcess(timeout_s=1.0) as verifier:
        assert verifier.verify(countdown, "9**9**9") == 0.0
        assert verifier.verify(countdown, entry["answer"]) == 1.0
        with pytest.raises(ConfigError, match="it has no task"):
            verifier.verify(prompt("", None), "4")


def test_a_closed_verifier_starts_no_other_process() -> None:
    """As when a run ends while a thread still grades."""
    entry = generate("countdown", 1, 1, seed=0)[0][0]
    countdown = prompt("countdown", entry["answer"], entry=entry)
    verifier = VerifierProcess(timeout_s=60.0)
    with ThreadPoolExecutor(1) as threads:
        grading = threads.submit(verifier.verify, countdown, "9**9**9")
        time.sleep(0.5)
        verifier.close()
        with pytest.raises(VerifierClosedError):
            grading.result(10)
    assert multiprocessing.active_children() == []


OWN = """
import time

time.sleep(1.5)


def length(response, answer, row):
    return min(1, len(response) / row["wanted"])


def fails(response, answer, row):
    return row["missing"]


def endless(response, answer, row):
    while response == "loop":
        pass
    return 1
"""


def test_a_verifier_of_ones_own_runs_within_its_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import is not timed."""
    (tmp_path / "scoring.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)

    def asked(function: str, **row: Any) -> Prompt:
        task = f"scoring:{function}"
        return Prompt("own/train/7", (), np.zeros(1, np.int32), "no_think", 0, task, None, {"row": row})

    with VerifierProcess(timeout_s=1.0) as process:
        assert process.verify(asked("length", wanted=8), "four") == 0.5
        with pytest.raises(ConfigError, match=r"^Prompt 'own/train/7'.* failed in .*: KeyError: 'missing'$"):
            process.verify(asked("fails"), "four")
        with pytest.raises(ConfigError, match="has no lenght"):
            process.verify(asked("lenght"), "four")
        assert process.verify(asked("endless"), "loop") == 0.0
        assert process.verify(asked("length", wanted=4), "four") == 1.0
