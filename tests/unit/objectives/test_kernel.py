"""The fused loss against plain autograd over whole logits, in float64 unless a test is about a dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_problem import (
    FORMULAS,
    ROWS,
    STUDENT_PAD,
    VOCAB,
    Problem,
    assert_same,
    build,
    coarsen,
    entropy,
    kl,
    sampled,
)
from torch import Tensor

from s2w.objectives.divergences import DIVERGENCES, ForwardKL, ReverseKL
from s2w.objectives.kernel import (
    Head,
    HiddenRows,
    SampledRows,
    SparseRows,
    divergence_loss,
    divergence_values,
)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ({"bias": False}, 1.0),
        ({}, 2.5),
        ({"softcap": 3.0, "scale": 0.5}, 0.7),
    ],
    ids=["plain", "temperature", "softcap-scale-temperature"],
)
def test_hidden_rows_match_autograd(name: str, options: dict[str, Any], temperature: float) -> None:
    problem = Problem(**options)
    log_p, log_q = problem.log_probs(temperature)
    values = FORMULAS[name](log_p, log_q)
    expected = (problem.weights * values).sum() * temperature**2
    output = problem.loss(problem.teacher, build(name), temperature=temperature)
    assert_same([output.loss, output.values], [expected, values])
    assert_same(problem.gradients(output.loss), problem.gradients(expected))
    assert_same(
        [output.student_entropy, output.teacher_entropy, output.agreement],
        [entropy(log_q), entropy(log_p), (log_p.argmax(-1) == log_q.argmax(-1)).double()],
    )


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("by", ["teacher", "student"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_sparse_rows_match_autograd(name: str, by: str, softcap: float | None) -> None:
    problem = Problem(softcap=softcap)
    teacher = problem.sparse(6, by, temperature=1.3)
    log_p, log_q = problem.log_probs(1.3)
    coarse_p, coarse_q = coarsen(log_p, teacher.ids), coarsen(log_q, teacher.ids)
    values = FORMULAS[name](coarse_p, coarse_q)
    expected = (problem.weights * values).sum()
    output = problem.loss(teacher, build(name), temperature=1.3, temperature_squared=False)
    assert_same([output.loss, output.values], [expected, values])
    assert_same(problem.gradients(output.loss), problem.gradients(expected))
    assert_same([output.student_entropy, output.teacher_entropy], [entropy(log_q), entropy(coarse_p)])
    if by == "teacher":
        assert torch.equal(output.agreement, (log_p.argmax(-1) == log_q.argmax(-1)).double())


@pytest.mark.parametrize("signal", ["hidden", "sparse"])
@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"adaptive_kl"}))  # its gradient holds a weight constant
def test_gradcheck(name: str, signal: str) -> None:
    problem = Problem(rows=3, vocab=6)
    teacher: Any = problem.teacher if signal == "hidden" else problem.sparse(3)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias, 4.0, 0.8)
        options: dict[str, Any] = {"vocab_size": 6, "weights": problem.weights, "chunk_rows": 2}
        return divergence_loss(hidden, head, teacher, build(name), **options).loss

    assert torch.autograd.gradcheck(loss, tuple(problem.inputs))


@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"adaptive_kl"}))
@pytest.mark.parametrize("by", ["teacher", "student"])
def test_sparse_value_is_a_lower_bound_and_exact_at_the_whole_vocabulary(name: str, by: str) -> None:
    """A lower bound for f-divergences alone."""
    for seed in range(10):
        problem = Problem(rows=20, seed=seed)
        exact = problem.loss(problem.teacher, build(name))
        for k in (1, 5, 20, VOCAB - 1) if build(name).is_f_divergence else ():
            assert (problem.loss(problem.sparse(k, by), build(name)).values <= exact.values + 1e-12).all()
        whole = problem.loss(problem.sparse(VOCAB, by), build(name))
        assert_same([whole.loss, whole.values], [exact.loss, exact.values])
        assert_same([whole.student_entropy, whole.teacher_entropy], [exact.student_entropy, exact.teacher_entropy])
        assert_same(problem.gradients(whole.loss), problem.gradients(exact.loss))


def test_sparse_tail_in_float32_where_one_minus_the_sum_is_lost() -> None:
    """A student that leaves 1e-12 outside the ids: 1 - sum(q) is 0 in float32, the log of the rest is not."""
    vocab, k = 50, 4
    logits = torch.full((1, vocab), -31.0)
    logits[:, :k] = torch.tensor([0.0, -0.5, -1.0, -1.5])
    head = Head(torch.eye(vocab))
    ids = torch.arange(k)[None]
    log_p = torch.tensor([[0.4, 0.3, 0.2, 0.05]]).log()
    log_tail = torch.tensor([0.05]).log()
    output = divergence_loss(logits, head, SparseRows(ids, log_p, log_tail), ForwardKL(), vocab_size=vocab)
    log_q = coarsen(logits.double().log_softmax(-1), ids)
    p = torch.cat([log_p, log_tail[:, None]], -1).double()
    assert log_q[0, -1] < -26
    # float32 log-probs of size 30 are good to 2e-6.
    torch.testing.assert_close(output.values.double(), kl(p, log_q), rtol=0, atol=1e-5)


def test_sampled_gradient_has_the_mean_of_reverse_kl() -> None:
    """One hidden row, every token once, weighted with its probability: the expectation as a sum."""
    problem = Problem(softcap=4.0)
    one = problem.hidden[:1].detach().requires_grad_()
    problem.teacher = replace(problem.teacher, hidden=problem.teacher.hidden[:1])
    problem.hidden = one
    log_p, log_q = problem.log_probs()
    exact = kl(log_q, log_p).sum()
    expected = problem.gradients(exact)

    problem.weights = log_q[0].exp().detach()
    problem.hidden = one.expand(VOCAB, -1)
    output = problem.loss(SampledRows(torch.arange(VOCAB), log_p[0]), ReverseKL())
    problem.hidden = one
    assert_same([output.loss], [exact.detach()])
    assert_same(problem.gradients(output.loss), expected)
    assert output.teacher_entropy.isnan().all() and output.agreement.isnan().all()
    assert_same([output.student_entropy], [entropy(log_q).expand(VOCAB)])


def test_importance_weights_undo_an_older_policy() -> None:
    """As above, the tokens weighted with the probability under the policy that sampled them."""
    problem = Problem()
    one = problem.hidden[:1].detach().requires_grad_()
    problem.teacher = replace(problem.teacher, hidden=problem.teacher.hidden[:1])
    problem.hidden = one
    log_p, log_q = problem.log_probs()
    exact = kl(log_q, log_p).sum()
    expected = problem.gradients(exact)

    older = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5), dtype=torch.float64).log_softmax(-1)
    problem.weights = older.exp()
    problem.hidden = one.expand(VOCAB, -1)
    output = problem.loss(SampledRows(torch.arange(VOCAB), log_p[0], older), ReverseKL())
    problem.hidden = one
    assert_same([output.loss], [exact.detach()])
    assert_same(problem.gradients(output.loss), expected)


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("importance_limit", [None, 1.1])
def test_sampled_rows_match_the_surrogate(discount: float, importance_limit: float | None) -> None:
    problem = Problem(rows=13)
    sequences = torch.tensor([0] * 3 + [1] * 7 + [2] * 3)
    older = 0.3 * torch.randn(13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, _, log_q = sampled(problem)
    teacher, log_p, _ = sampled(
        problem,
        sampling_log_probs=log_q.detach() + older,
        importance_limit=importance_limit,
        discount=discount,
        sequence_ids=sequences,
    )
    rho = (-older).exp()
    if importance_limit is not None:
        rho = rho.clamp_max(importance_limit)
    rewards = (log_p - log_q).detach()
    returns = [
        sum(discount ** (j - i) * float(rewards[j]) for j in range(i, 13) if sequences[j] == sequences[i])
        for i in range(13)
    ]
    surrogate = -(problem.weights * rho * torch.tensor(returns, dtype=torch.float64) * log_q).sum()
    output = problem.loss(teacher, ReverseKL())
    assert_same([output.values], [-rho * rewards])
    assert_same(problem.gradients(output.loss), problem.gradients(surrogate))


@pytest.mark.parametrize("signal", ["hidden", "sparse", "sampled"])
def test_chunks_change_nothing(signal: str) -> None:
    problem = Problem()
    if signal == "sampled":
        teacher: Any = sampled(problem, discount=0.8, sequence_ids=torch.arange(ROWS) // 6)[0]
    else:
        teacher = problem.teacher if signal == "hidden" else problem.sparse(5)
    results = []
    for chunk_rows in (1, 3, 4, 10, 11, 1024):
        output = problem.loss(teacher, ReverseKL(), chunk_rows=chunk_rows)
        results.append([output.loss, output.values, output.student_entropy, *problem.gradients(output.loss)])
    for result in results[1:]:
        assert_same(result, results[0], rtol=1e-12)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(rows=40)
    whole = problem.loss(problem.teacher, ForwardKL(), chunk_rows=40)
    monkeypatch.setattr("s2w.objectives.kernel._CACHE_ELEMENTS", VOCAB)
    tiled = problem.loss(problem.teacher, ForwardKL(), chunk_rows=40)
    assert_same([tiled.loss, *problem.gradients(tiled.loss)], [whole.loss, *problem.gradients(whole.loss)], rtol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_float32_statistics(name: str) -> None:
    """float32 against float64 of the same (rounded) inputs, at a vocabulary where sums are long."""
    low = Problem(rows=32, vocab=5000, dtype=torch.float32)
    high = Problem(rows=32, vocab=5000)
    for high_tensor, low_tensor in zip(high.inputs, low.inputs, strict=True):
        high_tensor.data.copy_(low_tensor.detach())
    high.teacher = HiddenRows(
        low.teacher.hidden[:].double(),
        Head(low.teacher.head.weight.double(), low.teacher.head.bias.double()),  # type: ignore[union-attr]
    )
    high.weights = low.weights.double()
    got, expected = low.loss(low.teacher, build(name)), high.loss(high.teacher, build(name))
    assert got.loss.dtype == got.values.dtype == torch.float32
    # Log-probs are around -10 and good to 1e-6; alpha_divergence divides that by alpha (1 - alpha) = 0.16.
    torch.testing.assert_close(got.values.double(), expected.values, rtol=2e-6, atol=1e-5)
    for gradient, reference in zip(low.gradients(got.loss), high.gradients(expected.loss), strict=True):
        assert (gradient - reference).norm() < 1e-5 * reference.norm()


def test_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 against float64 of the same inputs."""
    monkeypatch.setattr("s2w.objectives.kernel._HEAD_BLOCK", 128)
    low = Problem(rows=64, vocab=300, dtype=torch.bfloat16, bias=False)
    high = Problem(rows=64, vocab=300, bias=False)
    for high_tensor, low_tensor in zip(high.inputs, low.inputs, strict=True):
        high_tensor.data.copy_(low_tensor.detach())
    high.teacher = HiddenRows(low.teacher.hidden[:].double(), Head(low.teacher.head.weight.double()))
    high.weights = low.weights.double()
    got, expected = low.loss(low.teacher, ForwardKL()), high.loss(high.teacher, ForwardKL())
    assert got.loss.dtype == got.values.dtype == torch.float32
    # A logit of size 8 rounds to 2^-6 at most, 0.016; the KL averages over tokens.
    torch.testing.assert_close(got.values.double(), expected.values, rtol=0.01, atol=0.02)
    for gradient, reference in zip(low.gradients(got.loss), high.gradients(expected.loss), strict=True):
        assert gradient.dtype == torch.bfloat16
        # Probabilities carry the logits' error, about 1 % a token.
        assert (gradient - reference).norm() < 0.02 * reference.norm()


