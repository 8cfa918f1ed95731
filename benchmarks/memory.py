"""Memory of a learner rank and of vLLM engines, against their limits.

    python benchmarks/memory.py --json memory.json

A learner rank: two students of random weights that differ in their number of layers alone are trained, swapped and
saved by the real learner group. A byte that the larger one has more is the price of a parameter (the slope); what both
have is the process and the named buffers. The limit is 19.5 bytes a parameter in bfloat16 at ZeRO stage 2, where
weights (2), float32 master copy (4), moments (8) and float32 gradients (4) are 18. The swap segment, a copy of the
weights in the engines' dtype that stays from the first swap on, is a named buffer: the slope is given with and without
it. Peaks are of what the rank's process
holds, sampled; what was given back and not yet taken by the kernel (LazyFree) is left out, and shown as "resident".

An engine: the pools' own actors start and answer a few requests. Memory is that of the actor and its engine core
together, where a page that both map counts once (Pss), sampled; the limit is weights + KV cache + 0.8 GB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from s2w.actors.calls import each
from s2w.config.schema import Config, SignalConfig
from s2w.learner.group import LearnerGroup
from s2w.models.checkpoint import ModelReference
from s2w.records import Prompt, Request, Rollout, Scored, TeacherSignal
from s2w.rollout.pool import RolloutPool
from s2w.teacher.pool import TeacherPool
from s2w.teacher.signal import encode
from s2w.testbed.tokenizer import make_tokenizer

LEARNER_LIMIT = 19.5
"""Bytes a parameter, bfloat16 at ZeRO stage 2."""
ENGINE_LIMIT = 0.8e9
"""Bytes beside weights and KV cache."""
PHASES = ("build", "first step", "step", "swap", "step after", "save")
MAX_LEN = 256
"""Tokens of the longest sequence of an engine."""
PROMPT, RESPONSE, SAMPLES = 4, 4, 2
"""Tokens and number of the samples of a step."""


@dataclass(frozen=True)
class Shape:
    """Of a model; tied embeddings."""

    vocab: int
    width: int
    layers: int

    def save(self, path: Path, dtype: str) -> int:
        """Writes a checkpoint of random weights; returns its parameters."""
        tokenizer = make_tokenizer(model_max_length=4096)
        config = Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            num_key_value_heads=max(1, self.width // 128),
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.device("meta"):
            model = Qwen3ForCausalLM(config)
        model = model.to_empty(device="cpu").to(getattr(torch, dtype))
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.fill_(1.0) if parameter.ndim == 1 else parameter.data.normal_(0, 0.02, generator=generator)
        model.tie_weights()
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return sum(parameter.numel() for parameter in model.parameters())


def samples(vocab: int, width: int, dtype: torch.dtype) -> list[Scored]:
    """Random responses with random hidden states of a teacher of ``width``."""
    draw, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    found = []
    for i in range(SAMPLES):
        prompt = Prompt(f"memory/{i}", (), draw.integers(0, vocab, PROMPT, dtype=np.int32), "think", seed=i)
        response = draw.integers(0, vocab, RESPONSE, dtype=np.int32)
        zeros = np.zeros(RESPONSE, np.float32)
        rollout = Rollout(prompt, 0, response, zeros, (), "stop", 0, 0.0, 0.0)
        rows = torch.randn(RESPONSE, width, generator=generator).to(dtype)
        signal = TeacherSignal("hidden", RESPONSE, ray.put(encode("hidden", rows)), 0, 0, 0.0, 0.0, 0)
        found.append(Scored(rollout, signal))
    return found


def processes_below(pid: int) -> set[int]:
    """The process and its descendants."""
    parents = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                parents[int(directory.name)] = int((directory / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:  # it has ended
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def field(pid: int, file: str, name: str) -> int:
    """A kB line of /proc/PID/file, in bytes."""
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/{pid}/{file}")


def peak(pid: int) -> int:
    """Largest resident set since the last call, bytes."""
    seen = field(pid, "status", "VmHWM")
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    return seen


class Sampler:
    """Watches what processes below this one hold, ten times a second.

    A process holds its share of what it maps (Pss: a page that two of the watched map counts once) but for LazyFree:
    pages that were given back and that the kernel takes when it needs memory; the actors' allocator frees that way.
    """

    def __init__(self, name: str) -> None:
        """``name``: of the actors, as their command line begins; their descendants are watched too."""
        self._name, self._done = name, threading.Event()
        self._peak: dict[str, int] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def take(self) -> dict[str, int]:
        """Bytes by process when their sum was largest since the last call."""
        with self._lock:
            found, self._peak = self._peak, {}
        return found

    def _watch(self) -> None:
        pids: set[int] = set()
        looks = 0
        while not self._done.wait(0.1):
            if looks % 10 == 0:
                pids = self._pids()
            looks += 1
            held = {}
            for pid in pids:
                with suppress(OSError, RuntimeError):  # it has ended
                    size = field(pid, "smaps_rollup", "Pss") - field(pid, "smaps_rollup", "LazyFree")
                    held[f"{Path(f'/proc/{pid}/comm').read_text().strip()} {pid}"] = size
            with self._lock:
                if sum(held.values()) > sum(self._peak.values()):
                    self._peak = held

    def _pids(self) -> set[int]:
        found: set[int] = set()
        for pid in processes_below(os.getpid()):
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(self._name.encode()):
                    found |= processes_below(pid)
        return found


def tensors(rank: Any) -> dict[str, int]:
    """Bytes of the tensors in a rank's process, by what they are; runs there."""
    import gc

    engine = rank.engine
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    weights = list(rank.lm.parameters())
    collected = getattr(engine.optimizer, "averaged_gradients", {}).values()
    gradients = [p.grad for p in [*owned, *weights]] + [part for parts in collected for part in parts or ()]
    parts: dict[str, Iterable[Any]] = {
        "weights": weights,
        "gradients": gradients,
        "master": owned,
        "moments": [value for state in optimizer.state.values() for value in state.values()],
        "teacher head": [head.weight for head in rank.teacher_heads.values()],
        "other tensors": [found for found in gc.get_objects() if isinstance(found, torch.Tensor)],
    }
    seen: set[int] = set()
    sizes = {}
    for name, members in parts.items():
        sizes[name] = 0
        for tensor in members:
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                sizes[name] += storage.nbytes()
    return sizes


