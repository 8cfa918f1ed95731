"""The program behind ``s2w doctor``: what runs trip over, looked for before they do, on a node or a whole cluster.

A node looks at itself (:mod:`s2w.launch.node_checks`). What only shows between nodes is looked at here: versions,
clocks, ports, a directory that all share; and what concerns the one who submits: Ray's token, W&B's key.
"""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from s2w.config.schema import ClusterConfig
from s2w.launch.cluster import check_address, connected
from s2w.launch.node_checks import Expected, Finding, check_disk, check_node, unreachable, versions

ROUND_TRIPS = 5
"""Of these the shortest says most about a clock."""
CLOCK_S = 1.0
"""A difference of two clocks that is worth a note: timelines and log files no longer fit together."""
STOP_WAIT_S = 60
"""Seconds that a job should have to save after `ray job stop`."""
NAMED = 4
"""Nodes that a line names one by one."""


def doctor(address: str | None = None, nodes: int = 1, directory: str | None = None) -> int:
    """Looks and prints, a line a check; returns the exit code: 0, or 1 if something would stop a run.

    Args:
        address: of a Ray cluster; None takes RAY_ADDRESS or the cluster that runs on this machine, if there is one.
        nodes: how many the cluster must have; they are waited for as long as a run waits for its actors.
        directory: for runs, which all nodes must share.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    cluster = ClusterConfig(address=address)
    check_address(cluster)
    known = address or os.environ.get("RAY_ADDRESS") or canonicalize_bootstrap_address(None)  # type: ignore[arg-type]
    findings = [*check_token(os.environ), *check_wandb(os.environ)]
    if known is None:
        print("s2w doctor: this machine; no Ray cluster runs here")
        findings += merge({"": check_node(Expected(directory=directory))})
        findings.append(Finding("ok", "versions", _listed(versions())))
        if nodes > 1:
            findings.append(Finding("FAIL", "nodes", f"no cluster, and {nodes} nodes asked for", "ray start"))
        return report(findings)
    cluster.address = known
    with connected(cluster):
        members = wait_for_nodes(nodes, cluster.start_timeout_s)
        names = ", ".join(name_of(node) for node in members[:NAMED])
        more = f" and {len(members) - NAMED} more" if len(members) > NAMED else ""
        print(f"s2w doctor: the cluster at {known}: {names}{more}")
        if len(members) < nodes:
            text = f"{len(members)} of {nodes} joined within {cluster.start_timeout_s} s"
            findings.append(
                Finding("FAIL", "nodes", text, "`ray start --address` on the others; same token, same Ray and Python")
            )
        findings += examine(members, directory)
    return report(findings)


def wait_for_nodes(count: int, timeout_s: float) -> list[dict[str, Any]]:
    """The living nodes of the cluster, as ``ray.nodes()`` has them, once they are so many or the time is over."""
    end = time.monotonic() + timeout_s
    while True:
        members = [node for node in ray.nodes() if node["Alive"]]
        if len(members) >= count or time.monotonic() > end:
            return sorted(members, key=name_of)
        time.sleep(1)


def name_of(node: Mapping[str, Any]) -> str:
    """A node in words: host name and address."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


