"""Bad settings of the off-policy phase."""

from __future__ import annotations

from pathlib import Path

import pytest
from teacher_responses import settings
from tiny_models import make_checkpoint

from s2w.errors import ConfigError
from s2w.launch.check import check


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("models") / "tied", "tied", 0))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["off_policy.path=/no/such.jsonl"], r"off_policy\.path=/no/such\.jsonl: there is no such file or directory"),
        (["off_policy.responses_per_step=0"], r"off_policy\.responses_per_step=0: must be >= 1"),
        (["off_policy.filters.cjk_share=-1"], r"off_policy\.filters\.cjk_share=-1\.0: must be between 0 and 1"),
        (["off_policy.learning_rate=0"], r"off_policy\.learning_rate=0\.0: must be > 0"),
        (["off_policy.loss=divergence", "signal.kind=ids"], "only hidden and topk are supported"),
        (["loop.off_policy_fraction=0.25", "signal.kind=ids"], r"off_policy_fraction=0\.25 with signal\.kind=ids"),
        (["loop.off_policy_fraction=1"], r"loop\.off_policy_fraction=1\.0: must be >= 0 and < 1"),
        (["loop.off_policy_fraction=0.001"], r"of loop\.prompts_per_step=64 rounds to 0 prompts"),
        (["off_policy.max_tokens=4000"], r"off_policy\.max_tokens = 5024 is more than the teacher's context of 4096"),
        (
            ["off_policy.loss=kl"],
            r"off_policy\.loss=kl: there is no such objective: did you mean kdrl\? known are cross_entropy, divergence",
        ),
    ],
)
def test_bad_settings(checkpoint: str, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(settings(checkpoint, tmp_path, *overrides))
