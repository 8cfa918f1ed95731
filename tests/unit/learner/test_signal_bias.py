"""What cheaper signals would have given, against plain autograd in float64 over whole logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from s2w.learner.signal_bias import signal_bias, summarise
from s2w.models.head import Head
from s2w.objectives.divergences import make_divergence
from s2w.objectives.kernel import HiddenRows

ROWS, VOCAB, PADDED, TEMPERATURE = 9, 40, 48, 1.3


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HIDDEN, HEAD = draw(ROWS, 6, seed=0), Head(draw(PADDED, 6, seed=1))
TEACHER = HiddenRows(draw(ROWS, 8, seed=2), Head(draw(PADDED, 8, seed=3)))
SAMPLED = torch.arange(ROWS) * 4


def log_probs(hidden: Tensor, head: Head) -> Tensor:
    return (hidden @ head.weight[:VOCAB].T / TEMPERATURE).log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def coarsen(log_probs: Tensor, ids: Tensor) -> Tensor:
    """log-probs [N, k + 1] over the ids and the rest."""
    rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, ids), rest], -1)


def solve(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, Tensor]:
    """Value by (log p, log q), and its gradient by the student's hidden rows."""
    leaf = HIDDEN.clone().requires_grad_()
    value = loss(log_probs(TEACHER.hidden[:], TEACHER.head), log_probs(leaf, HEAD))
    return value.item(), torch.autograd.grad(value, leaf)[0]


def measured(divergence: str, hidden: Tensor = HIDDEN) -> dict[str, dict[str, float]]:
    """In two micro-batches of unequal size, in chunks."""
    parts = []
    for rows in (slice(0, 4), slice(4, ROWS)):
        parts.append(
            signal_bias(
                hidden[rows],
                HEAD,
                HiddenRows(TEACHER.hidden[rows], TEACHER.head),
                make_divergence(divergence),
                sampled_ids=SAMPLED[rows],
                vocab_size=VOCAB,
                temperature=TEMPERATURE,
                chunk_rows=2,
                top_k=(3, VOCAB, VOCAB + 1),
            )
        )
    return summarise(parts)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("kind", ["topk", "ids"])
def test_bias_and_cosine_of_sparse_signals(divergence: str, kind: str) -> None:
    def directed(log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl(log_p, log_q) if divergence == "forward_kl" else kl(log_q, log_p)

    def coarse(log_p: Tensor, log_q: Tensor) -> Tensor:
        ids = (log_p if kind == "topk" else log_q).topk(3).indices
        return directed(coarsen(log_p, ids), coarsen(log_q, ids))

    exact, exact_gradient = solve(directed)
    value, gradient = solve(coarse)
    got = measured(divergence)
    assert f"{kind}_{VOCAB + 1}" not in got
    cosine = torch.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), 0).item()
    # Gradients are compared in float32.
    assert got[f"{kind}_3"] == pytest.approx(
        {"divergence": value / ROWS, "bias": (value - exact) / ROWS, "cosine": cosine, "bytes_per_token": 28}, rel=1e-6
    )
    assert got[f"{kind}_3"]["bias"] < 0 and 0 < cosine < 1
    # All ids are the whole distribution.
    assert got[f"{kind}_{VOCAB}"]["bias"] == pytest.approx(0, abs=1e-12)
    assert got[f"{kind}_{VOCAB}"]["cosine"] == pytest.approx(1, abs=1e-6)


def test_the_sampled_token_carries_reverse_kl_alone() -> None:
    assert "sampled" not in measured("forward_kl")
    got = measured("reverse_kl")["sampled"]
    exact, exact_gradient = solve(lambda log_p, log_q: kl(log_q, log_p))

    def score_function(log_p: Tensor, log_q: Tensor) -> Tensor:
        at_p, at_q = (t.gather(-1, SAMPLED[:, None]) for t in (log_p, log_q))
        return ((at_q - at_p).detach() * at_q).sum()

    _, gradient = solve(score_function)
    log_p, log_q = log_probs(TEACHER.hidden[:], TEACHER.head), log_probs(HIDDEN, HEAD)
    value = (log_q - log_p).gather(-1, SAMPLED[:, None]).sum().item()
    cosine = torch.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), 0).item()
    assert got == pytest.approx(
        {"divergence": value / ROWS, "bias": (value - exact) / ROWS, "cosine": cosine, "bytes_per_token": 4}, rel=1e-6
    )


def test_smaller_dtypes_of_hidden_rows_lose_little() -> None:
    got = measured("forward_kl")
    exact = got[f"topk_{VOCAB}"]["divergence"]
    # 8 and 4 bits of precision: errors of the logits of 0.4 % and 6 %, both signs.
    for name, size, tolerance in (("hidden_bfloat16", 16, 0.01), ("hidden_float8", 12, 0.1)):
        assert got[name]["bytes_per_token"] == size
        assert 0 < abs(got[name]["bias"]) < tolerance * exact
        assert got[name]["cosine"] > 1 - tolerance


def test_arguments_get_no_gradient() -> None:
    leaf = HIDDEN.clone().requires_grad_()
    loss = leaf.square().sum()
    with torch.no_grad():
        measured("forward_kl", leaf)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * HIDDEN)
