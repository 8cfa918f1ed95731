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
from tiny_models import make_checkpoint
from verifiable import prompt

from s2w import cli
from s2w.data import verifier_process
from s2w.data.tasks import generate
from s2w.data.trial import try_verifiers
from s2w.data.verifier_process import VerifierClosedError, VerifierProcess
from s2w.errors import ConfigError, VerifierError
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


def marks(response, answer, row):
    return 2 if response == answer else 0
"""


ROW = r"'own.jsonl', line 9 \(prompt 'own/train/7'\): its verifier"


@pytest.fixture
def scoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scoring.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


def asked(function: str, answer: str | None = None, **row: Any) -> Prompt:
    uid, task, place = "own/train/7", f"scoring:{function}", "'own.jsonl', line 9"
    return Prompt(uid, (), np.zeros(1, np.int32), "no_think", 0, task, answer, {"row": row}, place)


@pytest.mark.usefixtures("scoring")
def test_a_verifier_of_ones_own_runs_within_its_time_limit() -> None:
    """Its import is not timed."""
    with VerifierProcess(timeout_s=1.0) as process:
        assert process.verify(asked("length", wanted=8), "four") == 0.5
        with pytest.raises(VerifierError, match=rf"^{ROW} scoring:fails failed in .*: KeyError: 'missing'$"):
            process.verify(asked("fails"), "four")
        with pytest.raises(ConfigError, match="has no lenght"):
            process.verify(asked("lenght"), "four")
        assert process.verify(asked("endless"), "loop") == 0.0
        assert process.verify(asked("length", wanted=4), "four") == 1.0


@pytest.mark.usefixtures("scoring")
def test_a_verifier_that_is_always_too_slow_is_not_taken_for_wrong_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier_process, "OVERDUE", 2)
    with VerifierProcess(timeout_s=0.2) as process:
        assert process.verify(asked("endless"), "loop") == 0.0
        assert process.verify(asked("endless"), "ends") == 1.0
        assert process.verify(asked("endless"), "loop") == 0.0
        with pytest.raises(VerifierError, match=rf"^{ROW} .* took more than 0.2 s, .* 2 responses in a row"):
            process.verify(asked("endless"), "loop")


@pytest.mark.usefixtures("scoring")
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (asked("fails"), r"failed in .*: KeyError: 'missing' \(tried on the response ''\)$"),
        (asked("marks", "4"), r"returned 2: a score is a number from 0 .* \(tried on the response '4'\)$"),
        (asked("endless", "loop"), r"took more than 5 s for the response 'loop', or ended its process$"),
        (asked("length", wanted=4), None),
    ],
)  # fmt: skip
def test_verifiers_are_tried_before_a_run(prompt: Prompt, message: str | None) -> None:
    if message is None:
        try_verifiers([prompt])
        return
    with pytest.raises(ConfigError, match=f"^{ROW} {prompt.task} {message}"):
        try_verifiers([prompt])


@pytest.mark.usefixtures("scoring")
def test_every_command_tries_them_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_checkpoint(tmp_path / "model", "tied", 0)
    Path("prompts.jsonl").write_text('{"prompt": "2+2?", "missing": 1}\n{"prompt": "3+3?"}\n')
    Path("heldout.jsonl").write_text('{"prompt": "4+4?", "missing": 1}\n')
    run = ["data.path=prompts.jsonl", "data.heldout_path=heldout.jsonl", "data.verifier=scoring:fails", "run.dir=run"]
    sides = [f"teacher.model={model}", f"student.model={model}", "cluster.device=cpu"]
    capsys.readouterr()  # What writing the model said.
    problems = ["eval.path=prompts.jsonl", "eval.verifier=scoring:fails", "eval.answer_column=", f"model={model}"]
    for command in (["train", *run, *sides], ["generate", *run, *sides], ["eval", *problems]):
        assert cli.main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("s2w: 'prompts.jsonl', line 2 (prompt '"), said
        assert said.endswith("KeyError: 'missing' (tried on the response '')\n") and said.count("\n") == 1
        assert not Path("run").exists()
