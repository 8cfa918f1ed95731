"""Settings: every one is documented, and they compose from overrides and files."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import MISSING
from tiny_models import make_checkpoint

from s2w import cli
from s2w.config.compose import compose, help_text, settings, to_yaml
from s2w.config.schema import Config
from s2w.errors import ConfigError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("models") / "tied", "tied", 0))


@pytest.fixture
def overrides(checkpoint: str, tmp_path: Path) -> list[str]:
    """The least that a run needs."""
    return [
        f"teacher.model={checkpoint}", f"student.model={checkpoint}", "data.tasks=[chain_sum]",
        f"run.dir={tmp_path / 'run'}", "cluster.device=cpu",
    ]  # fmt: skip


def test_every_setting_is_documented() -> None:
    undocumented = [name for name, _, text in settings() if not text]
    assert not undocumented
    text = help_text()
    assert all(f"  {name}  " in text for name, _, _ in settings())
    assert "  experiment=smollm2" in text


def test_settings_lists_defaults() -> None:
    defaults = {name: default for name, default, _ in settings()}
    assert defaults["teacher.model"] is MISSING
    assert defaults["loop.max_staleness"] == Config().loop.max_staleness
    assert defaults["signal.kind"] == "hidden"


def test_overrides_reach_the_dataclasses(overrides: list[str]) -> None:
    config = compose([*overrides, "signal.kind=topk", "student.init=pruned", "rollout.engines=3"])
    assert config.signal.kind == "topk"
    assert config.student.init == "pruned"
    assert config.rollout.engines == 3


def test_yaml_of_a_configuration_composes_to_itself(overrides: list[str], tmp_path: Path) -> None:
    config = compose([*overrides, "loss.temperature=2.0"])
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "again.yaml").write_text("# @package _global_\n" + to_yaml(config))
    assert compose(["experiment=again"], [tmp_path]) == config


def test_missing_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.model is not set"):
        compose(["student.model=x"])


def test_help_and_cfg(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "s2w train" in capsys.readouterr().out
    assert cli.main(["train", *overrides, "loop.steps=7", "--cfg"]) == 0
    assert "steps: 7" in capsys.readouterr().out
