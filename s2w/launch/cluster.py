"""The Ray cluster: joining or starting it, and what it computes on."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import psutil
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from s2w.actors.orphans import start_reaper
from s2w.config.schema import ClusterConfig
from s2w.errors import ConfigError

ANSWER_S = 10
"""How long an address may take to accept a connection, and then to speak Ray's protocol."""


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[tuple[str, dict[str, float]]]:
    """Joins the Ray cluster, or starts one on this machine, and leaves it again.

    Yields:
        ``cuda`` or ``cpu``, and the cluster's resources by name.

    Raises:
        ConfigError: no cluster answers, or cuda is asked for and the cluster has none.
    """
    check_address(cluster)
    # Ray says at every start that token authentication, its default, is on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(_is_no_default)
    own = cluster.address is None and "RAY_ADDRESS" not in os.environ
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=cluster.address,
            include_dashboard=False if own else None,
            log_to_driver=cluster.log_to_driver,
            logging_level=logging.WARNING,
        )
    except ConnectionError as error:
        raise ConfigError(f"cluster.address={cluster.address}: {' '.join(str(error).split())}") from error
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray has its own handler, which ends this process.
    # Ray's agents try for a minute to report the end of a node whose driver was killed. A cluster that was joined has
    # no process here.
    family = psutil.Process().children(recursive=True)
    reaper = start_reaper(family) if family else None
    try:
        resources = ray.cluster_resources()
        yield _device(cluster, resources), resources
    finally:
        ray.shutdown()
        if reaper is not None:
            reaper.kill()
            reaper.wait()


def check_address(cluster: ClusterConfig) -> None:
    """Checks that a cluster answers, where one is to be joined: ``ray.init`` retries a dead address for minutes.

    Raises:
        ConfigError: it is not an address, or nothing, or something else, answers there.
    """
    setting, address = "cluster.address", cluster.address
    # Ray's own rule: the environment variable replaces a missing address, and auto.
    if (environment := os.environ.get("RAY_ADDRESS")) and address in (None, "auto"):
        setting, address = "RAY_ADDRESS", environment
    if address == "local":
        return
    hint = "check that its head is up and its port open from here (6379, or 10001 after ray://)"
    if address in (None, "auto"):
        hint = "`ray start` started it here, and it is gone: run `ray stop`, or write cluster.address=local"
        try:
            found = canonicalize_bootstrap_address(address)  # type: ignore[arg-type]  # documented: str or None
        except ConnectionError as error:
            raise ConfigError(
                f"{setting}=auto: no Ray cluster runs on this machine; start one (ray start --head), or write null"
            ) from error
        if found is None:
            return
    else:
        found = address.removeprefix("ray://")
    host, _, port = str(found).rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535 or "://" in host:
        raise ConfigError(f"{setting}={address or 'null'}: write HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
        channel = init_grpc_channel(f"{host}:{port}", options=GLOBAL_GRPC_OPTIONS)
        try:
            if str(address).startswith("ray://"):
                grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
            else:
                NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=ANSWER_S)
        finally:
            channel.close()
    except (OSError, grpc.FutureTimeoutError, grpc.RpcError) as error:
        if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return  # A cluster; ray.init says what is wrong with the token.
        reason = error.strerror or str(error) if isinstance(error, OSError) else "something else is listening there"
        raise ConfigError(
            f"{setting}={address or 'null'}: no Ray cluster answers at {host}:{port} ({reason}): {hint}"
        ) from error


def _is_no_default(record: logging.LogRecord) -> bool:
    """False for the message that Ray's token authentication is on."""
    return "is enabled" not in record.getMessage()


def _device(cluster: ClusterConfig, resources: dict[str, float]) -> str:
    if cluster.device == "auto":
        return "cuda" if resources.get("GPU", 0) else "cpu"
    if cluster.device == "cuda" and not resources.get("GPU", 0):
        raise ConfigError("cluster.device=cuda, but the cluster has 0 GPUs: write cluster.device=cpu, or add GPU nodes")
    return cluster.device
