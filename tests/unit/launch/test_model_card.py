"""The card of a checkpoint: metadata that the hub's own library reads, and what the run knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny_models import make_checkpoint

import s2w
from s2w.config.compose import compose
from s2w.config.schema import Config
from s2w.launch.model_card import model_card
from s2w.models.checkpoint import Checkpoint, read_checkpoint
from s2w.records import Heldout, OffPolicyHeldout

SCORES = {"prompts": 8.0, "mode_adherence": 0.5, "truncated": 0.25, "response_length": 11.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = make_checkpoint(tmp_path_factory.mktemp("models"), "tied", 0)
    (path / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nbase_model: org/tiny-base\n---\n# Tiny\n")
    return read_checkpoint(str(path))


@pytest.fixture
def config(base: Checkpoint) -> Config:
    return compose([
        "teacher.model=Qwen/Qwen3-32B", f"student.model={base.path}", "data.tasks=[chain_sum, spell_backward]",
        "teachers.solver={model: org/solver, modes: [think], tasks: [chain_sum]}", "off_policy.steps=600",
        "loss.divergence=reverse_kl", "run.name=sums", "loop.steps=70",
    ])  # fmt: skip


def heldout(version: int, kl: float, accuracy: float) -> Heldout:
    return Heldout(version, kl, kl + 1, 100, 12.5, {"think": SCORES | {"accuracy": accuracy}})


def test_an_on_policy_card(config: Config, base: Checkpoint) -> None:
    evaluations = [heldout(0, 0.5, 0.25), heldout(40, 0.125, 0.75)]
    losses = [OffPolicyHeldout(0, 3.0, 10), OffPolicyHeldout(600, 0.25, 10)]
    path = Path("/runs/sums/checkpoints/step_000050")
    card = ModelCard(model_card(config, base, "on_policy", 50, path, evaluations, losses))
    assert card.data.to_dict() == {
        "base_model": "org/tiny-base", "library_name": "transformers", "license": "other", "license_name": "tiny",
        "pipeline_tag": "text-generation", "tags": ["s2w", "distillation", "on-policy-distillation", "conversational"],
    }  # fmt: skip
    for line in (
        "# sums: on-policy step 50",
        f"Made by strong-to-weak distillation with s2w {s2w.__version__}.",
        f"| base | `{base.path}` |",
        "| teacher | `Qwen/Qwen3-32B` |",
        "| teacher `solver` | `org/solver`, for think and chain_sum |",
        "| prompts | generated: chain_sum, spell_backward |",
        "| KL(teacher‖student), nats/token, after 40 on-policy steps | 0.5000 | 0.1250 |",
        "| KL(student‖teacher), nats/token, after 40 on-policy steps | 1.5000 | 1.1250 |",
        "| think: accuracy, 8 prompts | 0.25 | 0.75 |",
        "| off-policy loss, nats/token, after 600 steps | 3.0000 | 0.2500 |",
    ):
        assert line in card.text.splitlines()
    assert "| on-policy phase | 50 of 70 steps of 64 prompts x 1 responses" in card.text
    assert "objective divergence, divergence reverse_kl, signal hidden" in card.text
    assert f"path = '{path}'" in card.text and f"`vllm serve {path}`" in card.text
    assert "enable_thinking=True" in card.text


def test_an_off_policy_card_without_figures(config: Config, base: Checkpoint) -> None:
    card = ModelCard(model_card(config, base, "off_policy", 7, Path("x"), [], []))
    assert "| off-policy phase | 7 of 600 steps of 64 responses of the teacher's to the prompts" in card.text
    assert "on-policy phase" not in card.text and "Held-out" not in card.text
    assert "off-policy-distillation" in card.data.get("tags")


def test_a_base_on_the_hub_is_named_and_random_weights_have_none(
    config: Config, base: Checkpoint, tmp_path: Path
) -> None:
    plain = replace(base, reference="org/tiny", path=tmp_path)
    plain.tokenizer.chat_template = "{{ messages[0].content }}"
    metadata = ModelCard(model_card(config, plain, "on_policy", 1, Path("x"), [], []))
    assert metadata.data.get("base_model") == "org/tiny" and metadata.data.get("license") is None
    assert "enable_thinking" not in metadata.text
    config.student.init = "fresh"
    card = ModelCard(model_card(config, plain, "on_policy", 1, Path("x"), [], []))
    assert card.data.get("base_model") is None
    # A card that is no card is the same as none.
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert ModelCard(model_card(config, plain, "on_policy", 1, Path("x"), [], [])).data.get("license") is None