def watch_optimizer(rank: Any) -> None:
    """Notes :func:`tensors` whenever the optimizer begins a step; runs in the rank's process."""
    optimizer = getattr(rank.engine.optimizer, "optimizer", rank.engine.optimizer)
    rank.seen = {}
    # DeepSpeed steps a group at a time: the first has all the matrices, with their gradients.
    optimizer.register_step_pre_hook(lambda *_: rank.seen.update(tensors(rank)) if not rank.seen else None)


def forget(rank: Any) -> None:
    rank.seen.clear()


def noted(rank: Any) -> dict[str, int]:
    return rank.seen


async def measure_learner(
    config: Config, student: Path, root: Path, vocab: int, width: int, sampler: Sampler
) -> dict[str, Any]:
    """Peaks of the rank's process in each phase, and its tensors when the optimizer begins its second step, bytes."""
    group = await LearnerGroup.start(config, ModelReference(str(student)), "cpu", vocab)
    try:
        (actor,) = group.ranks
        pid = await actor.__ray_call__.remote(lambda rank: os.getpid())
        batch = samples(vocab, width, getattr(torch, config.learner.dtype))
        held, resident = {"build": sum(sampler.take().values())}, {"build": peak(pid)}
        await actor.__ray_call__.remote(watch_optimizer)

        async def step(number: int) -> None:
            await group.step(batch, number)

        async def swap() -> None:
            await group.prepare_weights({0: 1})
            await group.connect_weights()
            await group.send_weights()

        async def save() -> None:
            await group.save(root, 3, {}, keep=1)

        parts: dict[str, int] = {}
        actions: list[Callable[[], Any]] = [lambda: step(0), lambda: step(1), swap, lambda: step(2), save]
        for phase, action in zip(PHASES[1:], actions, strict=True):
            await actor.__ray_call__.remote(forget)
            await action()
            held[phase], resident[phase] = sum(sampler.take().values()), peak(pid)
            if phase == "step":
                parts = await actor.__ray_call__.remote(noted)
        return {"peaks": held, "resident": resident, "tensors": parts, "segment": field(pid, "status", "RssShmem")}
    finally:
        group.shutdown()


