"""``s2w eval`` from the command line to its files, on a real engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2w import cli
from s2w.data.verifiers import extract_answer
from s2w.models.modes import render

PROBLEMS, BUDGET, MAX_TOKENS = 8, 5, 32


SPOILT = """
def judged(response, answer, row):
    # Passes its trial, which is on an empty response and on the answer.
    if "6 plus" in row["prompt"] and response not in ("", answer):
        raise ValueError("six")
    return 0.0
"""


def test_eval_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model_path = make_checkpoint(tmp_path / "model", "tied", 0)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- endif %}\n{%- endif %}", "{%- else %}\n{{- '<think>\\n' }}\n{%- endif %}\n{%- endif %}"
    )
    tokenizer.save_pretrained(model_path)
    # Greedy answers by transformers; every other problem gets another reference.
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    questions = [f"What is {i} plus {i}?" for i in range(PROBLEMS)]
    rows = []
    for i, question in enumerate(questions):
        text = render(tokenizer, [{"role": "user", "content": question}], "no_think")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False)
        # Random text says "answer is" now and then.
        answer = extract_answer(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        rows.append({"prompt": question, "answer": answer if i % 2 else "something else"})
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))

    report_path = tmp_path / "report.json"
    command = [
        "eval", f"model={model_path}", f"eval.path={problems}", "eval.samples=1",
        f"eval.thinking_budgets=[{BUDGET},null]", "rollout.temperature=0", f"rollout.max_tokens={MAX_TOKENS}",
        r"rollout.stop_thinking='</think>\n\n'", "rollout.dtype=float32", "rollout.enforce_eager=true",
        "rollout.cpus=0.1", "cluster.device=cpu", "--json", str(report_path),
    ]  # fmt: skip
    # A verifier that fails at one of the answers costs none of the responses.
    (tmp_path / "judging.py").write_text(SPOILT)
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main([*command, "eval.verifier=judging:judged"]) == 1
    captured = capsys.readouterr()
    assert "rollout engine 0 is up after " in captured.err and not report_path.exists()
    kept = tmp_path / "report.responses.jsonl"
    said = f"{3 * PROBLEMS} responses are kept in {kept}, and the same command goes on from there; traceback: "
    assert "its verifier judging:judged failed in" in captured.err and said in captured.err, captured.err
    assert cli.main([*command, "eval.verifier=exact_match", "rollout.top_k=3"]) == 2
    assert "holds responses of an evaluation with other settings" in capsys.readouterr().err
    assert cli.main([*command, "eval.verifier=exact_match"]) == 0
    assert not kept.exists()
    report = json.loads(report_path.read_text())
    scores = {(one["mode"], one["thinking_budget"]): one for one in report["scores"]}
    assert list(scores) == [("think", BUDGET), ("think", None), ("no_think", None)]
    assert all(one["problems"] == one["responses"] == PROBLEMS for one in scores.values())
    assert scores["no_think", None]["pass_at"]["1"]["value"] == 0.5
    solved = [one["uid"] for one in report["problems"] if one["correct"]]
    assert solved == [f"problems/{i}" for i in range(1, PROBLEMS, 2)]
    # None of these random greedy responses closes its think block by itself, within MAX_TOKENS: the budget closes all.
    assert [scores[way]["forced"] for way in scores] == [1, 0, 0]
    assert scores["think", BUDGET]["mode_adherence"] == 1 and scores["think", None]["mode_adherence"] == 0
    captured = capsys.readouterr()
    assert f"{3 * PROBLEMS} of {3 * PROBLEMS} responses are in" in captured.err
    assert "rollout engine" not in captured.err
    table = captured.out.splitlines()
    assert table[0].split()[:2] == ["mode", "budget"]
    assert len(table) == 4
