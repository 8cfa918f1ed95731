"""Time and peak memory of the distillation loss, forward and backward, against its limit and its peers.

The limit is the four matrix products alone: student logits, teacher logits, gradient of the hidden rows, gradient of
the head. Beside it stand a plain PyTorch loss, Liger-Kernel's chunked loss and TRL's. Every variant runs on the same
inputs in a fresh process, and its loss and gradients are checked against ours. The last two have an environment of
their own:

    python -m venv /tmp/peers && /tmp/peers/bin/pip install trl==1.16.0 liger-kernel==0.8.5 torch==2.13.0
    python benchmarks/kl.py --peers-python /tmp/peers/bin/python --json kl.json

A time is the best of all repeats, in seconds, with the environment of s2w's CPU actors (allocator and OpenMP); on a
shared machine `--clock cpu --threads 1` counts only what the process itself computed. Memory is the growth of the
process's peak resident set over its inputs, in bytes, with glibc's allocator, which gives large blocks back. A ratio
is ours over theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Size:
    """Vocabulary, hidden widths, rows."""

    vocab: int
    student: int
    teacher: int
    rows: int


SIZES = {
    "smollm2": Size(49_152, 576, 576, 1024),
    "qwen3": Size(151_936, 1024, 4096, 256),
}
"""SmolLM2-135M by itself; Qwen3-0.6B by a teacher of Qwen3-235B-A22B's width."""

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
"""The peers' name of a divergence."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Inputs:
    """hidden and head carry gradients; the teacher's do not."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor

    @classmethod
    def draw(cls, size: Size, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return torch.empty(rows, columns).normal_(0, scale, generator=generator).to(dtype)

        # Logits of standard deviation 2, about the entropy of a language model.
        return cls(
            normal(size.rows, size.student).requires_grad_(),
            normal(size.vocab, size.student, 2 * size.student**-0.5).requires_grad_(),
            normal(size.rows, size.teacher),
            normal(size.vocab, size.teacher, 2 * size.teacher**-0.5),
        )


def ours(x: Inputs, divergence: str, chunk_rows: int) -> Tensor:
    from s2w.models.head import Head
    from s2w.objectives.divergences import make_divergence
    from s2w.objectives.kernel import HiddenRows, divergence_loss

    teacher = HiddenRows(x.teacher_hidden, Head(x.teacher_head))
    weights = torch.full((len(x.hidden),), 1 / len(x.hidden))
    options: dict[str, Any] = {"vocab_size": len(x.head), "weights": weights, "chunk_rows": chunk_rows}
    loss = divergence_loss(x.hidden, Head(x.head), teacher, make_divergence(divergence), **options).loss
    loss.backward()
    return loss


@torch.no_grad()
def matmuls(x: Inputs, divergence: str, chunk_rows: int) -> None:
    logits = x.hidden @ x.head.T
    _ = x.teacher_hidden @ x.teacher_head.T
    x.hidden.grad = logits @ x.head
    x.head.grad = logits.T @ x.hidden


def plain(x: Inputs, divergence: str, chunk_rows: int) -> Tensor:
    log_q = F.log_softmax((x.hidden @ x.head.T).float(), -1)
    log_p = F.log_softmax((x.teacher_hidden @ x.teacher_head.T).float(), -1)
    if divergence == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
        sides = [F.kl_div(log_m, side, reduction="batchmean", log_target=True) for side in (log_p, log_q)]
        loss = (sides[0] + sides[1]) / 2
    else:
        given, target = (log_q, log_p) if divergence == "forward_kl" else (log_p, log_q)
        loss = F.kl_div(given, target, reduction="batchmean", log_target=True)
    loss.backward()
    return loss


def liger(x: Inputs, divergence: str, chunk_rows: int) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[divergence])
    labels = torch.zeros(len(x.hidden), dtype=torch.int64)
    loss = function(x.hidden, x.head, x.teacher_hidden, x.teacher_head, labels)
    loss.backward()
    return loss


def trl(x: Inputs, divergence: str, chunk_rows: int) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    sides = (x.hidden, x.head, None, x.teacher_hidden, x.teacher_head, None)
    loss = ChunkedDivergenceFunction.apply(*sides, BETA[divergence])[0].mean()
    loss.backward()
    return loss


