"""Bytes a second of teacher signals, from a teacher actor to a learner rank, against a plain copy of the same bytes.

Two Ray actors on this machine: one encodes and puts payloads as a teacher engine does, the other takes them as a
learner rank does (`SignalStream`), micro-batch by micro-batch: hidden rows are read where they are, other signals are
joined. The driver stands where the controller does: only records with references pass through it, and their size is
reported. The hops are timed one after the other, so that each has the machine to itself, and together, the rank
fetching while the teacher still puts.

With `--model` the rows are a checkpoint's real ones, and the KL from the distribution of its own float32 rows to that
of the rows that arrive is measured for each dtype, through its own head.

    python benchmarks/wire.py --json wire.json
    python benchmarks/wire.py --model ~/.cache/s2w/SmolLM2-135M-Instruct --prompt 'Text to read.'
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2w.learner.signal_fetch import SignalStream, joined
from s2w.models.head import Head, load_head
from s2w.objectives.divergences import make_divergence
from s2w.objectives.kernel import HiddenRows, divergence_values
from s2w.records import Prompt, Rollout, Scored, SignalKind, TeacherSignal
from s2w.teacher.signal import HiddenDtype, bytes_per_row, check_finite, decode, encode, hidden_rows, nbytes

WIRES: tuple[tuple[str, SignalKind, torch.dtype, HiddenDtype], ...] = (
    ("hidden, float32", "hidden", torch.float32, "auto"),
    ("hidden, bfloat16", "hidden", torch.bfloat16, "auto"),
    ("hidden, float8", "hidden", torch.bfloat16, "float8"),
    ("topk, k=64", "topk", torch.int32, "auto"),
)
"""Name, kind, dtype at the teacher, dtype of the wire."""
TOP_K = 64
PAGE = 4096
"""Bytes of a page of memory."""
FREED = 1.5
"""Seconds after which Ray has freed the objects that are no longer needed: it does so once a second. Until then a
round would be put into memory that nobody has touched, or push the one before it out to disk."""


class Teacher:
    """What of a teacher engine comes after the model: pooled rows to signals."""

    def make(self, kind: SignalKind, rows: int, width: int, dtype: torch.dtype, samples: int) -> None:
        """Draws the rows of ``samples`` responses, as the pooler would leave them."""
        generator = torch.Generator().manual_seed(0)
        if kind == "hidden":
            self.rows = [torch.randn(rows, width, generator=generator).to(dtype) for _ in range(samples)]
        else:
            ids = torch.randint(0, 100_000, (rows, TOP_K), generator=generator, dtype=torch.int32)
            values = torch.randn(rows, TOP_K + 1, generator=generator) - 5
            self.rows = [torch.cat([ids, values.view(torch.int32)], -1) for _ in range(samples)]

    def put(self, kind: SignalKind, wire: HiddenDtype, index: int) -> TeacherSignal:
        """One response's signal, in the object store."""
        started, began = time.time(), time.perf_counter()
        payload = encode(kind, self.rows[index], dtype=wire)
        if kind != "hidden":
            check_finite(payload, str(index))
        reference = ray.put(payload)
        seconds = time.perf_counter() - began
        rows, size = len(self.rows[index]), nbytes(payload)
        return TeacherSignal(kind, rows, reference, size, 0, started, time.time(), 0, put_seconds=seconds)


class Rank:
    """What of a learner rank comes before the model."""

    def take(self, kind: SignalKind, micro_batches: Sequence[Sequence[Scored]]) -> int:
        """Bytes."""
        stream = SignalStream(micro_batches)
        for fetched in stream:
            assert fetched is not None and fetched.error is None
            if kind != "hidden":
                joined(fetched.parts)
                continue
            for part in fetched.parts:
                for tensor in part.values():
                    # Maps every page: the matrix product that reads the rest is the learner's work.
                    tensor.view(torch.uint8).flatten()[::PAGE].max()
        return stream.nbytes

    def copy(self, size: int, repeats: int) -> float:
        """Seconds to copy ``size`` bytes once, from memory to memory that is mapped already: the median."""
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            np.copyto(target, source)
            times.append(time.perf_counter() - began)
        return statistics.median(times)


def scored(index: int, rows: int, signal: TeacherSignal) -> Scored:
    prompt = Prompt(str(index), (), np.zeros(1, np.int32), "think", 0)
    ids, log_probs = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
    return Scored(Rollout(prompt, 0, ids, log_probs, (), "stop", 0, 0.0, 0.0), signal)


