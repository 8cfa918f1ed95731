"""How a run's own errors are reported; those of Ray's actors are in tests/integration/test_failures.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext  # type: ignore[attr-defined]
from ray.exceptions import ActorDiedError

from s2w.actors.failures import ActorFailedError, reason, reported
from s2w.errors import ConfigError, RunError


def test_a_run_that_fails_says_so_in_a_sentence(tmp_path: Path) -> None:
    log = tmp_path / "error.log"
    inner = ExceptionGroup("tasks", [ValueError("less telling"), ActorFailedError("rollout engine 1 died: gone.")])
    for _ in range(2):
        with pytest.raises(RunError) as caught, reported(lambda: log, lambda: "step 3 is saved"):
            raise ExceptionGroup("phase", [inner])
    assert str(caught.value) == f"rollout engine 1 died: gone; step 3 is saved; traceback: {log}"
    assert log.read_text().count("Traceback") >= 2 and "less telling" in log.read_text()
    with pytest.raises(RunError, match=r"^KeyError: 'x'; step"), reported(lambda: log, lambda: "step 3 is saved"):
        raise KeyError("x")
    # Bad input stays what it is.
    with pytest.raises(ConfigError, match=r"^a setting$"), reported(lambda: log, lambda: ""):
        raise ExceptionGroup("start", [ConfigError("a setting")])


@pytest.mark.parametrize(
    "detail",
    [
        "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) ...",
        # When the raylet hears of it in another way than from the closed socket.
        "Worker connection closed unexpectedly.",
    ],
)
def test_a_process_whose_end_ray_has_not_seen(detail: str) -> None:
    context = ActorDiedErrorContext(
        actor_id=bytes(16),
        pid=1789,
        error_message="The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
        f"Worker exit detail: {detail}",
    )
    assert reason(ActorDiedError(context), "teacher 0") == (
        "its process 1789 was killed or crashed; if memory ran out, lower teacher.kv_cache_gib, "
        "teacher.max_sequences or teacher.replicas"
    )