VARIANTS: dict[str, Callable[[Inputs, str, int], Tensor | None]] = {
    "ours": ours,
    "matmuls": matmuls,
    "plain": plain,
    "liger": liger,
    "trl": trl,
}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def work(variant: str, size: Size, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one variant in this process."""
    x = Inputs.draw(size, getattr(torch, arguments.dtype))
    function = VARIANTS[variant]
    # Imports, and Liger's compilation, before anything is measured.
    head = x.head.detach()[:64].clone().requires_grad_()
    function(Inputs(x.hidden, head, x.teacher_hidden, x.teacher_head[:64]), arguments.divergence, 1024)
    if variant == "liger":
        function(x, arguments.divergence, arguments.chunk_rows)
    clock = CLOCKS[arguments.clock]
    seconds, peaks = [], []
    for _ in range(arguments.repeats):
        x.hidden.grad = x.head.grad = None
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
        before = resident("VmRSS")
        started = clock()
        loss = function(x, arguments.divergence, arguments.chunk_rows)
        seconds.append(clock() - started)
        peaks.append(resident("VmHWM") - before)
    assert x.hidden.grad is not None and x.head.grad is not None
    return {
        "seconds": min(seconds),
        # The first: later repeats find memory that the allocator kept.
        "memory": peaks[0],
        "loss": None if loss is None else float(loss),
        "gradients": None if loss is None else [float(t.grad.float().norm()) for t in (x.hidden, x.head)],  # type: ignore[union-attr]
    }


def run(variant: str, size: str, arguments: argparse.Namespace, actor: bool) -> dict[str, Any]:
    """Runs one variant in a fresh process, with the environment of an actor to time it, or as it is for its memory;
    ``error`` holds the last line of what stopped it."""
    from s2w.actors.hardware import cpu_environment  # not at the top: the peers' interpreter has no s2w

    python = arguments.peers_python if variant in ("liger", "trl") else sys.executable
    if python is None:
        return {"error": "no --peers-python"}
    command = [python, __file__, "--worker", variant, "--sizes", size, "--divergence", arguments.divergence]
    repeats = arguments.repeats if actor else 1  # memory is that of the first
    command += ["--chunk-rows", str(arguments.chunk_rows), "--repeats", str(repeats)]
    command += ["--dtype", arguments.dtype, "--threads", str(arguments.threads), "--clock", arguments.clock]
    if arguments.rows is not None:
        command += ["--rows", str(arguments.rows)]
    environment = os.environ | (cpu_environment() if actor else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(results: dict[str, Any], dtype: str) -> None:
    """All variants computed the same thing."""
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    for variant, result in results.items():
        if result.get("loss") is None:
            continue
        expected = [results["ours"]["loss"], *results["ours"]["gradients"]]
        for ours, theirs in zip(expected, [result["loss"], *result["gradients"]], strict=True):
            if abs(ours - theirs) > tolerance * abs(ours):
                raise AssertionError(f"{variant} computes {theirs} where s2w computes {ours}")


def measure(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All variants at one size, ``rounds`` times in turn, so that a busy moment does not fall on one of them."""
    results = {variant: run(variant, size, arguments, actor=False) for variant in VARIANTS}
    memory = {variant: result["memory"] for variant, result in results.items() if "memory" in result}
    for number in range(arguments.rounds):
        for variant in memory:
            result = run(variant, size, arguments, actor=True) | {"memory": memory[variant]}
            best = results[variant].get("seconds", float("inf"))
            if number == 0 or result.get("seconds", float("inf")) < best:
                results[variant] = result
    check(results, arguments.dtype)

    def ratios(quantity: str) -> dict[str, float | None]:
        mine = results["ours"][quantity]
        others = (variant for variant in VARIANTS if variant != "ours")
        return {v: mine / results[v][quantity] if quantity in results[v] else None for v in others}

    return {
        "size": sized(size, arguments.rows),
        "variants": results,
        "ratios": ratios("seconds"),
        "memory": ratios("memory"),
    }


def sized(name: str, rows: int | None) -> dict[str, int]:
    size = asdict(SIZES[name])
    return size if rows is None else size | {"rows": rows}


def show(name: str, report: dict[str, Any]) -> None:
    size = report["size"]
    print(f"\n{name}: {size['rows']} rows, vocabulary {size['vocab']}, widths {size['student']} and {size['teacher']}")
    print(f"{'':10}{'seconds':>10}{'MiB':>10}{'ours/it':>10}{'memory':>10}")
    for variant, result in report["variants"].items():
        if "error" in result:
            print(f"{variant:10}{result['error']}")
            continue
        line = f"{variant:10}{result['seconds']:10.3f}{result['memory'] / 2**20:10.0f}"
        if variant != "ours":
            line += f"{report['ratios'][variant]:10.2f}{report['memory'][variant]:10.2f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rows", type=int, help="instead of the size's own")
    parser.add_argument("--divergence", choices=BETA, default="forward_kl")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--chunk-rows", type=int, default=1024, help="ours only, s2w's default; peers keep theirs")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--repeats", type=int, default=3, help="in one process")
    parser.add_argument("--rounds", type=int, default=2, help="fresh processes of each variant")
    parser.add_argument("--peers-python", metavar="PATH", help="interpreter that has trl and liger-kernel")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.worker:
        (name,) = arguments.sizes
        print(json.dumps(work(arguments.worker, Size(**sized(name, arguments.rows)), arguments)))
        return
    report: dict[str, Any] = {
        "divergence": arguments.divergence,
        "dtype": arguments.dtype,
        "chunk_rows": arguments.chunk_rows,
        "threads": arguments.threads,
        "clock": arguments.clock,
        "torch": torch.__version__,
        "sizes": {},
    }
    for name in arguments.sizes:
        report["sizes"][name] = measure(name, arguments)
        show(name, report["sizes"][name])
    # The headline is the largest size.
    report["ratios"], report["memory"] = (report["sizes"][arguments.sizes[-1]][key] for key in ("ratios", "memory"))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
