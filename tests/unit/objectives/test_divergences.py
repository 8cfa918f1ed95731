"""Divergences against their textbook formulas in float64, and at the edges of the simplex."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from s2w.config.schema import LossConfig
from s2w.objectives.divergences import (
    DIVERGENCES,
    AdaptiveKL,
    AlphaDivergence,
    ClippedForwardKL,
    Divergence,
    EntropyAwareKL,
    ForwardKL,
    GeneralisedJSD,
    KLMixture,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    divergence_of,
    make_divergence,
    parameters_of,
)

Formula = Callable[[Tensor, Tensor], Tensor]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def adaptive(p: Tensor, q: Tensor, head_mass: float = 0.5) -> Tensor:
    """AKL with the head found by a plain loop."""
    out = []
    for p_row, q_row in zip(p, q, strict=True):
        head = torch.zeros_like(p_row, dtype=torch.bool)
        for token in p_row.argsort(descending=True):
            if p_row[head].sum() >= head_mass:
                break
            head[token] = True
        gap = (p_row - q_row).abs().detach()
        w = gap[head].sum() / gap.sum()
        out.append(w * kl(p_row, q_row) + (1 - w) * kl(q_row, p_row))
    return torch.stack(out)


def entropy_aware(p: Tensor, q: Tensor, threshold: float, weight: float) -> Tensor:
    """EOPD row by row: reverse KL, and forward KL where the teacher is unsure."""
    out = []
    for p_row, q_row in zip(p, q, strict=True):
        unsure = -(p_row * p_row.log()).sum() >= threshold
        out.append(kl(q_row, p_row) + (weight * kl(p_row, q_row) if unsure else 0.0))
    return torch.stack(out)


def clipped(p: Tensor, q: Tensor, clip: float) -> Tensor:
    return torch.minimum(p * (p / q).log(), torch.tensor(clip, dtype=p.dtype)).sum(-1)


BETWEEN = 2.4
"""Nats: some of the teacher's rows that the tests draw have more entropy, some less."""
CASES: list[tuple[Divergence, Formula]] = [
    (ForwardKL(), kl),
    (ReverseKL(), lambda p, q: kl(q, p)),
    (GeneralisedJSD(0.5), lambda p, q: jsd(p, q, 0.5)),
    (GeneralisedJSD(0.1), lambda p, q: jsd(p, q, 0.1)),
    (GeneralisedJSD(0.0), kl),
    (GeneralisedJSD(1.0), lambda p, q: kl(q, p)),
    (SkewForwardKL(0.1), lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    (SkewReverseKL(0.2), lambda p, q: kl(q, 0.8 * p + 0.2 * q)),
    (TotalVariation(), lambda p, q: (p - q).abs().sum(-1) / 2),
    (AlphaDivergence(0.3), lambda p, q: (1 - (p**0.3 * q**0.7).sum(-1)) / (0.3 * 0.7)),
    (AlphaDivergence(0.0), lambda p, q: kl(q, p)),
    (AlphaDivergence(1.0), kl),
    (AdaptiveKL(), adaptive),
    (KLMixture(), lambda p, q: (kl(p, q) + kl(q, p)) / 2),
    (KLMixture(0.8), lambda p, q: 0.8 * kl(p, q) + 0.2 * kl(q, p)),
    (KLMixture(0.0), lambda p, q: kl(q, p)),
    (KLMixture(1.0), kl),
    (EntropyAwareKL(), lambda p, q: entropy_aware(p, q, 0.8, 1.0)),
    (EntropyAwareKL(BETWEEN, 0.3), lambda p, q: entropy_aware(p, q, BETWEEN, 0.3)),
    (ClippedForwardKL(), lambda p, q: clipped(p, q, 0.05)),
    (ClippedForwardKL(0.3), lambda p, q: clipped(p, q, 0.3)),
]
IDS = [repr(divergence) for divergence, _ in CASES]


def draw(rows: int, size: int, spread: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sets of float64 logits."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, rows, size, generator=generator, dtype=torch.float64) * spread
    return p, q


def test_every_divergence_has_a_case() -> None:
    assert {divergence.name for divergence, _ in CASES} == set(DIVERGENCES)


@pytest.mark.parametrize(("divergence", "formula"), CASES, ids=IDS)
def test_value_and_derivative(divergence: Divergence, formula: Formula) -> None:
    p_logits, q_logits = draw(5, 40)
    log_p = p_logits.log_softmax(-1)
    log_q = q_logits.log_softmax(-1).requires_grad_()
    expected = formula(log_p.exp(), log_q.exp())
    (gradient,) = torch.autograd.grad(expected.sum(), log_q)
    with torch.no_grad():
        value, derivative = divergence(log_p, log_q)
    # A formula may differ from the terms by a multiple of sum p or of sum q, both 1, in the derivative by a multiple
    # of q: what must agree is the gradient by the logits.
    q = log_q.exp()
    torch.testing.assert_close(value.sum(-1), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        derivative - q * derivative.sum(-1, keepdim=True),
        gradient - q * gradient.sum(-1, keepdim=True),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("divergence", [d for d, _ in CASES if d.is_f_divergence], ids=repr)
def test_derivative_is_that_of_the_value(divergence: Divergence) -> None:
    """Elementwise, by central differences: also where log q is no distribution's."""
    p_logits, q_logits = draw(3, 20)
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    step = 1e-6
    slope = (divergence(log_p, log_q + step)[0] - divergence(log_p, log_q - step)[0]) / (2 * step)
    torch.testing.assert_close(divergence(log_p, log_q)[1], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("divergence", "formula"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arguments_are_kept_and_results_are_new(divergence: Divergence, formula: Formula, dtype: torch.dtype) -> None:
    p_logits, q_logits = draw(2, 10)
    log_p, log_q = p_logits.log_softmax(-1).to(dtype), q_logits.log_softmax(-1).to(dtype)
    given = log_p, log_q, log_p.exp(), log_q.exp()
    before = [tensor.clone() for tensor in given]
    value, derivative = divergence.terms(*given)
    value.fill_(torch.nan)
    derivative.fill_(torch.nan)
    for tensor, copy in zip(given, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize(("divergence", "formula"), CASES, ids=IDS)
def test_masked_tokens_add_nothing(divergence: Divergence, formula: Formula) -> None:
    p_logits, q_logits = draw(4, 12)
    bare = divergence(p_logits.log_softmax(-1), q_logits.log_softmax(-1))
    pad = torch.full((4, 3), -torch.inf, dtype=torch.float64)
    padded = divergence(torch.cat([p_logits, pad], -1).log_softmax(-1), torch.cat([q_logits, pad], -1).log_softmax(-1))
    for with_pad, without in zip(padded, bare, strict=True):
        assert torch.equal(with_pad[:, 12:], torch.zeros_like(pad))
        torch.testing.assert_close(with_pad[:, :12], without, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("divergence", "formula"), CASES, ids=IDS)
def test_float32_far_apart(divergence: Divergence, formula: Formula) -> None:
    """Logits so far apart that most probabilities underflow in float32: finite, and close to float64."""
    p_logits, q_logits = draw(16, 200, spread=60.0)
    exact = divergence(p_logits.log_softmax(-1), q_logits.log_softmax(-1))
    rounded = divergence(p_logits.log_softmax(-1).float(), q_logits.log_softmax(-1).float())
    for high, low in zip(exact, rounded, strict=True):
        assert low.isfinite().all()
        # float32 log-probs of size 300 are off by 3e-5, and so are their differences and exponentials.
        torch.testing.assert_close(low.double(), high, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("divergence", "formula"), CASES, ids=IDS)
@pytest.mark.parametrize("seed", range(4))
def test_zero_at_equality_and_positive_elsewhere(divergence: Divergence, formula: Formula, seed: int) -> None:
    p_logits, q_logits = draw(8, 50, seed=seed)
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    value, derivative = divergence(log_p, log_p)
    gradient = derivative - log_p.exp() * derivative.sum(-1, keepdim=True)
    assert value.sum(-1).abs().max() < 1e-14
    assert gradient.abs().max() < 1e-14
    # Clipped terms are the positive ones, so that their sum may be anything.
    assert isinstance(divergence, ClippedForwardKL) or (divergence(log_p, log_q)[0].sum(-1) > 1e-3).all()


@pytest.mark.parametrize("divergence", [d for d, _ in CASES if d.is_f_divergence], ids=repr)
@pytest.mark.parametrize("seed", range(8))
def test_merging_tokens_never_raises_an_f_divergence(divergence: Divergence, seed: int) -> None:
    p_logits, q_logits = draw(64, 30, spread=3.0, seed=seed)
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    merge = torch.zeros(30, 7, dtype=torch.float64)
    merge[torch.arange(30), torch.randint(7, (30,), generator=torch.Generator().manual_seed(seed))] = 1
    whole = divergence(p.log(), q.log())[0].sum(-1)
    merged = divergence((p @ merge).log(), (q @ merge).log())[0].sum(-1)
    assert (merged <= whole + 1e-12).all()


def test_merging_tokens_can_raise_adaptive_kl() -> None:
    """Why it is not called an f-divergence."""
    p_logits, q_logits = draw(256, 12, spread=2.0)
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    merged_p, merged_q = (torch.cat([t[:, :6], t[:, 6:].sum(-1, keepdim=True)], -1) for t in (p, q))
    whole = AdaptiveKL()(p.log(), q.log())[0].sum(-1)
    merged = AdaptiveKL()(merged_p.log(), merged_q.log())[0].sum(-1)
    assert (merged > whole + 1e-6).any()


def test_entropy_aware_kl_takes_the_teachers_entropy_by_row() -> None:
    p_logits, q_logits = draw(5, 40)
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    unsure = -(log_p.exp() * log_p).sum(-1) >= BETWEEN
    assert unsure.any() and not unsure.all()
    added = EntropyAwareKL(BETWEEN)(log_p, log_q)[0] - ReverseKL()(log_p, log_q)[0]
    forward = ForwardKL()(log_p, log_q)[0]
    torch.testing.assert_close(added[unsure], forward[unsure], rtol=1e-12, atol=1e-14)
    assert not added[~unsure].any()


@pytest.mark.parametrize("divergence", [EntropyAwareKL(threshold=1.5), ClippedForwardKL()], ids=repr)
def test_merging_tokens_can_raise_what_couples_or_clips_them(divergence: Divergence) -> None:
    """Merging lowers the teacher's entropy, and each KL; it may take what a clip held back out of its token."""
    p_logits, q_logits = draw(256, 12, spread=1.0)
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    merged_p, merged_q = (torch.cat([t[:, :6], t[:, 6:].sum(-1, keepdim=True)], -1) for t in (p, q))
    whole = divergence(p.log(), q.log())[0].sum(-1)
    merged = divergence(merged_p.log(), merged_q.log())[0].sum(-1)
    assert not divergence.is_f_divergence
    assert (merged > whole + 1e-6).any() == isinstance(divergence, ClippedForwardKL)


def test_a_clip_that_nothing_reaches_is_forward_kl() -> None:
    p_logits, q_logits = draw(5, 20)
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    for one, other in zip(ClippedForwardKL(100.0)(log_p, log_q), ForwardKL()(log_p, log_q), strict=True):
        assert torch.equal(one, other)
    value, derivative = ClippedForwardKL(0.01)(log_p, log_q)
    reached = value == 0.01
    assert reached.any() and not derivative[reached].any()


def test_adaptive_head_longer_than_the_short_list() -> None:
    """A flat teacher, whose head needs more than the likeliest few hundred tokens."""
    p_logits, q_logits = draw(3, 900, spread=0.1)
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    torch.testing.assert_close(AdaptiveKL()(p.log(), q.log())[0].sum(-1), adaptive(p, q), rtol=1e-10, atol=1e-14)


def test_jsd_scaled_tends_to_the_two_kl() -> None:
    p_logits, q_logits = draw(5, 20)
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    small = 1e-5
    forward = GeneralisedJSD(small)(log_p, log_q)[0].sum(-1) / small
    reverse = GeneralisedJSD(1 - small)(log_p, log_q)[0].sum(-1) / small
    # The next term of the expansion in beta is of the order of the chi-squared distance, here up to 1e2.
    torch.testing.assert_close(forward, ForwardKL()(log_p, log_q)[0].sum(-1), rtol=1e-2, atol=0)
    torch.testing.assert_close(reverse, ReverseKL()(log_p, log_q)[0].sum(-1), rtol=1e-2, atol=0)


def test_total_variation_is_at_most_one() -> None:
    p_logits, q_logits = draw(20, 10, spread=50.0)
    value = TotalVariation()(p_logits.log_softmax(-1), q_logits.log_softmax(-1))[0].sum(-1)
    assert value.max() <= 1 + 1e-12
    assert value.max() > 0.99


def test_made_by_name() -> None:
    assert make_divergence("forward_kl") == ForwardKL()
    assert make_divergence("jsd", beta=0.3, alpha=0.9) == GeneralisedJSD(0.3)
    assert make_divergence("skew_reverse_kl", beta=0.3, alpha=0.9) == SkewReverseKL(0.9)
    assert make_divergence("entropy_aware_kl", alpha=0.9, threshold=0.3) == EntropyAwareKL(threshold=0.3)


def test_settings_of_loss_reach_their_divergence() -> None:
    """Fields of the section, and loss.options for what is in none."""
    assert divergence_of(LossConfig(divergence="jsd", beta=0.3)) == GeneralisedJSD(0.3)
    assert divergence_of(LossConfig(divergence="kl_mixture", options={"forward_weight": 0.9})) == KLMixture(0.9)
    assert parameters_of(EntropyAwareKL) == {"threshold", "forward_weight"}


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown divergence 'revers_kl': did you mean reverse_kl\? known are "):
        make_divergence("revers_kl")


@pytest.mark.parametrize(
    ("name", "parameter", "bad"),
    [
        ("jsd", "beta", -0.1),
        ("jsd", "beta", 1.1),
        ("skew_forward_kl", "alpha", 1.0),
        ("skew_reverse_kl", "alpha", -0.1),
        ("alpha_divergence", "alpha", 2.0),
        ("kl_mixture", "forward_weight", 1.5),
        ("kl_mixture", "forward_weight", -0.5),
        ("entropy_aware_kl", "threshold", -0.1),
        ("entropy_aware_kl", "forward_weight", -1.0),
        ("clipped_forward_kl", "clip", 0.0),
    ],
)
def test_parameter_out_of_range(name: str, parameter: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} needs (0 <= )?{parameter} (>|<).*, got {bad}"):
        make_divergence(name, **{parameter: bad})
