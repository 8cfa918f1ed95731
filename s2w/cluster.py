"""The Ray cluster: joining or starting it, and what it computes on."""

from __future__ import annotations

import logging
import os

import ray

from s2w.config import ClusterConfig
from s2w.errors import ConfigError


def connect(cluster: ClusterConfig) -> None:
    """Joins the Ray cluster, or starts one on this machine."""
    # Ray says at every start that its default, a token, is on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(_is_no_default)
    ray.init(
        address=cluster.address,
        include_dashboard=False if cluster.address is None and "RAY_ADDRESS" not in os.environ else None,
        log_to_driver=cluster.log_to_driver,
        logging_level=logging.WARNING,
    )


def _is_no_default(record: logging.LogRecord) -> bool:
    """Not the message that Ray's token authentication is on."""
    return "is enabled" not in record.getMessage()


def resolve_device(cluster: ClusterConfig, resources: dict[str, float]) -> str:
    """``cuda`` or ``cpu``, from cluster.device and the cluster's resources.

    Raises:
        ConfigError: cuda is asked for and the cluster has none.
    """
    if cluster.device == "auto":
        return "cuda" if resources.get("GPU", 0) else "cpu"
    if cluster.device == "cuda" and not resources.get("GPU", 0):
        raise ConfigError("cluster.device=cuda, but the cluster has 0 GPUs: write cluster.device=cpu, or add GPU nodes")
    return cluster.device