class Examiner:
    """An actor on a node."""

    def __init__(self) -> None:
        self.listener: socket.socket | None = None

    def clock(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def environment(self, name: str) -> str | None:
        """A variable as Ray's workers have it there."""
        return os.environ.get(name)

    def check(self, expected: Expected) -> list[Finding]:
        return check_node(expected)

    def versions(self) -> dict[str, str]:
        return versions()

    def listen(self) -> tuple[str, int]:
        """Where it accepts connections from now on: at any free port, like a run's own servers."""
        self.listener = socket.create_server(("", 0), backlog=1024)
        return ray.util.get_node_ip_address(), self.listener.getsockname()[1]

    def unreachable(self, addresses: Sequence[tuple[str, int]]) -> list[str]:
        return unreachable(addresses)

    def reads(self, path: str) -> bool:
        """Whether it can read a file that another node has written, and write beside it."""
        if not Path(path).is_file():
            return False
        return check_disk("", Path(path).parent).level != "FAIL"


def examine(members: Sequence[Mapping[str, Any]], directory: str | None) -> list[Finding]:
    """What the nodes of the cluster say, each about itself and about the others."""
    actor = ray.remote(num_cpus=0)(Examiner)
    examiners: dict[str, Any] = {}
    for node in members:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        examiners[node["NodeID"]] = actor.options(scheduling_strategy=here).remote()
    names = {node["NodeID"]: name_of(node) for node in members}
    if len(set(names.values())) < len(names):  # Several raylets on one machine.
        names = {identity: f"{name} {identity[:6]}" for identity, name in names.items()}
    expected = {
        node["NodeID"]: Expected(
            int(node["Resources"].get("object_store_memory", 0)) or None,
            int(node["Resources"].get("GPU", 0)),
            directory,
        )
        for node in members
    }

    def ask(method: str, arguments: Mapping[str, tuple[Any, ...]] | None = None) -> dict[str, Any]:
        """Answers of all nodes by name."""
        calls = {
            identity: getattr(examiner, method).remote(*(arguments[identity] if arguments else ()))
            for identity, examiner in examiners.items()
        }
        return {names[identity]: ray.get(call) for identity, call in calls.items()}

    ask("clock")  # All are up.
    findings = merge(ask("check", {identity: (expected[identity],) for identity in examiners}))
    findings.append(compare_versions(ask("versions")))
    findings.append(compare_clocks({names[i]: _offset(examiner) for i, examiner in examiners.items()}))
    listening = ask("listen")
    others = {
        identity: ([address for name, address in listening.items() if name != names[identity]],)
        for identity in examiners
    }
    findings.append(check_ports(ask("unreachable", others)))
    findings.append(check_stop_wait(ask("environment", dict.fromkeys(examiners, ("RAY_JOB_STOP_WAIT_TIME_S",)))))
    if directory:
        findings.append(check_shared(Path(directory), lambda path: ask("reads", dict.fromkeys(examiners, (path,)))))
    for examiner in examiners.values():
        ray.kill(examiner)
    return findings


def _offset(examiner: Any) -> float:
    """Seconds that a node's clock is ahead of this one's, to within half of the shortest round trip."""
    trips = []
    for _ in range(ROUND_TRIPS):
        sent = time.time()
        there = ray.get(examiner.clock.remote())
        back = time.time()
        trips.append((back - sent, there - (sent + back) / 2))
    return min(trips)[1]


def check_shared(directory: Path, ask: Callable[[str], Mapping[str, bool]]) -> Finding:
    """Whether all nodes see a file that this one writes into the directory.

    Args:
        ask: whether each node, by name, sees a file.
    """
    mark = directory.absolute() / f".s2w-doctor-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mark.touch()
        link = mark.with_suffix(".link")
        link.symlink_to(mark)  # As checkpoints/latest is.
        link.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            mark.unlink()
        remedy = "a directory that you may write, on a file system with symbolic links (a mounted bucket has none)"
        return Finding("FAIL", "shared directory", f"{directory}: {error}", remedy)
    try:
        blind = [name for name, sees in ask(str(mark)).items() if not sees]
    finally:
        mark.unlink()
    if blind:
        text = f"{directory} is not the same directory, or not writable, on {_named(blind)}"
        return Finding("FAIL", "shared directory", text, "a file system that all nodes mount (NFS, Lustre, a PVC)")
    return Finding("ok", "shared directory", f"{directory}: all nodes see what this one writes")


def compare_versions(found: Mapping[str, Mapping[str, str]]) -> Finding:
    """Packages by node: all must have the same."""
    first, *others = found.values()
    differing = sorted({package for other in others for package, _ in first.items() ^ other.items()})
    if not differing:
        return Finding("ok", "versions", f"{_listed(first)}: the same on {len(found)} nodes")
    parts = [
        f"{package} " + ", ".join(f"{table.get(package, 'none')} on {name}" for name, table in found.items())
        for package in differing
    ]
    return Finding("FAIL", "versions", "; ".join(parts), "install the same lock, or run the same image, everywhere")


def compare_clocks(offsets: Mapping[str, float]) -> Finding:
    """Seconds by node that its clock is ahead of this one's."""
    low, high = min(offsets, key=lambda name: offsets[name]), max(offsets, key=lambda name: offsets[name])
    apart = offsets[high] - offsets[low]
    if len(offsets) > 1 and apart > CLOCK_S:
        text = f"{high} is {apart:.1f} s ahead of {low}"
        return Finding("note", "clocks", text, "run chrony or systemd-timesyncd on every node")
    return Finding("ok", "clocks", f"at most {apart:.3f} s apart")


def check_ports(failed: Mapping[str, Sequence[str]]) -> Finding:
    """Addresses of other nodes that each node could not connect to."""
    if bad := [f"{name} to {', '.join(addresses)}" for name, addresses in failed.items() if addresses]:
        remedy = "open all TCP ports between the nodes: Ray, NCCL and Gloo choose theirs"
        return Finding("FAIL", "ports", f"no connection from {_named(bad)}", remedy)
    alone = len(failed) == 1
    return Finding("ok", "ports", "one node" if alone else "every node reaches every other at a free port")


def check_stop_wait(values: Mapping[str, str | None]) -> Finding:
    """RAY_JOB_STOP_WAIT_TIME_S as Ray's workers have it, by node."""
    if short := [name for name, value in values.items() if float(value or 3) < STOP_WAIT_S]:
        text = f"`ray job stop` kills a job after {values[short[0]] or 3} s, before a run has saved"
        return Finding("note", "job stop", text, "RAY_JOB_STOP_WAIT_TIME_S=600 in the environment of `ray start`")
    return Finding("ok", "job stop", "a job has time to save")


def check_token(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Ray's token, in the environment of the one who submits."""
    file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    has_token = bool(environment.get("RAY_AUTH_TOKEN")) or file.is_file()
    mode = environment.get("RAY_AUTH_MODE")
    create = (
        f"`ray get-auth-token --generate` writes one to {Path.home() / '.ray' / 'auth_token'}; the nodes need the same"
    )
    if mode == "token" and not has_token:
        yield Finding("FAIL", "token", f"RAY_AUTH_MODE=token, but there is none in RAY_AUTH_TOKEN or {file}", create)
    elif mode == "token":
        yield Finding("ok", "token", "RAY_AUTH_MODE=token, and there is one")
    elif mode == "disabled":
        remedy = "RAY_AUTH_MODE=token on every node, unless nobody else reaches its ports"
        yield Finding("note", "token", "RAY_AUTH_MODE=disabled: whoever reaches the cluster may run code on it", remedy)
    else:
        text = "RAY_AUTH_MODE is not set: `ray job submit` sends no token from here (401 Unauthorized)"
        yield Finding("note", "token", text, "export RAY_AUTH_MODE=token" + ("" if has_token else f"; {create}"))


def check_wandb(environment: Mapping[str, str]) -> Iterator[Finding]:
    """W&B's key; nothing where W&B is not installed."""
    if importlib.util.find_spec("wandb") is None:
        return
    offline = environment.get("WANDB_MODE") in ("offline", "disabled")
    if environment.get("WANDB_API_KEY") or offline or _in_netrc("api.wandb.ai"):
        yield Finding("ok", "W&B", "offline" if offline else "there is a key")
    else:
        remedy = "WANDB_API_KEY in the job's environment, `wandb login`, or WANDB_MODE=offline"
        yield Finding("note", "W&B", "no key: run.wandb=true would not start", remedy)


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def merge(findings: Mapping[str, Iterable[Finding]]) -> list[Finding]:
    """Findings by node in fewer: one a check where all nodes are well; else each that is not, with its nodes."""
    by_check: dict[str, dict[Finding, list[str]]] = {}
    for name, found in findings.items():
        for finding in found:
            by_check.setdefault(finding.check, {}).setdefault(finding, []).append(name)
    merged = []
    for seen in by_check.values():
        bad = [(finding, names) for finding, names in seen.items() if finding.level != "ok"]
        if not bad:
            finding = next(iter(seen))
            more = f" (first of {len(seen)} nodes)" if len(seen) > 1 else ""
            merged.append(Finding(finding.level, finding.check, finding.text + more))
        for finding, names in bad:
            where = f"{_named(names)}: " if len(names) < len(findings) else "every node: " if len(names) > 1 else ""
            merged.append(Finding(finding.level, finding.check, where + finding.text, finding.remedy))
    return merged


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return "; ".join(names[:NAMED]) + more


def _listed(table: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in table.items())


def report(findings: Sequence[Finding]) -> int:
    """Prints a line for each finding and one for all; returns 1 if one of them is a FAIL, else 0."""
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        print(f"{finding.level:4}  {finding.check:{width}}  {finding.text}{remedy}")
    failed = sum(finding.level == "FAIL" for finding in findings)
    notes = sum(finding.level == "note" for finding in findings)
    print(f"{failed} would stop a run, {notes} to know about, {len(findings) - failed - notes} well")
    return 1 if failed else 0
