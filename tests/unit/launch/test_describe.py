"""``s2w data``: prints what the prompts are, and ends as a run would with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import make_checkpoint

from s2w import cli

ROWS = [{"prompt": f"{i}+{i}?", "task": "exact_match", "answer": str(2 * i)} for i in range(6)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("models") / "tied", "tied", 0))


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """In the current directory, under a name that no override could have."""
    monkeypatch.chdir(tmp_path)
    file = Path("lr=1, {x}.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


def test_a_file_with_a_student(prompts: str, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [prompts, f"student.model={checkpoint}", "data.heldout_prompts=2", "--json", "out.json"]
    assert cli.main(["data", *arguments]) == 0
    printed = capsys.readouterr().out
    for label, train, heldout in (("prompts", 4, 2), ("mode think", 2, 1), ("verified by exact_match", 4, 2)):
        assert f"{label} {train} {heldout}" in " ".join(printed.split())
    assert "first prompt in mode no_think" in printed and "| <think>" in printed
    assert "drawn by run.seed=0" in printed and "= 2,048 of the student's context of 4,096 tokens\n" in printed
    written = json.loads(Path("out.json").read_text())
    assert written["train"]["verifiers"] == {"exact_match": 4} and written["refused"] is None
    assert written["examples"]["think"]["text"].startswith("<|im_start|>user\n")


def test_a_file_alone(prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", prompts, "data.heldout_prompts=2"]) == 0
    printed = capsys.readouterr().out
    assert "characters, median" in printed and "student.model is not set, so nothing is rendered" in printed


def test_generated_tasks(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["data.tasks=[chain_sum]", "data.train_prompts=8", "data.heldout_prompts=2"]
    assert cli.main(["data", f"student.model={checkpoint}", *settings]) == 0
    printed = capsys.readouterr().out
    assert "verified by the task's scorer 8 2" in " ".join(printed.split()) and "drawn by" not in printed


@pytest.mark.parametrize(
    ("extra", "sentence", "shown"),
    [
        ("data.heldout_prompts=6", "has 6 prompts, too few to hold out 6 (data.heldout_prompts): write", "prompts 6 0"),
        ("data={heldout_prompts: 1, max_prompt_tokens: 5}", "tokens, more than 5 (data.max_prompt_tokens)",
         "longer than 5 (data.max_prompt_tokens) 5 1"),
        ("data.modes=[quick]", "data.modes=['quick']: must be one of think, no_think", ""),
        ("data.tasks=[gcd]", "Set one of data.tasks and data.path, not both", ""),
        ("data.heldout=1", "unknown setting data.heldout: did you mean data.heldout_path?", ""),
    ],
)  # fmt: skip
def test_what_a_run_would_refuse(
    prompts: str, checkpoint: str, capsys: pytest.CaptureFixture[str], extra: str, sentence: str, shown: str
) -> None:
    """One sentence and exit code 2, after all that can be said of the prompts."""
    assert cli.main(["data", prompts, f"student.model={checkpoint}", extra]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("s2w: ") and sentence in captured.err and captured.err.count("\n") == 1
    assert shown in " ".join(captured.out.split()) and bool(captured.out) == bool(shown)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: s2w data [FILE] [OVERRIDE ...] [--json FILE]\n")


def test_output_that_cannot_be_written(prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", prompts, "--json", str(tmp_path)]) == 2
    assert "--json=" in (said := capsys.readouterr().err) and "is a directory" in said
    assert cli.main(["data"]) == 2
    assert "Set one of data.tasks and data.path" in capsys.readouterr().err
