"""How a run's own errors are reported; those of Ray's actors are in tests/integration/test_failures.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2w.actors.failures import ActorFailedError, reported
from s2w.errors import ConfigError, RunError


def test_a_run_that_fails_says_so_in_a_sentence(tmp_path: Path) -> None:
    log = tmp_path / "error.log"
    inner = ExceptionGroup("tasks", [ValueError("less telling"), ActorFailedError("rollout engine 1 died: gone.")])
    for _ in range(2):
        with pytest.raises(RunError) as caught, reported(log, lambda: "step 3 is saved"):
            raise ExceptionGroup("phase", [inner])
    assert str(caught.value) == f"rollout engine 1 died: gone; step 3 is saved; traceback: {log}"
    assert log.read_text().count("Traceback") >= 2 and "less telling" in log.read_text()
    with pytest.raises(RunError, match=r"^KeyError: 'x'; step"), reported(log, lambda: "step 3 is saved"):
        raise KeyError("x")
    # Bad input stays what it is.
    with pytest.raises(ConfigError, match=r"^a setting$"), reported(log, lambda: ""):
        raise ExceptionGroup("start", [ConfigError("a setting")])
