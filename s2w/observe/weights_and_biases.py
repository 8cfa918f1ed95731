"""Weights & Biases: the package is an extra, and an account or offline use is needed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from s2w.errors import ConfigError

WAYS = (
    "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline and send the run later with `wandb sync`, "
    "or write run.wandb=false"
)
"""How W&B can be used, as the end of a sentence."""


def check_weights_and_biases() -> None:
    """Checks that a run can be logged, without a connection.

    Raises:
        ConfigError: the package is missing, or there is no account and the run would not be offline.
    """
    if find_spec("wandb") is None:
        raise ConfigError("run.wandb=true needs the package wandb: pip install 's2w[wandb]', or write run.wandb=false")
    import wandb

    try:
        online = wandb.setup().settings.mode not in ("offline", "dryrun", "disabled")
        logged_in = not online or wandb.login(prompt=False)
    except (ValueError, wandb.Error) as error:  # ValueError: of a variable of the environment.
        raise _unusable(error) from error
    if not logged_in:
        raise ConfigError(f"run.wandb=true, but W&B has no API key here: {WAYS}")


def start_weights_and_biases(project: str, name: str, directory: Path, config: dict[str, Any]) -> Any:
    """A W&B run, started or continued, with files below ``directory``.

    Raises:
        ConfigError: it cannot be started.
    """
    import wandb

    try:
        run = wandb.init(project=project, name=name, dir=str(directory), config=config, resume="allow")
    except wandb.Error as error:
        raise _unusable(error) from error
    # Each phase counts its own steps; W&B's own counter may only rise.
    run.define_metric("*", step_metric="step")
    run.define_metric("off_policy/*", step_metric="off_policy/step")
    return run


def _unusable(error: Exception) -> ConfigError:
    reason = " ".join(str(error).split()).partition(" For further information")[0].rstrip(".")
    return ConfigError(f"run.wandb=true, but W&B does not start ({reason}): {WAYS}")
