"""The program behind ``s2w generate``: the teacher's responses, filtered, and nothing learned from them."""

from __future__ import annotations

from s2w.cluster import connected
from s2w.config import Config
from s2w.errors import ConfigError
from s2w.job import OFF_POLICY, open_directory, run_to_its_end
from s2w.observe.progress import Progress
from s2w.off_policy.collect import collect
from s2w.validate import check, check_generation


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
    with connected(config.cluster) as (device, resources):
        check_generation(config, device, resources)
        run = open_directory(config)
        directory = run / OFF_POLICY

        async def work() -> None:
            await collect(config, facts, device, directory, progress)
            progress.say(f"responses in {directory}")

        return run_to_its_end(work(), run, progress)
