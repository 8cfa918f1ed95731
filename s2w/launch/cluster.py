"""The Ray cluster: joining or starting it, and what it computes on."""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc
import psutil
import ray
from ray._private import services
from ray._private.authentication.authentication_token_setup import (
    AUTH_MODE_ENV_VAR,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.core.generated.ray_client_pb2 import ClusterInfoRequest, ClusterInfoType  # type: ignore[attr-defined]
from ray.core.generated.ray_client_pb2_grpc import RayletDriverStub
from ray.exceptions import AuthenticationError

from s2w.actors.orphans import start_reaper
from s2w.actors.stopping import ending_at_once
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
    # Ray says at every start that token authentication, its default, is on.
    logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(_is_no_default)
    check_address(cluster)
    own = cluster.address is None and "RAY_ADDRESS" not in os.environ
    try:
        # Ray sets a handler of SIGTERM, and waits in C for its processes.
        with ending_at_once("interrupted"), _in_own_process_groups():
            ray.init(
                address=cluster.address,
                include_dashboard=False if own else None,
                log_to_driver=cluster.log_to_driver,
                logging_level=logging.INFO if cluster.log_to_driver else logging.WARNING,
            )
    except AuthenticationError as error:
        raise ConfigError(_token(f"cluster.address={cluster.address or 'null'}")) from error
    except ConnectionError as error:
        raise ConfigError(f"cluster.address={cluster.address}: {' '.join(str(error).split())}") from error
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
            found = services.canonicalize_bootstrap_address(address)  # type: ignore[arg-type]  # documented: str or None
        except ConnectionError as error:
            raise ConfigError(
                f"{setting}=auto: no Ray cluster runs on this machine; start one (ray start --head), or write null"
            ) from error
        if found is None:
            return
        # As ray.init does where it finds a cluster by itself: a token that is there is used.
        with suppress(AuthenticationError):
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
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
                _ping(channel)
            else:
                NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=ANSWER_S)
        finally:
            channel.close()
    except AuthenticationError as error:
        raise ConfigError(_token(f"{setting}={address or 'null'}")) from error
    except (OSError, grpc.FutureTimeoutError, grpc.RpcError) as error:
        if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise ConfigError(_token(f"{setting}={address or 'null'}")) from error
        reason = error.strerror or str(error) if isinstance(error, OSError) else "something else is listening there"
        raise ConfigError(
            f"{setting}={address or 'null'}: no Ray cluster answers at {host}:{port} ({reason}): {hint}"
        ) from error


@contextmanager
def _in_own_process_groups() -> Iterator[None]:
    """Starts Ray's processes in process groups of their own.

    A signal to this process's group (of a shell, of ``timeout``) is then for this process alone, which ends them when
    it has ended its work. They would end at once, and this process wait for them in vain.
    """
    popen = services.ConsolePopen
    services.ConsolePopen = functools.partial(popen, process_group=0)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        services.ConsolePopen = popen  # type: ignore[misc]


def _token(where: str) -> str:
    """What to do about a cluster that refuses this process's token, or that it has none, in a sentence."""
    sources = {"RAY_AUTH_TOKEN": "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH": "the file of RAY_AUTH_TOKEN_PATH"}
    source = next((text for name, text in sources.items() if os.environ.get(name)), "~/.ray/auth_token")
    if os.environ.get(AUTH_MODE_ENV_VAR, "").lower() != "token":
        wrong = f"none was sent, because {AUTH_MODE_ENV_VAR} is not `token` in this environment"
    elif _has_token():
        wrong = f"that in {source} is another"
    else:
        wrong = f"there is none in {source}"
    return (
        f"{where}: this Ray cluster asks for its token, and {wrong}: on this machine, write what `ray get-auth-token` "
        f"prints on the head into {source}, and run `export {AUTH_MODE_ENV_VAR}=token`"
    )


def _has_token() -> bool:
    """Whether Ray finds a token, the right one or not."""
    try:
        return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))
    except AuthenticationError:  # RAY_AUTH_TOKEN_PATH is no file.
        return False


def _ping(channel: grpc.Channel) -> None:
    """Asks a Ray Client server for a sign of life.

    Raises:
        grpc.RpcError: it refuses this process's token.
    """
    request = ClusterInfoRequest(type=ClusterInfoType.PING)
    try:
        RayletDriverStub(channel).ClusterInfo(request, timeout=ANSWER_S, metadata=(("client_id", "s2w"),))
    except grpc.RpcError as error:
        # Any other error is an answer too: this client is not connected yet.
        if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise


def _is_no_default(record: logging.LogRecord) -> bool:
    """False for the message that Ray's token authentication is on."""
    return "is enabled" not in record.getMessage()


def _device(cluster: ClusterConfig, resources: dict[str, float]) -> str:
    if cluster.device == "auto":
        return "cuda" if resources.get("GPU", 0) else "cpu"
    if cluster.device == "cuda" and not resources.get("GPU", 0):
        raise ConfigError("cluster.device=cuda, but the cluster has 0 GPUs: write cluster.device=cpu, or add GPU nodes")
    return cluster.device
