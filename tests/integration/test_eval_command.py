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


def test_eval_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    status = cli.main([
        "eval", f"model={model_path}", f"eval.path={problems}", "eval.verifier=exact_match", "eval.samples=1",
        f"eval.thinking_budgets=[{BUDGET},null]", "rollout.temperature=0", f"rollout.max_tokens={MAX_TOKENS}",
        r"rollout.stop_thinking='</think>\n\n'", "rollout.dtype=float32", "rollout.enforce_eager=true",
        "rollout.cpus=0.1", "cluster.device=cpu", "--json", str(report_path),
    ])  # fmt: skip
    assert status == 0
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
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["mode", "budget"]
    assert len(table) == 4
