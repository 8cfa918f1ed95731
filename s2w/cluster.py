"""The Ray cluster: joining or starting it, and what it computes on."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from s2w.config import ClusterConfig
from s2w.errors import ConfigError


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[tuple[str, dict[str, float]]]:
    """Joins the Ray cluster, or starts one on this machine, and leaves it again.

    Yields:
        ``cuda`` or ``cpu``, and the cluster's resources by name.

    Raises:
        ConfigError: no cluster answers, or cuda is asked for and the cluster has none.
    """
    # Ray says at every start that its default, a token, is on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(_is_no_default)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=cluster.address,
            include_dashboard=False if cluster.address is None and "RAY_ADDRESS" not in os.environ else None,
            log_to_driver=cluster.log_to_driver,
            logging_level=logging.WARNING,
        )
    except ConnectionError as error:
        raise ConfigError(f"cluster.address={cluster.address}: {' '.join(str(error).split())}") from error
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray has its own handler, which ends this process.
    try:
        resources = ray.cluster_resources()
        yield _device(cluster, resources), resources
    finally:
        ray.shutdown()


def _is_no_default(record: logging.LogRecord) -> bool:
    """Not the message that Ray's token authentication is on."""
    return "is enabled" not in record.getMessage()


def _device(cluster: ClusterConfig, resources: dict[str, float]) -> str:
    if cluster.device == "auto":
        return "cuda" if resources.get("GPU", 0) else "cpu"
    if cluster.device == "cuda" and not resources.get("GPU", 0):
        raise ConfigError("cluster.device=cuda, but the cluster has 0 GPUs: write cluster.device=cpu, or add GPU nodes")
    return cluster.device
