"""The program behind ``s2w generate``: the teacher's responses, filtered, and nothing learned from them."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import ray

from s2w.cluster import connect, resolve_device
from s2w.compose import to_yaml
from s2w.config import Config
from s2w.errors import ConfigError
from s2w.observe.progress import Progress
from s2w.off_policy.collect import DIRECTORY, collect
from s2w.validate import check, check_generation

INTERRUPTED = 130
"""Exit code after SIGINT or SIGTERM."""


def generate(config: Config) -> int:
    """Fills ``off_policy/`` of the run directory; returns the exit code: 0, or 130 if it was interrupted.

    ``s2w train`` with the same settings and run.resume=true goes on from there; another run can read the directory
    with off_policy.path.

    Raises:
        ConfigError: bad input, and nothing was started; or no response passed the filters.
    """
    if config.off_policy.path is not None:
        raise ConfigError(f"off_policy.path={config.off_policy.path} is set: there is nothing to generate")
    facts = check(config, generating=True)
    progress = Progress(config.off_policy.steps, config.loss.divergence)
    connect(config.cluster)
    try:
        resources = ray.cluster_resources()
        device = resolve_device(config.cluster, resources)
        check_generation(config, device, resources)
        run = Path(config.run.dir).resolve()
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(to_yaml(config))

        async def work() -> None:
            task = asyncio.current_task()
            assert task is not None
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
            await collect(config, facts, device, run / DIRECTORY, progress)

        asyncio.run(work())
        progress.say(f"responses in {run / DIRECTORY}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        progress.say(f"interrupted; to continue: the same command with run.dir={config.run.dir} run.resume=true")
        return INTERRUPTED
    finally:
        ray.shutdown()
    return 0
