"""First weights of a student: as they are, pruned, or random."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import Kind, make_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, Qwen3MoeConfig

from s2w.config.schema import StudentConfig
from s2w.errors import ConfigError
from s2w.models import shards
from s2w.models.student import evenly_spaced, materialise_student, pruned_config


def pruned(model: Path, keep: int | None) -> StudentConfig:
    return StudentConfig(model=str(model), init="pruned", keep_layers=keep)


def fresh(model: Path, **overrides: Any) -> StudentConfig:
    return StudentConfig(model=str(model), init="fresh", overrides=overrides)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tied", "tied", seed=0, num_hidden_layers=5)


def test_checkpoint_is_used_as_it_is(tied: Path, tmp_path: Path) -> None:
    assert materialise_student(StudentConfig(model=str(tied)), tmp_path / "student", seed=0) == tied
    assert not (tmp_path / "student").exists()


def test_evenly_spaced() -> None:
    assert evenly_spaced(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert evenly_spaced(5, 5) == [0, 1, 2, 3, 4]
    for layers in range(2, 40):
        for keep in range(2, layers + 1):
            kept = evenly_spaced(layers, keep)
            assert len(set(kept)) == keep
            assert (kept[0], kept[-1]) == (0, layers - 1)
            gaps = {after - before for before, after in pairwise(kept)}
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_pruned_computes_with_the_kept_layers(kind: Kind, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", kind, seed=3, num_hidden_layers=5)
    path = materialise_student(pruned(source, 3), tmp_path / "student", seed=0)
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 3

    reference = AutoModelForCausalLM.from_pretrained(source)
    reference.model.layers = torch.nn.ModuleList(reference.model.layers[i] for i in (0, 2, 4))
    for index, layer in enumerate(reference.model.layers):
        layer.self_attn.layer_idx = index
    reference.config.num_hidden_layers = 3
    ids = torch.arange(24).reshape(2, 12)
    # The same weights through the same operations: equal to the last bit.
    assert torch.equal(model(ids, use_cache=False).logits, reference(ids, use_cache=False).logits)


def test_pruned_is_an_ordinary_checkpoint(tied: Path, tmp_path: Path) -> None:
    path = materialise_student(pruned(tied, 2), tmp_path / "student", seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (path / name).read_bytes() == (tied / name).read_bytes()
    assert AutoTokenizer.from_pretrained(path).eos_token == "<|im_end|>"
    assert [entry.name for entry in tmp_path.iterdir()] == ["student"]


def test_pruned_reads_and_writes_shards(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = materialise_student(pruned(tied, 3), tmp_path / "whole", seed=0)
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(tied).save_pretrained(source, max_shard_size="500KB")
    for file in tied.iterdir():
        if file.name.startswith(("tokenizer", "chat")):
            (source / file.name).symlink_to(file)
    assert len(list(source.glob("*.safetensors"))) > 2
    monkeypatch.setattr(shards.write_weights, "__defaults__", (500_000,))
    sharded = materialise_student(pruned(source, 3), tmp_path / "sharded", seed=0)
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(whole / "model.safetensors")
    assert tensors.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_pruned_keeps_settings_of_single_layers() -> None:
    """Which layers slide, and which have experts, goes with the layer and not with its index."""
    gemma = Gemma3TextConfig(num_hidden_layers=12, hidden_size=32, num_attention_heads=2, vocab_size=64)
    kept = evenly_spaced(12, 5)
    assert pruned_config(gemma, kept).layer_types == [(gemma.layer_types or [])[i] for i in kept]
    small: dict[str, Any] = {
        "num_hidden_layers": 8, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4,
        "moe_intermediate_size": 16, "intermediate_size": 32, "vocab_size": 64,
    }  # fmt: skip
    by_list = pruned_config(Qwen3MoeConfig(**small, mlp_only_layers=[0, 3, 7]), [0, 2, 5, 7])
    assert by_list.mlp_only_layers == [0, 3]
    # Experts in every second layer: 1, 3, 5, 7.
    by_step = pruned_config(Qwen3MoeConfig(**small, decoder_sparse_step=2), [0, 1, 5, 6, 7])
    assert (by_step.mlp_only_layers, by_step.decoder_sparse_step) == ([0, 3], 1)


@pytest.mark.parametrize("keep", [0, 1, 6])
def test_keep_layers_out_of_range(tied: Path, tmp_path: Path, keep: int) -> None:
    with pytest.raises(ConfigError, match=f"between 2 and the model's 5 layers, not {keep}"):
        materialise_student(pruned(tied, keep), tmp_path / "student", seed=0)
    assert not list(tmp_path.iterdir())


def test_fresh_depends_on_the_seed_alone(tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    student = fresh(tied, num_hidden_layers=3, hidden_size=64)
    state = torch.get_rng_state()
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(7)
        weights.append(load_file(materialise_student(student, tmp_path / name, seed) / "model.safetensors"))
    torch.set_rng_state(state)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(weights[0][embedding], weights[2][embedding])
    assert weights[0][embedding].shape == (512, 64)
    config = AutoConfig.from_pretrained(tmp_path / "a")
    assert (config.num_hidden_layers, len(config.layer_types), config.hidden_size) == (3, 3, 64)
    assert AutoTokenizer.from_pretrained(tmp_path / "a").eos_token == "<|im_end|>"
    assert capsys.readouterr() == ("", "")  # No bar, and no warning of tied weights.


def test_fresh_refuses_bad_overrides(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no field 'num_hiden_layers'.*did you mean 'num_hidden_layers'"):
        materialise_student(fresh(tied, num_hiden_layers=2), tmp_path / "student", seed=0)
    with pytest.raises(ConfigError, match="vocab_size 100 is smaller than the tokenizer's 512 tokens"):
        materialise_student(fresh(tied, vocab_size=100), tmp_path / "student", seed=0)
    with pytest.raises(ConfigError, match="do not give a valid qwen3 model"):
        materialise_student(fresh(tied, num_hidden_layers="four"), tmp_path / "student", seed=0)


def test_directory_is_reused_only_for_the_same_student(tied: Path, tmp_path: Path) -> None:
    path = materialise_student(pruned(tied, 3), tmp_path / "student", seed=0)
    written = (path / "model.safetensors").stat()
    assert materialise_student(pruned(tied, 3), path, seed=9) == path
    assert (path / "model.safetensors").stat() == written
    with pytest.raises(ConfigError, match="holds something other than the student asked for"):
        materialise_student(pruned(tied, 4), path, seed=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ConfigError, match="holds something other"):
        materialise_student(pruned(tied, 3), tmp_path / "mine", seed=0)
