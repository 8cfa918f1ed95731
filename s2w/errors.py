"""Errors that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Bad input, found before anything started; the message is one sentence for the user."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name nearest to ``name``; empty if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {near[0]}?" if near else ""


class PreflightError(RuntimeError):
    """The self-test of a run failed (:mod:`s2w.launch.preflight`); the message is one sentence for the user."""


class RunError(RuntimeError):
    """A run failed (:mod:`s2w.actors.failures`); the message is one sentence for the user."""


class RequestRefusedError(ValueError):
    """An engine refuses a request, and would refuse it again; the message is one sentence for the user."""


class VerifierError(RuntimeError):
    """A verifier of the user's own fails on a response; the message is one sentence for the user, with the row."""


class LeftOutError(RuntimeError):
    """A request that kills whatever takes it; the message is one sentence for the user, with its uid."""
