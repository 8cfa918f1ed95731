"""Wire form of the teacher's signals, dispatch of the pool, the teacher's head."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint, make_model
from transformers import GraniteConfig, GraniteForCausalLM

from s2w.models.head import load_head
from s2w.records import Prompt, Rollout, VersionSpan
from s2w.teacher.pool import Dispatcher
from s2w.teacher.signal import SignalRequest, bytes_per_row, check_finite, decode, encode, hidden_rows, nbytes

ROWS, WIDTH, TOP_K = 5, 8, 3


def pooled(kind: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, np.ndarray | None]:
    """Rows in the pooler's layout, and candidates for kind ids."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(ROWS, TOP_K + 1, generator=generator) - 5
    ids = torch.randint(0, 100, (ROWS, TOP_K), generator=generator, dtype=torch.int32)
    match kind:
        case "hidden":
            return torch.randn(ROWS, WIDTH, generator=generator).to(dtype), None
        case "topk":
            return torch.cat([ids, values.view(torch.int32)], -1), None
        case "ids":
            return values, ids.numpy()
    return values[:, :1], None


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("hidden", torch.float32),
        ("hidden", torch.bfloat16),
        ("hidden", torch.float16),
        ("topk", torch.float32),
        ("ids", torch.float32),
        ("sampled", torch.float32),
    ],
)
def test_payload_survives_the_wire_bit_for_bit(kind, dtype):
    rows, candidates = pooled(kind, dtype)
    payload = pickle.loads(pickle.dumps(encode(kind, rows, candidates)))
    size = bytes_per_row(kind, top_k=TOP_K, hidden_size=WIDTH, dtype=str(dtype).removeprefix("torch."))
    assert nbytes(payload) == ROWS * size
    decoded = decode(payload)
    if kind == "hidden":
        assert decoded["hidden"].dtype == dtype
        assert torch.equal(decoded["hidden"], rows)
    elif kind == "sampled":
        assert torch.equal(decoded["log_probs"], rows[:, 0])
    else:
        values = rows[:, TOP_K:].view(torch.float32) if kind == "topk" else rows
        ids = rows[:, :TOP_K] if kind == "topk" else torch.from_numpy(candidates)
        assert torch.equal(decoded["ids"], ids) and decoded["ids"].dtype == torch.int32
        assert torch.equal(decoded["log_probs"], values[:, :-1])
        assert torch.equal(decoded["log_tail"], values[:, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_rows_keep_four_bits_at_any_scale(dtype):
    rows = pooled("hidden", dtype)[0] * torch.tensor([1e-4, 1.0, 1e4, 0.0, 3.0])[:, None]
    payload = pickle.loads(pickle.dumps(encode("hidden", rows.to(dtype), dtype="float8")))
    assert nbytes(payload) == ROWS * bytes_per_row("hidden", hidden_size=WIDTH, dtype="float8_e4m3fn") == ROWS * 12
    decoded = decode(payload)
    again = hidden_rows(decoded, torch.float32)
    # Half a unit of the fourth bit; below 2^-6 of 448 the format's steps no longer shrink.
    allowed = 2**-4 * rows.float().abs() + 2**-10 * decoded["scale"][:, None]
    assert ((again - rows.to(dtype).float()).abs() <= allowed).all()
    assert torch.equal(again[3], torch.zeros(WIDTH))
    assert torch.equal(hidden_rows(decoded, torch.bfloat16), again.bfloat16())


def test_wide_rows_become_float8_in_blocks():
    rows = torch.randn(70, 2**12, generator=torch.Generator().manual_seed(1))
    again = hidden_rows(decode(encode("hidden", rows, dtype="float8")), torch.float32)
    assert ((again - rows).norm(dim=-1) < 0.04 * rows.norm(dim=-1)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_float8_row_that_was_not_finite_is_found_by_its_scale(value):
    rows = pooled("hidden")[0]
    rows[3, 2] = value
    with pytest.raises(FloatingPointError, match=r"u: scale is not finite in 1 of 5 rows, first 3"):
        check_finite(encode("hidden", rows, dtype="float8"), "u")


def test_decoded_tensors_share_the_payloads_memory():
    payload = encode("topk", pooled("topk")[0])
    for name, tensor in decode(payload).items():
        assert tensor.data_ptr() == payload[name].ctypes.data


def test_read_only_arrays_decode_without_a_warning(recwarn):
    payload = encode("sampled", pooled("sampled")[0])
    payload["log_probs"].flags.writeable = False
    decode(payload)
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_in_hidden_rows_names_the_rollout(dtype):
    rows = pooled("hidden", dtype)[0]
    check_finite(encode("hidden", rows), "task/7#1")
    rows[3, 2] = torch.nan
    with pytest.raises(FloatingPointError, match=r"task/7#1: hidden is not finite in 1 of 5 rows, first 3"):
        check_finite(encode("hidden", rows), "task/7#1")


def test_an_empty_tail_is_finite_but_a_lost_log_prob_is_not():
    rows, candidates = pooled("ids")
    rows[1, -1] = -torch.inf
    check_finite(encode("ids", rows, candidates), "u")
    rows[1, 0] = -torch.inf
    with pytest.raises(FloatingPointError, match="log_probs"):
        check_finite(encode("ids", rows, candidates), "u")
    rows[1, 0], rows[2, -1] = -1.0, torch.inf
    with pytest.raises(FloatingPointError, match="log_tail"):
        check_finite(encode("ids", rows, candidates), "u")


@pytest.mark.parametrize("arguments", [("logits",), ("topk", 0), ("sampled", 0, 0.0), ("sampled", 0, float("nan"))])
def test_impossible_requests_are_refused(arguments):
    with pytest.raises(ValueError):
        SignalRequest(*arguments)


def rollout(uid: str, sample: int, prompt: int, response: int) -> Rollout:
    taken = Prompt(uid, (), np.zeros(prompt, np.int32), "think", 0)
    ids, log_probs = np.zeros(response, np.int32), np.zeros(response, np.float32)
    return Rollout(taken, sample, ids, log_probs, (VersionSpan(0, response, 0),), "stop", 0, 0, 0)


def test_samples_of_a_prompt_stay_together_until_their_queue_outgrows_the_prompt():
    dispatcher = Dispatcher(2)
    # Replica 0 takes the prompt (100 + 60 tokens). Then it has 160 + 60 to do, against 0 + 160 at replica 1.
    assert dispatcher.assign(rollout("a", 0, 100, 60), [0, 1]) == (0, 160)
    assert dispatcher.assign(rollout("a", 1, 100, 60), [0, 1]) == (1, 160)
    dispatcher.release(1, 160)
    dispatcher.release(0, 160)
    # Both hold the prompt now; a prompt that none holds goes where less waits.
    assert dispatcher.assign(rollout("a", 2, 100, 60), [0, 1]) == (0, 60)
    assert dispatcher.assign(rollout("b", 0, 10, 10), [0, 1]) == (1, 20)
    # Holder 1 has 20 waiting, and the prompt of b is 10: 20 + 10 there, 60 + 20 elsewhere.
    assert dispatcher.assign(rollout("b", 1, 10, 10), [0, 1]) == (1, 10)


def test_a_replaced_replica_holds_no_prefix_and_a_dead_one_gets_nothing():
    dispatcher = Dispatcher(2)
    index, tokens = dispatcher.assign(rollout("a", 0, 100, 1), [0, 1])
    dispatcher.release(index, tokens)
    assert dispatcher.assign(rollout("a", 1, 100, 1), [1]) == (1, 101)
    dispatcher.forget(0)
    assert dispatcher.assign(rollout("a", 2, 100, 1), [0]) == (0, 101)


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