def learner(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Two sizes, and the slope between them."""
    teacher = root / "teacher"
    Shape(options.vocab, 2 * options.width, 1).save(teacher, options.dtype)
    runs = []
    for layers in options.layers:
        student = root / f"student{layers}"
        parameters = Shape(options.vocab, options.width, layers).save(student, options.dtype)
        config = Config()
        config.teacher.model, config.run.dir = str(teacher), str(root / "run")
        config.rollout.dtype = config.learner.dtype = options.dtype
        config.learner.zero_stage, config.learner.cpus, config.learner.max_grad_norm = options.stage, 1.0, 1.0
        # Two micro-batches a step.
        config.learner.tokens_per_micro_batch = SAMPLES * (PROMPT + RESPONSE) // 2
        with Sampler("ray::LearnerRank") as sampler:
            run = asyncio.run(
                measure_learner(config, student, root / "checkpoints", options.vocab, 2 * options.width, sampler)
            )
        runs.append({"layers": layers, "parameters": parameters} | run)
    small, large = runs
    more = large["parameters"] - small["parameters"]

    def slopes(of: str) -> dict[str, float]:
        return {name: (value - small[of][name]) / more for name, value in large[of].items()}

    phases, segment = slopes("peaks"), (large["segment"] - small["segment"]) / more
    # The segment is there from the swap on.
    without = {phase: value - segment * (phase in PHASES[3:]) for phase, value in phases.items()}
    return {
        "runs": runs,
        "bytes_per_parameter": phases,
        "resident_per_parameter": slopes("resident"),
        "tensors_per_parameter": slopes("tensors"),
        "segment_per_parameter": segment,
        "slope": max(without.values()),
        "limit": LEARNER_LIMIT,
    }


async def measure_teacher(config: Config, path: Path, dtype: str, vocab: int) -> None:
    config.teacher.model = str(path)
    pool = TeacherPool(
        config.teacher, SignalConfig(), 1.0, device="cpu", dtype=dtype, max_model_len=MAX_LEN, vocab_size=vocab
    )
    try:
        await pool.start(600)
        draw = np.random.default_rng(0)
        rollouts = []
        for i in range(8):
            prompt = Prompt(f"memory/{i}", (), draw.integers(0, vocab, 64, dtype=np.int32), "think", seed=i)
            response = draw.integers(0, vocab, 64, dtype=np.int32)
            rollouts.append(Rollout(prompt, 0, response, np.zeros(64, np.float32), (), "stop", 0, 0.0, 0.0))
        await asyncio.gather(*map(pool.score, rollouts))
    finally:
        await pool.shutdown()


async def measure_rollout(config: Config, path: Path, dtype: str, vocab: int) -> None:
    config.rollout.max_tokens = 64
    pool = RolloutPool(
        config.rollout,
        model=ModelReference(str(path)),
        device="cpu",
        dtype=dtype,
        max_model_len=MAX_LEN,
        vocab_size=vocab,
        candidates=0,
        stop_token_ids=(),
    )
    try:
        await pool.start(0, 600)
        draw = np.random.default_rng(0)
        prompts = [
            Prompt(f"memory/{i}", (), draw.integers(5, 20, 64, dtype=np.int32), "think", seed=i) for i in range(8)
        ]
        await each([Request(prompt, sample) for prompt in prompts for sample in range(4)], pool.generate)
    finally:
        await pool.shutdown()


ENGINES = {"teacher": ("ray::TeacherEngine", measure_teacher), "rollout": ("ray::RolloutEngine", measure_rollout)}


def engine(kind: str, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    path = root / kind
    parameters = Shape(options.vocab, options.width, options.layers[-1]).save(path, options.dtype)
    config = Config()
    config.teacher.enforce_eager = config.rollout.enforce_eager = options.eager
    name, measure = ENGINES[kind]
    weights = parameters * getattr(torch, options.dtype).itemsize
    cache = (config.teacher if kind == "teacher" else config.rollout).kv_cache_gib * 2**30
    began = time.perf_counter()
    with Sampler(name) as sampler:
        asyncio.run(measure(config, path, options.dtype, options.vocab))
        processes = sampler.take()
    peak = sum(processes.values())
    return {
        "parameters": parameters,
        "weights": weights,
        "kv_cache": cache,
        "peak": peak,
        "processes": processes,
        "beside": peak - weights - cache,
        "limit": ENGINE_LIMIT,
        "seconds": time.perf_counter() - began,
    }


def show_learner(report: dict[str, Any]) -> None:
    small, large = report["runs"]
    names = [f"{run['parameters'] / 1e6:.1f}M" for run in (small, large)]
    print(f"\n{'learner rank':26}{names[0] + ' MB':>12}{names[1] + ' MB':>12}{'bytes a parameter':>20}")
    for name, value in report["tensors_per_parameter"].items():
        print(f"{name:26}{small['tensors'][name] / 1e6:12.0f}{large['tensors'][name] / 1e6:12.0f}{value:20.2f}")
    sizes = [run["segment"] / 1e6 for run in (small, large)]
    print(f"{'swap segment':26}{sizes[0]:12.0f}{sizes[1]:12.0f}{report['segment_per_parameter']:20.2f}")
    for phase, value in report["bytes_per_parameter"].items():
        sizes = [run["peaks"][phase] / 1e6 for run in (small, large)]
        print(f"{'peak, ' + phase:26}{sizes[0]:12.0f}{sizes[1]:12.0f}{value:20.2f}")
    print(f"{'resident, largest':62}{max(report['resident_per_parameter'].values()):.2f}")
    print(f"largest without the segment: {report['slope']:.2f} bytes a parameter (limit {report['limit']})")


def show_engine(kind: str, report: dict[str, Any]) -> None:
    print(f"\n{kind} engine: peak {report['peak'] / 1e9:.2f} GB, {report['weights'] / 1e9:.2f} of it weights, ", end="")
    print(
        f"{report['kv_cache'] / 1e9:.2f} KV cache: {report['beside'] / 1e9:.2f} beside (limit {report['limit'] / 1e9})"
    )
    for name, size in sorted(report["processes"].items()):
        print(f"  {name:32}{size / 1e6:8.0f} MB")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["learner", *ENGINES], default=["learner", *ENGINES])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--stage", type=int, choices=range(4), default=2, help="of ZeRO")
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=512, help="of the student; the teacher's is twice that")
    parser.add_argument("--layers", type=int, nargs=2, default=[4, 24], help="of the two students")
    parser.add_argument("--eager", action="store_true", help="engines without torch.compile")
    parser.add_argument("--json", metavar="FILE", type=Path)
    return parser


def main() -> None:
    options = parser().parse_args()
    report: dict[str, Any] = {"settings": {k: v for k, v in vars(options).items() if k != "json"}}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as root:
            for part in options.parts:
                if part == "learner":
                    report[part] = learner(options, Path(root))
                    show_learner(report[part])
                else:
                    report[part] = engine(part, options, Path(root))
                    show_engine(part, report[part])
    finally:
        ray.shutdown()
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