def measure(
    teacher: Any, rank: Any, wire: tuple[str, SignalKind, torch.dtype, HiddenDtype], options: Any
) -> dict[str, Any]:
    """Medians over the repeats; the first two, which map the store's memory, are not counted."""
    name, kind, dtype, wire_dtype = wire
    ray.get(teacher.make.remote(kind, options.rows, options.width, dtype, options.samples))

    def grouped(signals: list[TeacherSignal]) -> list[list[Scored]]:
        samples = [scored(i, options.rows, signal) for i, signal in enumerate(signals)]
        return [samples[i : i + options.micro_batch] for i in range(0, len(samples), options.micro_batch)]

    times: dict[str, list[float]] = {"put": [], "fetch": [], "together": []}
    size = 0
    for _ in range(options.repeats + 2):
        time.sleep(FREED)
        began = time.perf_counter()
        signals = ray.get([teacher.put.remote(kind, wire_dtype, i) for i in range(options.samples)])
        put = time.perf_counter()
        size = ray.get(rank.take.remote(kind, grouped(signals)))
        times["put"].append(put - began)
        times["fetch"].append(time.perf_counter() - put)
        del signals
        time.sleep(FREED)

        began = time.perf_counter()
        puts = [teacher.put.remote(kind, wire_dtype, i) for i in range(options.samples)]
        takes = []
        for start in range(0, options.samples, options.micro_batch):
            [batch] = grouped(ray.get(puts[start : start + options.micro_batch]))
            takes.append(rank.take.remote(kind, [batch]))
        ray.get(takes)
        times["together"].append(time.perf_counter() - began)
        del puts, batch
    seconds = {hop: statistics.median(values[2:]) for hop, values in times.items()}
    # The last thing, and once: Ray keeps the object of a reference that is pickled outside of a call.
    record = len(ray.cloudpickle.dumps(ray.get(teacher.put.remote(kind, wire_dtype, 0))))
    copy = ray.get(rank.copy.remote(size, options.repeats))
    return {
        "wire": name,
        "bytes_per_token": size / (options.rows * options.samples),
        "bytes": size,
        "seconds": seconds,
        "copy_seconds": copy,
        "mb_per_s": {hop: size / value / 1e6 for hop, value in seconds.items()},
        "copy_mb_per_s": size / copy / 1e6,
        "ratio": copy / seconds["together"],
        "controller_bytes_per_token": record / options.rows,
    }


@torch.no_grad()
def kl_errors(model: str, prompt: str) -> list[dict[str, Any]]:
    """KL from a checkpoint's own distribution to that of its rows after the wire, mean and largest over the tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    rows = lm.base_model(ids).last_hidden_state[0]
    file = load_head(model)
    bias = None if file.bias is None else file.bias.float()
    head = Head(file.weight.float(), bias, file.softcap, file.scale)
    results = []
    for dtype in ("bfloat16", "float8"):
        payload = encode("hidden", rows, dtype=cast(HiddenDtype, dtype))
        arrived = hidden_rows(decode(payload), torch.float32)
        kl = divergence_values(
            arrived, head, HiddenRows(rows, head), [("kl", make_divergence("forward_kl"))], vocab_size=len(head.weight)
        )["kl"]
        size = bytes_per_row("hidden", hidden_size=rows.shape[1], dtype=payload["dtype"])
        results.append(
            {
                "dtype": dtype,
                "bytes_per_token": size,
                "tokens": len(kl),
                "mean_kl": kl.double().mean().item(),
                "largest_kl": kl.max().item(),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096, help="of the teacher's hidden rows (Qwen3-235B-A22B: 4096)")
    parser.add_argument("--rows", type=int, default=2048, help="response tokens of a sample")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=2, help="samples of a micro-batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", help="a checkpoint whose rows' KL error is measured")
    parser.add_argument("--prompt", default="", help="the text that it reads; default: this program's own source")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()

    store = 2 * options.samples * options.rows * options.width * 4
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=max(store, 2**28))
    remote: Any = ray.remote
    # A teacher engine's event loop leaves this to threads.
    teacher = remote(Teacher).options(num_cpus=1, max_concurrency=4).remote()
    rank = remote(Rank).options(num_cpus=1).remote()
    print(
        f"{'signal':<18}{'bytes/token':>12}{'put MB/s':>10}{'fetch':>8}{'both':>8}{'copy':>8}{'both/copy':>11}"
        f"{'controller B/token':>20}"
    )
    results = []
    for wire in WIRES:
        result = measure(teacher, rank, wire, options)
        results.append(result)
        speed = result["mb_per_s"]
        print(
            f"{result['wire']:<18}{result['bytes_per_token']:>12.0f}{speed['put']:>10.0f}{speed['fetch']:>8.0f}"
            f"{speed['together']:>8.0f}{result['copy_mb_per_s']:>8.0f}{result['ratio']:>11.2f}"
            f"{result['controller_bytes_per_token']:>20.2f}",
            flush=True,
        )
    ray.shutdown()
    errors = (
        kl_errors(str(Path(options.model).expanduser()), options.prompt or Path(__file__).read_text())
        if options.model
        else []
    )
    for error in errors:
        print(
            f"hidden rows in {error['dtype']}, {error['bytes_per_token']} bytes/token: KL {error['mean_kl']:.1e} "
            f"nats on average, {error['largest_kl']:.1e} at most, over {error['tokens']} tokens"
        )
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({"settings": settings, "results": results, "kl": errors}, indent=2) + "\n")


if __name__ == "__main__":
    main()
