"""A trial of the user's own verifiers before a run starts: what they do wrong is found before hours are spent."""

from __future__ import annotations

import time
from collections.abc import Iterable

from s2w.data.verifier_process import VerifierProcess
from s2w.data.verifiers import is_custom, verifier_at
from s2w.errors import ConfigError, VerifierError
from s2w.records import Prompt

TRIAL_S = 10.0
"""Seconds that the trial may take, imports aside; prompts that are then left are not tried."""


def try_verifiers(prompts: Iterable[Prompt]) -> None:
    """Has the user's own verifiers score, for each prompt, the empty response and the reference answer.

    Both are responses that a student can give; which score they get does not matter.

    Args:
        prompts: of a run; one in several modes is tried once.

    Raises:
        ConfigError: a verifier cannot be called, fails, returns no score or takes longer than a response may; the
            message names the row.
    """
    own = {prompt.uid: prompt for prompt in prompts if prompt.task and is_custom(prompt.task)}
    if not own:
        return
    with VerifierProcess() as process:
        for task in dict.fromkeys(prompt.task for prompt in own.values()):
            process.prepare(task)
        until = time.monotonic() + TRIAL_S
        for prompt in own.values():
            for response in dict.fromkeys(("", prompt.answer or "")):
                _try(process, prompt, response)
            if time.monotonic() > until:
                return


def _try(process: VerifierProcess, prompt: Prompt, response: str) -> None:
    try:
        score = process.timed(prompt, response)
    except VerifierError as error:
        raise ConfigError(f"{error} (tried on the response {response!r})") from error
    if score is None:
        raise ConfigError(
            f"{verifier_at(prompt)} took more than {process.timeout_s:g} s for the response {response!r}, or ended its "
            "process"
        )