def test_low_precision_head_gradient_is_summed_in_float32() -> None:
    """1,024 chunks whose equal gradients a bfloat16 sum would stop counting at 256."""
    rows = 1024
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    teacher = SampledRows(torch.zeros(rows, dtype=torch.int64), torch.zeros(rows))
    output = divergence_loss(hidden, Head(weight), teacher, ReverseKL(), vocab_size=2, chunk_rows=1)
    (gradient,) = torch.autograd.grad(output.loss, weight)
    log_q = torch.tensor([1.0, 0.0], dtype=torch.float64).log_softmax(-1)
    expected = rows * -log_q[0] * (log_q.exp() - torch.tensor([1.0, 0.0]))
    # Each of the four roundings to bfloat16 is off by 2^-9 at most.
    torch.testing.assert_close(gradient[:, 0].double(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_hidden_row_that_is_not_finite_has_no_divergence(
    name: str, side: str, value: float, softcap: float | None
) -> None:
    problem = Problem(softcap=softcap)
    with torch.no_grad():
        (problem.teacher.hidden[:] if side == "teacher" else problem.hidden)[2, 1] = value
    output = problem.loss(problem.teacher, build(name))
    assert (~output.values.isfinite()).nonzero().tolist() == [[2]] and not output.loss.isfinite()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_student_that_is_the_teacher(name: str, dtype: torch.dtype) -> None:
    problem = Problem(rows=32, vocab=2000, dtype=dtype)
    twin = HiddenRows(problem.hidden.detach(), Head(problem.weight.detach(), problem.bias.detach()))  # type: ignore[union-attr]
    output = problem.loss(twin, build(name))
    assert output.values.abs().max() < 1e-6
    assert output.agreement.min() == 1


def test_bias_may_mask_tokens() -> None:
    problem = Problem()
    assert problem.bias is not None and problem.teacher.head.bias is not None
    with torch.no_grad():
        problem.bias[3:6] = -torch.inf
        problem.teacher.head.bias[3:6] = -torch.inf
    output = problem.loss(problem.teacher, ReverseKL())
    keep = [token for token in range(VOCAB) if token not in (3, 4, 5)]
    log_p, log_q = (t[:, keep].detach() for t in problem.log_probs())
    assert_same([output.values], [kl(log_q, log_p)])
    assert all(gradient.isfinite().all() for gradient in problem.gradients(output.loss))


def test_gradients_only_where_they_are_needed() -> None:
    problem = Problem()
    expected = problem.gradients(problem.loss(problem.teacher, ForwardKL()).loss)
    for kept in range(3):
        for index, tensor in enumerate(problem.inputs):
            tensor.requires_grad_(index == kept)
        (gradient,) = torch.autograd.grad(problem.loss(problem.teacher, ForwardKL()).loss, [problem.inputs[kept]])
        assert_same([gradient], [expected[kept]])
    with torch.no_grad():
        assert not problem.loss(problem.teacher, ForwardKL()).loss.requires_grad


def test_backward_twice_and_scaled() -> None:
    problem = Problem()
    expected = problem.gradients(problem.loss(problem.teacher, ForwardKL()).loss)
    loss = problem.loss(problem.teacher, ForwardKL()).loss
    loss.backward(retain_graph=True)
    (loss * 3).backward(retain_graph=True)
    loss.backward()
    assert_same([tensor.grad for tensor in problem.inputs], [5 * gradient for gradient in expected])  # type: ignore[misc]


def test_tied_embeddings_get_both_gradients() -> None:
    """The weight is the input embedding too: its two gradients add up."""
    problem = Problem(bias=False)
    tokens = torch.randint(VOCAB, (ROWS,), generator=torch.Generator().manual_seed(2))

    def gradient(fused: bool) -> Tensor:
        problem.hidden = problem.weight[tokens].tanh()
        if fused:
            loss = problem.loss(problem.teacher, ForwardKL()).loss
        else:
            loss = (problem.weights * kl(*problem.log_probs())).sum()
        return torch.autograd.grad(loss, problem.weight)[0]

    assert_same([gradient(fused=True)], [gradient(fused=False)])


def test_several_values_at_once() -> None:
    problem = Problem(softcap=3.0)
    named = [(name, build(name)) for name in FORMULAS]
    for teacher in (problem.teacher, problem.sparse(5)):
        options: dict[str, Any] = {"vocab_size": VOCAB, "temperature": 1.0}
        values = divergence_values(problem.hidden, problem.head, teacher, named, chunk_rows=4, **options)
        assert list(values) == list(FORMULAS)
        for name, divergence in named:
            assert not values[name].requires_grad
            assert_same([values[name]], [problem.loss(teacher, divergence).values])


def test_head_logits() -> None:
    problem = Problem(softcap=3.0, scale=0.5)
    logits = problem.head.logits(problem.hidden)
    assert logits.shape == (ROWS, STUDENT_PAD)
    log_q = problem.log_probs()[1]
    assert_same([logits[:, :VOCAB].log_softmax(-1)], [log_q])
    assert not logits.requires_grad


def test_head_logits_of_low_precision_are_float32() -> None:
    """Rounded to bfloat16, logits of 30 would be off by up to 0.06."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=draw).bfloat16() for n in (20, 40_000))
    logits = Head(weight).logits(hidden)
    assert logits.dtype == torch.float32
    expected = hidden.double() @ weight.double().T
    assert expected.abs().max() > 30
    # float32: sums of 64 exact products.
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)


def test_row_weights_are_not_rounded_to_the_rows_dtype() -> None:
    problem = Problem(rows=400, dtype=torch.bfloat16)
    gradients = []
    for weight in (1.0, 0.7011):  # the second is 0.6992 in bfloat16
        options: dict[str, Any] = {"vocab_size": VOCAB, "temperature": 1.0}
        output = divergence_loss(
            problem.hidden,
            problem.head,
            problem.teacher,
            ForwardKL(),
            weights=torch.full((400,), weight),
            **options,
        )
        gradients.append(torch.autograd.grad(output.loss, problem.hidden)[0].double())
    # Each element is rounded to bfloat16, up or down: the least squares' slope is not.
    slope = (gradients[0] * gradients[1]).sum() / gradients[0].square().sum()
    assert slope.item() == pytest.approx(0.7011, abs=3e-4)


def test_no_rows() -> None:
    problem = Problem(rows=0)
    output = problem.loss(problem.teacher, ForwardKL())
    assert output.loss == 0 and output.values.shape == (0,)
    assert all(not gradient.any() for gradient in problem.gradients(output.loss))


def test_refusals() -> None:
    problem = Problem()
    tokens, _, _ = sampled(problem)
    with pytest.raises(ValueError, match="signal 'sampled' does not support forward_kl: "):
        problem.loss(tokens, ForwardKL())
    with pytest.raises(ValueError, match="sampled tokens hold no distribution"):
        divergence_values(problem.hidden, problem.head, tokens, [("kl", ReverseKL())], vocab_size=VOCAB)
    with pytest.raises(ValueError, match="needs sequence_ids"):
        replace(tokens, discount=0.5)
    with pytest.raises(ValueError, match="the student's head has 40 rows for a vocabulary of 41"):
        problem.loss(problem.teacher, ForwardKL(), vocab_size=41)
    with pytest.raises(ValueError, match="11 teacher rows for 10 student rows"):
        divergence_loss(problem.hidden[:10], problem.head, problem.teacher, ForwardKL(), vocab_size=VOCAB)
    with pytest.raises(TypeError, match=r"the student's head is torch.float64, .* torch.float32"):
        divergence_loss(problem.hidden.float(), problem.head, problem.teacher, ForwardKL(), vocab_size=VOCAB)
    with pytest.raises(TypeError, match=r"not torch.float16"):
        divergence_loss(problem.hidden.half(), problem.head, problem.teacher, ForwardKL(), vocab_size=VOCAB)
