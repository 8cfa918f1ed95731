"""Problems of an evaluation: generated, or of a file; and what is refused before anything starts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import make_checkpoint, make_tokenizer

from s2w import cli
from s2w.config.compose import compose_as
from s2w.config.schema import EvalConfig, EvalRun
from s2w.data.tasks import generate
from s2w.errors import ConfigError
from s2w.eval.problems import make_prompts, read_problems
from s2w.launch.evaluate import evaluate

ROWS = [{"problem": f"What is {i} plus {i}?", "solution": "add", "answer": 2 * i} for i in range(5)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("models") / "tied", "tied", 0))


def write_jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_tasks_give_the_prompts_that_a_run_holds_out() -> None:
    problems = read_problems(EvalConfig(tasks=["chain_sum", "spell_backward"], problems=3, seed=7))
    _, heldout = generate("chain_sum", 5, 3, seed=7)
    assert [problem.messages[0]["content"] for problem in problems[:3]] == [entry["question"] for entry in heldout]
    assert [problem.task for problem in problems] == ["chain_sum"] * 3 + ["spell_backward"] * 3


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"sums.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path)
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    config = EvalConfig(path=str(path), prompt_column="problem", template="{question} {Think} \\boxed{}")
    problems = read_problems(config)
    assert [problem.uid for problem in problems] == [f"sums/{i}" for i in range(5)]
    assert problems[2].messages == ({"role": "user", "content": "What is 2 plus 2? {Think} \\boxed{}"},)
    assert (problems[2].answer, problems[2].task) == ("4", "math_verify")


def test_a_verifier_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given the whole row, and may need no answer."""
    (tmp_path / "own_grading.py").write_text("def second(response, answer, row):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings: dict[str, Any] = {"path": str(write_jsonl(tmp_path / "sums.jsonl")), "prompt_column": "problem"}
    problems = read_problems(EvalConfig(verifier="own_grading:second", answer_column="", **settings))
    assert (problems[2].answer, problems[2].task) == (None, "own_grading:second")
    assert problems[2].metadata == {"row": ROWS[2]}
    with pytest.raises(ConfigError, match=r"^eval\.answer_column is empty: only a verifier of your own"):
        read_problems(EvalConfig(answer_column="", **settings))
    with pytest.raises(ConfigError, match=r"^eval\.verifier: There is no verifier .* did you mean 'math_verify'"):
        read_problems(EvalConfig(verifier="math_verfy", **settings))


def test_prompts_of_both_modes_differ_in_the_think_block_only() -> None:
    tokenizer = make_tokenizer()
    config = EvalConfig(tasks=["chain_sum"], problems=2, system_prompt="Be short.")
    problems = read_problems(config)
    think, no_think = (make_prompts(problems, mode, tokenizer, config) for mode in ("think", "no_think"))
    for one, other in zip(think, no_think, strict=True):
        assert (one.uid, one.seed) == (other.uid, other.seed)
        text, empty = (str(tokenizer.decode(prompt.token_ids)) for prompt in (one, other))
        assert "Be short." in text and empty == text + "<think>\n\n</think>\n\n"
    assert think[0].seed != think[1].seed


def test_choices_are_shuffled_and_the_answer_is_the_letter(tmp_path: Path) -> None:
    path = tmp_path / "choices.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Question", "Right", "Wrong 1", "Wrong 2"])
        writer.writerows([f"Which, {i}?", "right one", "bad,\nin two lines", "worse"] for i in range(40))
    config = EvalConfig(
        path=str(path), prompt_column="Question", answer_column="Right", choice_columns=["Wrong 1", "Wrong 2"]
    )
    problems = read_problems(config)
    for i, problem in enumerate(problems):
        text = problem.messages[0]["content"]
        assert text.startswith(f"Which, {i}?\n\nA) ")
        assert f"{problem.answer}) right one" in text and problem.task == "exact_match"
        assert all(choice in text for choice in ("bad,\nin two lines", "worse"))
    # 40 problems: a letter is missing in one of 3 million orders.
    assert {problem.answer for problem in problems} == {"A", "B", "C"}
    assert read_problems(config) == problems


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["eval.tasks=[chain_summ]"], "There is no reasoning-gym task 'chain_summ'; did you mean 'chain_sum'?"),
        ([], "set one of eval.tasks and eval.path"),
        (["eval.tasks=[chain_sum]", "eval.path=x.jsonl"], "set one of eval.tasks and eval.path, not both"),
        (["eval.path=FILE"], "line 1, has neither `messages` nor `prompt`: name another column in eval.p"),
        (["eval.path=FILE", "eval.prompt_column=problem", "eval.answer_column=gold"], "has no 'gold' (eval.answer_co"),
        (["eval.path=/no/such.jsonl"], "There is no prompt file '/no/such.jsonl'"),
        (["eval.path='hf://data/x'"], "write hf://datasets/OWNER/NAME/FILE"),
        (["eval.path='hf://datasets/o/n/x.jsonl'"], "cannot get hf://datasets/o/n/x.jsonl"),
        (["eval.tasks=[chain_sum]", "eval.samples=4", "eval.k=[1,16]"], "pass@16, which needs 16 samples, and eval.sa"),
        (["eval.tasks=[chain_sum]", "rollout.temperature=0"], "makes all of eval.samples=4 the same"),
        (["eval.tasks=[chain_sum]", "eval.thinking_budgets=[8,1000]"], "eval.thinking_budgets=1000 and the"),
        (["eval.tasks=[chain_sum]", "rollout.thinking_budget=0"], "rollout.thinking_budget=0: must be >= 1"),
        (["eval.tasks=[chain_sum]", "eval.thinking_budgets=[8]", "eval.modes=[no_think]"], "is not in eval.modes"),
        (["eval.tasks=[chain_sum]", "eval.output=/no/such/x.json"], "there is no directory '/no/such'"),
        (["eval.tasks=[chain_sum]", "rollout.max_tokens=5000"], "more than the model's context of 4096"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(extra: list[str], sentence: str, checkpoint: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "sums.jsonl")
    overrides = [argument.replace("FILE", str(path)) for argument in extra]
    with pytest.raises(ConfigError) as caught:
        evaluate(compose_as(EvalRun, [f"model={checkpoint}", "rollout.max_tokens=200", *overrides]))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_budget_needs_a_template_that_thinks(checkpoint: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    for file in Path(checkpoint).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    overrides = [f"model={tmp_path}", "eval.tasks=[chain_sum]"]
    with pytest.raises(ConfigError, match=r"rollout\.thinking_budget=9, but the chat template .* no think block"):
        evaluate(compose_as(EvalRun, [*overrides, "rollout.thinking_budget=9"]))


def test_the_command_reports_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "eval.tasks=[chain_sum]"]) == 2
    assert capsys.readouterr().err == "s2w: model is not set: give it on the command line\n"
    assert cli.main(["eval", "model=x", "eval.sample=3"]) == 2
    assert "did you mean eval.samples?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["aime24", "aime25", "math500", "gpqa"])
def test_ready_evaluations_compose(name: str) -> None:
    config = compose_as(EvalRun, ["model=x", f"eval={name}"]).eval
    assert config.path is not None and config.path.startswith("hf://datasets/")
    assert "{question}" in config.template and "\\boxed{}" in config.template
    assert max(config.k) <= config.samples
