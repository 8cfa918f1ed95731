"""Settings: every one is documented, and they compose from overrides and files."""

from __future__ import annotations

import re
from dataclasses import replace
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
    assert re.search(r"^  experiment=.*\bsmollm2\b", text, re.MULTILINE)
    assert "  loop.steps  (default: 100; >= 0; may change at resume)" in text
    assert "  learner.learning_rate  (default: 1e-05; > 0)" in text


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


def test_a_section_may_be_given_as_a_whole(overrides: list[str]) -> None:
    """Also one that holds a free mapping, beside settings of its own."""
    config = compose([*overrides, "loss={objective: prefix, options: {gamma: 1}}", "student={overrides: {a: {b: 2}}}"])
    assert (config.loss.objective, config.loss.options, config.loss.temperature) == ("prefix", {"gamma": 1}, 1.0)
    assert config.student.overrides == {"a": {"b": 2}} and config.student.model
    with pytest.raises(ConfigError, match=r"^unknown setting loss\.objectiv: did you mean loss\.objective\?$"):
        compose([*overrides, "loss={objectiv: prefix}"])
    with pytest.raises(ConfigError, match=r"^loss\.temperature: Value 'hot'"):
        compose([*overrides, "loss={temperature: hot, options: {gamma: 1}}"])


def test_a_resumed_run_has_its_settings(overrides: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    resume = [f"run.dir={directory}", "run.resume=true"]
    with pytest.raises(ConfigError, match=rf"{directory} contains no run: there is no {directory}/config\.yaml"):
        compose(resume)
    added = "+student.overrides.num_hidden_layers=4"
    config = compose([*overrides, "student.init=fresh", added, "loss.beta=0.25"])
    directory.mkdir()
    (directory / "config.yaml").write_text(to_yaml(config))
    again = replace(config, run=replace(config.run, resume=True))
    assert compose(resume) == again
    assert compose([*resume, "loop.steps=7"]) == replace(again, loop=replace(config.loop, steps=7))
    # The whole command again gives the same.
    assert compose([*overrides, added, *resume]) == again
    assert compose([*resume, "experiment=smollm2"]).loop.steps == 20
    assert compose(overrides).loss.beta == 0.5


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: {", "is not the configuration of a run: while parsing"),
        ("- a", "is not the configuration of a run: Cannot merge"),
        ("loops: {steps: 1}", "is not the configuration of a run: unknown setting loops"),
        ("loop: {steps: many}", "is not the configuration of a run: loop.steps: Value 'many'"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        compose([f"run.dir={tmp_path}", "run.resume=true"])


def test_an_experiment_of_ones_own(overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\nloop:\n  steps: 7\n")
    for option in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"]):
        assert cli.main(["train", *overrides, "experiment=mine", *option, "--cfg"]) == 0
        assert "steps: 7" in capsys.readouterr().out
    for option in (["--config-dir"], ["--config-dir="]):
        assert cli.main(["train", *overrides, "experiment=mine", *option]) == 2
        assert capsys.readouterr().err == "s2w: --config-dir needs the name of a directory\n"
    assert cli.main(["train", *overrides, "experiment=mine"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("s2w: there is no experiment=mine: the choices are ") and "smollm2, testbed" in said
    assert said.endswith("; for a file of your own, DIR/experiment/mine.yaml, add --config-dir DIR\n")
    file.write_text("loop:\n  steps: 7\n")
    assert cli.main(["train", *overrides, "experiment=mine", "--config-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "s2w: the file of the experiment must begin with the line `# @package _global_`\n"
    )


def test_missing_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.model is not set"):
        compose(["student.model=x"])


def test_help_and_cfg(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "s2w train" in capsys.readouterr().out
    assert cli.main(["train", *overrides, "loop.steps=7", "--cfg"]) == 0
    assert "steps: 7" in capsys.readouterr().out


def test_quiet_and_verbose(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for options, shown in (([], "false"), (["-q"], "false"), (["-v"], "true"), (["--verbose"], "true")):
        assert cli.main(["train", *options, *overrides, "--cfg"]) == 0
        assert f"log_to_driver: {shown}" in capsys.readouterr().out
    assert cli.main(["train", "-q", *overrides, "--verbose"]) == 2
    assert capsys.readouterr().err == "s2w: -q and -v ask for less and for more output: write one of them\n"
