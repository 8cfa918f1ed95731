"""The program behind ``s2w generate``: the teacher's responses, generated and filtered, without training on them."""

from __future__ import annotations

from s2w.config.schema import Config
from s2w.errors import ConfigError
from s2w.launch.check import check, check_generation
from s2w.launch.cluster import connected
from s2w.launch.job import OFF_POLICY, open_directory, run_to_its_end
from s2w.observe.progress import Progress
from s2w.teacher_data.collect import collect


def generate(config: Config) -> int:
    """Fills ``off_policy/`` of the run directory; returns the exit code: 0, or 130 if it was interrupted.

    ``s2w train`` with the same settings and run.resume=true continues from there; another run can read the directory
    with off_policy.path.

    Raises:
        ConfigError: bad input, and nothing was started; or no response passed the filters.
    """
    if config.off_policy.path is not None:
        raise ConfigError(f"off_policy.path={config.off_policy.path} is set: there is nothing to generate")
    models = check(config, generating=True)
    progress = Progress({"off_policy": config.off_policy.steps})
    with connected(config.cluster) as (device, resources):
        check_generation(config, device, resources)
        run = open_directory(config)
        directory = run / OFF_POLICY

        async def work() -> None:
            await collect(config, models, device, directory, progress)
            progress.say(f"responses in {directory}")

        return run_to_its_end(work(), run, progress)
