"""The kernel's elementwise steps compiled, as they are on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_problem import Problem, assert_same, build, sampled

from s2w.objectives.kernel import (
    _compiled,
)


@pytest.mark.long
@pytest.mark.parametrize(
    ("signal", "name"),
    [("hidden", "jsd"), ("hidden", "adaptive_kl"), ("sparse", "forward_kl"), ("sampled", "reverse_kl")],
)
def test_compiled_as_on_cuda(signal: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The elementwise steps go through torch.compile unharmed."""
    problem = Problem(softcap=3.0, dtype=torch.float32)
    teacher: Any = {"hidden": problem.teacher, "sparse": problem.sparse(5), "sampled": sampled(problem)[0]}[signal]
    plain = problem.loss(teacher, build(name))
    monkeypatch.setattr("s2w.objectives.kernel._step", lambda step, hidden: _compiled(step))
    fused = problem.loss(teacher, build(name))
    # Other kernels round otherwise.
    assert_same([fused.loss, fused.values], [plain.loss, plain.values], rtol=1e-4, atol=1e-5)
    assert_same(problem.gradients(fused.loss), problem.gradients(plain.loss), rtol=1e-4, atol=1e-5)
