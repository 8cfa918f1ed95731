"""Heads read from checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint, make_model
from transformers import GraniteConfig, GraniteForCausalLM

from s2w.models.head import load_head


@pytest.mark.parametrize("kind", ["tied", "untied", "moe"])
def test_head_is_the_models_output_embedding(tmp_path, kind):
    make_checkpoint(tmp_path, kind, seed=1)
    head = load_head(str(tmp_path))
    assert torch.equal(head.weight, make_model(kind, seed=1).get_output_embeddings().weight)
    assert (head.bias, head.softcap, head.scale, head.vocab_size) == (None, None, 1.0, 512)


def test_head_of_a_sharded_checkpoint_reads_its_shard_only(tmp_path):
    make_checkpoint(tmp_path, "untied", seed=1)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = {name: "model-2.safetensors" if name == "lm_head.weight" else "model-1.safetensors" for name in tensors}
    # model-1.safetensors is not there: a read of it would fail.
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, tmp_path / "model-2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert torch.equal(load_head(str(tmp_path)).weight, tensors["lm_head.weight"])


def test_head_has_the_models_logit_scale_bias_and_softcap(tmp_path):
    config = GraniteConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=8.0,
        tie_word_embeddings=False,
    )
    model = GraniteForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    head = load_head(str(tmp_path))
    with torch.no_grad():
        output = model(torch.arange(10)[None], output_hidden_states=True)
        logits = output.hidden_states[-1] @ head.weight.T * head.scale
    # One product and a division in float32: the error is rounding.
    torch.testing.assert_close(logits, output.logits, atol=1e-6, rtol=1e-5)

    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"final_logit_softcapping": 30.0}))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.bias"] = torch.arange(64.0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    head = load_head(str(tmp_path))
    assert head.softcap == 30.0
    assert head.bias is not None and torch.equal(head.bias, torch.arange(64.0))


def test_quantized_and_missing_heads_are_refused(tmp_path):
    make_checkpoint(tmp_path, "untied", seed=1)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(ValueError, match="quantized"):
        load_head(str(tmp_path))
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="no tensor ends with lm_head"):
        load_head(str(tmp_path))
    file.unlink()
    with pytest.raises(ValueError, match="neither"):
        load_head(str(tmp_path))
