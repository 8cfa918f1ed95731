"""The loss on a GPU, at the size of Qwen3's vocabulary, against plain operations in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_problem import FORMULAS, build

from s2w.objectives.kernel import Head, HiddenRows, SparseRows, divergence_loss

VOCAB, ROWS_OF_HEAD, STUDENT, TEACHER, ROWS = 151_669, 151_936, 256, 384, 96


def draw(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


@pytest.mark.gpus(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("signal", ["hidden", "topk"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "adaptive_kl"])
def test_loss_and_gradients(name: str, signal: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = draw(dtype, ROWS, STUDENT).requires_grad_()
    weight = draw(dtype, ROWS_OF_HEAD, STUDENT, scale=2 / STUDENT**0.5).requires_grad_()
    teacher_hidden, teacher_weight = (
        draw(dtype, ROWS, TEACHER),
        draw(dtype, ROWS_OF_HEAD, TEACHER, scale=2 / TEACHER**0.5),
    )
    weights = torch.rand(ROWS, device="cuda")

    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    log_q = (exact[0] @ exact[1][:VOCAB].T).log_softmax(-1)
    log_p = (teacher_hidden.double() @ teacher_weight[:VOCAB].double().T).log_softmax(-1)
    if signal == "hidden":
        rows: HiddenRows | SparseRows = HiddenRows(teacher_hidden, Head(teacher_weight))
    else:
        ids = log_p.topk(64).indices
        tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        rows = SparseRows(ids, log_p.gather(-1, ids).float(), tail.float())
        rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        log_p = torch.cat([log_p.gather(-1, ids), tail[:, None]], -1)
        log_q = torch.cat([log_q.gather(-1, ids), rest], -1)
    expected = (FORMULAS[name](log_p, log_q) * weights).sum()
    expected_gradients = torch.autograd.grad(expected, exact)

    output = divergence_loss(hidden, Head(weight), rows, build(name), vocab_size=VOCAB, weights=weights, chunk_rows=40)
    gradients = torch.autograd.grad(output.loss, [hidden, weight])
    errors = [
        ((one.double() - other).norm() / other.norm()).item()
        for one, other in zip([output.loss, *gradients], [expected, *expected_gradients], strict=True)
    ]
    print(f"{name} {signal} {dtype}: relative errors of the loss and of both gradients", [f"{e:.1e}" for e in errors])
    # float32: TF32 is off. bfloat16: inputs are exact, products are summed in float32, gradients are rounded to 8 bits
    # of mantissa (2e-3 each) as are the factors of the products that make them.
    limits = (1e-5, 1e-4, 1e-4) if dtype == torch.float32 else (1e-4, 1e-2, 1e-2)
    assert all(error < limit for error, limit in zip(errors, limits, strict=True)), errors
