"""``s2w sample`` up to the start of its engines: its command line, prompts, modes, sampling and room."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import make_checkpoint
from transformers import AutoTokenizer

from s2w import cli
from s2w.config.compose import compose_as, help_text, settings
from s2w.config.schema import SampleRun
from s2w.data.questions import Question
from s2w.errors import ConfigError
from s2w.launch.run_directory import trained_model
from s2w.launch.sample import _ask, _sides, _too_large_together
from s2w.launch.sample_prompts import known_questions, typed_questions
from s2w.learner import checkpoint
from s2w.records import Sampling


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "hybrid", "tied", 0)


@pytest.fixture(scope="module")
def plain(hybrid: Path) -> Path:
    """Without a think mode."""
    path = hybrid.parent / "plain"
    shutil.copytree(hybrid, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


def run_of(model: Path, *overrides: str) -> SampleRun:
    return compose_as(SampleRun, [f"model={model}", *overrides])


def ask(text: str, **fields: object) -> Question:
    return Question("q", ({"role": "user", "content": text},), **fields)  # type: ignore[arg-type]


def test_every_setting_is_documented() -> None:
    assert not [name for name, _, text in settings(SampleRun) if not text]
    assert "usage: s2w sample MODEL [FILE] [--prompt TEXT]" in help_text(SampleRun)
    assert "rollout.tensor_parallel  (default: 1" in help_text(SampleRun)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `s2w sample` says of arguments that it refuses."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))

    def run(*arguments: str) -> str:
        assert cli.main(["sample", *arguments]) == 2
        return capsys.readouterr().err

    return run


def test_bad_arguments_are_refused_in_a_sentence(refused: Callable[..., str], hybrid: Path, tmp_path: Path) -> None:
    model = str(hybrid)
    assert "model is not set" in refused()
    assert "there is no option '--max-tokens': settings are written as" in refused(model, "--max-tokens", "7")
    assert "put 'is' in quotes, after --prompt" in refused(model, "what", "is")
    assert "--prompt needs" in refused(model, "--prompt")
    assert "mode=thnk: must be one of think, no_think" in refused(model, "--mode", "thnk", "--prompt", "x")
    assert "There is no prompt file" in refused(model, str(tmp_path / "none.jsonl"))
    assert "there are no prompts: give --prompt TEXT" in refused(model)
    assert "the prompt is empty" in refused(model, "--prompt", " ")
    assert "teacher.model is not set: write --teacher" in refused(model, "teacher.cpus=1", "--prompt", "x")
    assert "unknown setting teacher.cpu: did you mean cpus" in refused(
        model, "--teacher", model, "teacher.cpu=1", "--prompt", "x"
    )
    assert "No checkpoint directory" in refused(model, "--teacher", "/no/model", "--prompt", "x")
    assert "rollout.temperature=3.0: must be between 0.01 and 2, or 0, or null" in refused(
        model, "rollout.temperature=3", "--prompt", "x"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "x"}\n')
    assert "line 1 has neither `messages` nor `prompt`" in refused(model, str(rows))
    assert f"give --prompt or the file {str(rows)!r}, not both" in refused(model, str(rows), "--prompt", "x")


def test_the_command_line_reaches_the_settings(
    hybrid: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    odd = tmp_path / "it's, a (model)"
    shutil.copytree(hybrid, odd)
    arguments = ["sample", str(odd), "rollout.max_tokens=7", "--mode", "think", "--teacher", str(hybrid), "--cfg"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "max_tokens: 7" in shown and "mode: think" in shown and f"  model: {hybrid}" in shown
    assert compose_as(SampleRun, [f"model={cli._quoted(str(odd))}"]).model == str(odd)


def test_prompts_of_a_file_are_those_of_training(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2 + 3?", "answer": "5", "mode": "no_think"},
        {"messages": [{"role": "user", "content": "Hi /think"}, {"role": "assistant", "content": "Hello"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = known_questions([], path) or []
    assert (first.uid, first.task, first.answer, first.mode) == ("rows/0", "math_verify", "5", "no_think")
    assert second.messages == ({"role": "user", "content": "Hi /think"},) and second.mode == "think"


def test_lines_of_a_pipe_are_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n two \n"))
    assert [one.messages[0]["content"] for one in known_questions([], None) or []] == ["one", " two "]


def test_lines_that_are_typed_are_prompts_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real terminal: Ctrl-D ends it."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert known_questions([], None) is None

        async def read() -> list[str]:
            os.write(ours, "What is 2 + 3?\n\nAnd 4 + é?\n\x04".encode())
            return [question.messages[0]["content"] async for question in typed_questions("")]

        assert asyncio.run(asyncio.wait_for(read(), 10)) == ["What is 2 + 3?", "And 4 + é?"]
    os.close(ours)


def test_who_decides_about_the_mode(hybrid: Path, plain: Path) -> None:
    """A switch in the text, then --mode, then the row, then what both models can do."""

    def modes(question: Question, *overrides: str, model: Path = hybrid) -> list[str]:
        run = run_of(model, *overrides)
        return [prompt.mode for prompt in _ask(run, question, list(_sides(run)))]

    assert modes(ask("x")) == ["think"]
    assert modes(ask("x", mode="no_think")) == ["no_think"]
    assert modes(ask("x", mode="no_think"), "mode=think") == ["think"]
    assert modes(ask("x /no_think"), "mode=think") == ["no_think"]
    assert modes(ask("x"), f"teacher.model={plain}") == ["no_think", "no_think"]
    assert modes(ask("x"), f"teacher.model={hybrid}", model=plain) == ["no_think", "no_think"]
    with pytest.raises(ConfigError, match=f"mode think is asked for.* of the teacher {plain} has only no_think"):
        modes(ask("x"), f"teacher.model={plain}", "mode=think")
    with pytest.raises(ConfigError, match="which leaves no room for a response in the context of the student"):
        modes(ask("x" * 5000))


def test_sampling_is_recommended_unless_given(hybrid: Path) -> None:
    [side] = _sides(run_of(hybrid))
    assert (side.sampling("think"), side.sampling("no_think")) == (Sampling(0.6, 0.95, 20), Sampling(0.7, 0.8, 20))
    student, teacher = _sides(
        run_of(hybrid, "rollout.temperature=0", f"teacher={{model: {hybrid}, top_k: 5, temperature: 1}}")
    )
    assert student.sampling("think") == Sampling(0.0, 0.95, 20)
    assert teacher.sampling("no_think") == Sampling(1.0, 0.8, 5)


def test_responses_end_with_the_context(hybrid: Path) -> None:
    [side] = _sides(run_of(hybrid))
    assert side.length(2048) == 4096
    [side] = _sides(run_of(hybrid, "rollout.max_tokens=10"))
    run = run_of(hybrid)
    side.prompts = _ask(run, ask("one"), [side])
    assert side.length(2048) == len(side.prompts[0].token_ids) + 10


def test_models_that_do_not_fit_beside_each_other(hybrid: Path) -> None:
    sides = list(_sides(run_of(hybrid, f"teacher={{model: {hybrid}, kv_cache_gib: 3}}")))
    cpus = {"CPU": 2.0}
    assert _too_large_together(sides, "cpu", cpus, free=7 * 2**30) == ""
    assert "need about 6.0 GiB, and 5.0 are free" in _too_large_together(sides, "cpu", cpus, free=5 * 2**30)
    assert _too_large_together(sides, "cpu", cpus, free=None) == ""
    assert _too_large_together(sides[:1], "cpu", cpus, free=2**30) == ""
    assert _too_large_together(sides, "cpu", {"CPU": 0.9}, free=None) == (
        "the engines of both models need 1 CPUs, and the cluster has 0.9"
    )
    assert "need 2 GPUs, and the cluster has 1" in _too_large_together(sides, "cuda", cpus | {"GPU": 1.0}, free=0)


def test_a_run_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    assert trained_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        trained_model(str(tmp_path))
    for part, step in (("off_policy/checkpoints", 600), ("checkpoints", 10)):
        last = checkpoint.commit(checkpoint.begin(tmp_path / part, step), {"step": step}, keep=1)
        (last / "config.json").write_text("{}")
        assert trained_model(str(tmp_path)) == str(last)
        assert trained_model(str(last)) == str(last)
