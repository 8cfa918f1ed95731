"""W&B is an extra: without the package, an account or offline use, a run is refused before it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from s2w.errors import ConfigError
from s2w.observe.weights_and_biases import check_weights_and_biases

INSTALLED = find_spec("wandb") is not None
CHECK = "from s2w.observe.weights_and_biases import check_weights_and_biases as check; check()"
RECORD = """
import sys
from pathlib import Path
from s2w.observe.recorder import Recorder

recorder = Recorder(
    Path(sys.argv[1]), step=0, off_policy_step=0, config={}, tensorboard=False, wandb="project", name="name"
)
recorder.step({"phase": "on_policy", "step": 1, "seconds": 2.0})
recorder.close()
"""


def python(program: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs ``program`` as somebody without an account."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(home), **variables}
    return subprocess.run(
        [sys.executable, "-c", program, str(home / "run")], cwd=home, env=environment, capture_output=True, text=True
    )


@pytest.mark.skipif(INSTALLED, reason="wandb is installed")
def test_the_package_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"needs the package wandb: pip install 's2w\[wandb\]', or write run\.wandb="):
        check_weights_and_biases()


@pytest.mark.skipif(not INSTALLED, reason="needs wandb")
def test_without_an_account_only_offline(tmp_path: Path) -> None:
    said = python(CHECK, tmp_path)
    assert "run.wandb=true, but W&B has no API key here: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE" in (
        said.stderr
    )
    said = python(CHECK, tmp_path, WANDB_API_KEY="short")
    assert "run.wandb=true, but W&B does not start (WANDB_API_KEY invalid: " in said.stderr
    assert python(CHECK, tmp_path, WANDB_MODE="offline").returncode == 0
    assert python(RECORD, tmp_path, WANDB_MODE="offline").returncode == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
