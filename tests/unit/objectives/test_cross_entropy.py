"""Cross-entropy by the kernel is torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from teacher_responses import settings
from tiny_models import make_checkpoint
from torch.nn.functional import cross_entropy

from s2w.launch.check import off_policy
from s2w.launch.phases import off_policy_settings
from s2w.models.head import Head
from s2w.objectives.divergences import divergence_of
from s2w.objectives.kernel import SparseRows, divergence_loss


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("models") / "tied", "tied", 0))


def test_forward_kl_to_a_certain_teacher_is_torchs_cross_entropy(checkpoint: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, width, vocab = 37, 16, 90
    ids = torch.randint(vocab, (rows,), generator=generator)
    config = settings(checkpoint, tmp_path, "loss.divergence=jsd", "loss.temperature=2")
    loss = off_policy(config).loss_settings(off_policy_settings(config).loss)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64, requires_grad=True)
    # Two rows of padding, which the softmax must leave out.
    head = torch.randn(vocab + 2, width, generator=generator, dtype=torch.float64, requires_grad=True)
    output = divergence_loss(
        hidden,
        Head(head),
        SparseRows.certain(ids),
        divergence_of(loss),
        vocab_size=vocab,
        temperature=loss.temperature,
    )
    expected = cross_entropy((hidden @ head.T)[:, :vocab], ids, reduction="none")
    # float64 both: rounding alone.
    torch.testing.assert_close(output.values, expected.detach(), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(output.loss, [hidden, head])
    for ours, torchs in zip(gradients, torch.autograd.grad(expected.sum(), [hidden, head]), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-10)
