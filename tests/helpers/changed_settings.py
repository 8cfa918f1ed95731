"""Configurations that differ from another one in a few settings."""

from __future__ import annotations

from omegaconf import OmegaConf

from s2w.config.schema import Config


def changed(config: Config, *settings: str) -> Config:
    """``config`` with settings such as ``loop.steps=5``.

    Without Hydra's search for groups, which takes most of the time of :func:`s2w.config.compose.compose`.
    """
    merged = OmegaConf.merge(OmegaConf.structured(config), OmegaConf.from_dotlist(list(settings)))
    made = OmegaConf.to_object(merged)
    assert isinstance(made, Config)
    return made
