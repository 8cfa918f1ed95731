"""The program behind ``s2w generate``: the teacher's responses, generated and filtered, without training on them."""

from __future__ import annotations

import asyncio

from s2w.config.schema import Config
from s2w.data.trial import try_verifiers
from s2w.errors import ConfigError
from s2w.launch.check import check
from s2w.launch.cluster import connected
from s2w.launch.demands import generation
from s2w.launch.describe import lines_about, run_prompts
from s2w.launch.job import run_to_its_end
from s2w.launch.places import find_room, reserve_engines
from s2w.launch.run_directory import OFF_POLICY, opened
from s2w.observe.progress import Progress
from s2w.teacher_data.collect import collect
from s2w.teacher_data.generate import teacher_prompts


def generate(config: Config, *, quiet: bool = False) -> int:
    """Fills ``off_policy/`` of the run directory; returns the exit code: 0, or 130 if it was interrupted.

    ``s2w train`` with the same settings and run.resume=true continues from there; another run can read the directory
    with off_policy.path.

    Args:
        quiet: prints only warnings.

    Raises:
        ConfigError: bad input, and nothing was started; or no response passed the filters.
    """
    if config.off_policy.path is not None:
        raise ConfigError(f"off_policy.path={config.off_policy.path} is set: there is nothing to generate")
    models = check(config, generating=True)
    prompts, heldout = run_prompts(config, models)
    if config.off_policy.filters.verified:
        try_verifiers(teacher_prompts(config, models.student.tokenizer))
    progress = Progress({"off_policy": config.off_policy.steps}, quiet=quiet, verbose=config.cluster.log_to_driver)
    for note in lines_about(config, models, prompts, heldout):
        progress.say(note)
    with connected(config.cluster) as (device, _):
        asyncio.run(find_room(config, [generation(config)], device))
        with opened(config, "generate") as run:
            directory = run / OFF_POLICY

            async def work() -> None:
                reserve = reserve_engines(config, device)
                await collect(config, models, device, directory, progress, reserve=reserve)
                progress.say(f"responses in {directory}")

            return run_to_its_end(work(), run, progress, "generate")
