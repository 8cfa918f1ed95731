"""Wire form of the teacher's signals."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

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
