"""Errors that a user can act on."""

from __future__ import annotations


class ConfigError(ValueError):
    """Bad input, found before anything started; the message is one sentence for the user."""


class PreflightError(RuntimeError):
    """The self-test of a run failed (:mod:`s2w.preflight`); the message is one sentence for the user."""
