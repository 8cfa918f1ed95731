"""What a preflight finds out before any model loads, and what it allows.

The rest is in tests/integration/test_teacher_to_learner.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from tiny_models import make_checkpoint
from transformers import AutoTokenizer

from s2w.config.compose import compose
from s2w.config.schema import Config
from s2w.errors import ConfigError
from s2w.launch.preflight import FLOAT32, LOW_PRECISION, check_templates, tolerance
from s2w.launch.train import train
from s2w.models.modes import render
from s2w.records import Mode, Prompt, SignalKind


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "teacher", "tied", seed=0)


@pytest.fixture
def config(teacher: Path) -> Config:
    config = Config()
    config.teacher.model = str(teacher)
    return config


@pytest.fixture
def prompts(teacher: Path) -> list[Prompt]:
    """As the student, whose tokenizer is the teacher's, renders them."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    messages = ({"role": "user", "content": "What is 3 plus 4?"},)
    modes: tuple[Mode, ...] = get_args(Mode)
    return [
        Prompt(f"sum/{mode}", messages, np.asarray(tokenizer(render(tokenizer, messages, mode))["input_ids"]), mode, 0)
        for mode in modes
    ]


def test_the_same_template_passes(config: Config, prompts: list[Prompt]) -> None:
    check_templates(config, prompts)


@pytest.mark.parametrize(
    ("ours", "theirs", "where"),
    [
        ("<|im_start|>assistant", "<|im_start|>model", r"renders prompt 'sum/think' differently .* from token \d+ on"),
        ("<think>\\n\\n</think>\\n\\n", "", r"does not render prompt 'sum/think' in mode think"),
    ],
)
def test_a_swapped_template_is_found_out(
    config: Config, prompts: list[Prompt], teacher: Path, ours: str, theirs: str, where: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    assert ours in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(ours, theirs)
    tokenizer.save_pretrained(teacher)
    with pytest.raises(ConfigError, match=rf"^run.preflight: the chat template of teacher .* {where}"):
        check_templates(config, prompts)
    # The student's own template was changed on purpose.
    config.student.thinking_switch = True
    check_templates(config, prompts)


@pytest.mark.parametrize("kind", get_args(SignalKind))
@pytest.mark.parametrize("way", ["divergence", "log_probs"])
def test_a_run_with_a_swapped_template_ends_before_it_starts(
    way: str, kind: SignalKind, teacher: Path, tmp_path: Path
) -> None:
    student = make_checkpoint(tmp_path / "student", "tied", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>assistant", "<|im_start|>model")
    tokenizer.save_pretrained(teacher)
    divergence = "reverse_kl" if kind == "sampled" else "forward_kl"
    config = compose(
        [
            f"teacher.model={teacher}", f"student.model={student}", f"run.dir={tmp_path / 'run'}",
            f"run.preflight={way}", f"signal.kind={kind}", f"loss.divergence={divergence}", "data.tasks=[chain_sum]",
            "data.train_prompts=4", "data.heldout_prompts=2", "data.max_prompt_tokens=128", "rollout.max_tokens=8",
        ]
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^run.preflight: the chat template of teacher .* from token \d+ on"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_template_passes(config: Config, prompts: list[Prompt], teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(teacher)
    (teacher / "chat_template.jinja").unlink(missing_ok=True)
    check_templates(config, prompts)


def test_only_float32_all_the_way_is_held_to_float32(config: Config) -> None:
    config.teacher.dtype = config.learner.dtype = "float32"
    assert tolerance(config, "cpu") is FLOAT32
    config.signal.dtype = "float8"
    assert tolerance(config, "cpu") is LOW_PRECISION
    config.signal.dtype, config.learner.dtype = "auto", "bfloat16"
    assert tolerance(config, "cpu") is LOW_PRECISION
