"""Rows a second, bytes a row and memory of each teacher signal, against vLLM's ``prompt_logprobs``.

Each variant scores the same rollouts in an engine of its own, in a process of its own, one after the other. The
prefix cache is off, so that every pass does the same work. Memory is the growth of the engine's peak (Linux
VmHWM) over its peak after start-up; ``prompt_logprobs`` rows of the prompt are computed by it but not counted.

    python benchmarks/teacher.py --json teacher.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

VARIANTS = ("hidden", "topk", "ids", "sampled", "prompt_logprobs")


def make_model(path: Path) -> None:
    """Random weights, SmolLM2-135M's width and vocabulary, 8 of its 30 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def engine_memory_mib() -> float:
    """Peak resident memory of the processes below this one."""
    parents = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                status = dict(line.split(":", 1) for line in (directory / "status").read_text().splitlines())
            except OSError:  # it has ended
                continue
            parents[int(directory.name)] = (int(status["PPid"]), int(status.get("VmHWM", "0 kB").split()[0]))
    mine = {os.getpid()}
    while more := {pid for pid, (parent, _) in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(parents[pid][1] for pid in mine - {os.getpid()}) / 1024


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs one variant in this process."""
    from s2w.actors.hardware import resolve_dtype
    from s2w.actors.vllm import prepare_process

    prepare_process(options.device, 1, None, 1)
    from vllm import AsyncEngineArgs, PoolingParams, SamplingParams
    from vllm.config import PoolerConfig
    from vllm.logprobs import FlatLogprobs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    from s2w.teacher.scoring import as_teacher
    from s2w.teacher.signal import encode, nbytes

    scores = options.variant != "prompt_logprobs"
    length, rows = options.prompt + options.response, options.rollouts * options.response
    pooling: dict[str, Any] = {
        "runner": "pooling",
        "pooler_config": PoolerConfig(task="token_embed"),
        "hf_overrides": as_teacher,
    }
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=options.model,
            dtype=resolve_dtype(options.dtype, options.device),  # type: ignore[arg-type]
            max_model_len=length + 1,
            max_num_batched_tokens=options.batched_tokens,
            max_num_seqs=64,
            max_logprobs=options.top_k,
            enable_chunked_prefill=True,
            enable_prefix_caching=False,
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            **(pooling if scores else {}),
        )
    )
    generator = np.random.default_rng(0)
    vocab = llm.model_config.get_vocab_size()
    inputs = generator.integers(0, vocab, (options.rollouts, length))
    width = 1 if options.variant == "sampled" else options.top_k
    ids = generator.integers(0, vocab, (options.response, width), dtype=np.int32)

    async def teacher(request: str, tokens: list[int]) -> int:
        """Payload bytes of one rollout."""
        wanted = {"kind": options.variant, "start": options.prompt - 1, "top_k": width, "temperature": 1.0}
        if options.variant in ("ids", "sampled"):
            wanted["ids"] = ids.tobytes()
        parameters = PoolingParams(task="token_embed", extra_kwargs=wanted)
        [output] = [o async for o in llm.encode({"prompt_token_ids": tokens[:-1]}, parameters, request)]
        return nbytes(encode(options.variant, output.outputs.data, ids))

    async def prompt_logprobs(request: str, tokens: list[int]) -> int:
        parameters = SamplingParams(
            prompt_logprobs=options.top_k,
            flat_logprobs=True,
            detokenize=False,
            max_tokens=1,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        [output] = [o async for o in llm.generate({"prompt_token_ids": tokens}, parameters, request)]
        flat = output.prompt_logprobs
        assert isinstance(flat, FlatLogprobs)
        # 8 bytes (id, log-prob) an entry: the token itself and the k most likely ones.
        return 8 * (flat.end_indices[-1] - flat.start_indices[-options.response])

    before = engine_memory_mib()
    seconds, size = [], 0
    for repeat in range(options.repeats + 1):
        start = time.perf_counter()
        score = teacher if scores else prompt_logprobs
        calls = [score(f"{repeat}-{i}", tokens.tolist()) for i, tokens in enumerate(inputs)]
        size = sum(await asyncio.gather(*calls))
        seconds.append(time.perf_counter() - start)
    after = engine_memory_mib()
    llm.shutdown()
    return {
        "variant": options.variant,
        "rows": rows,
        "seconds": seconds[1:],  # the first pass compiles kernels
        "rows_per_s": rows / min(seconds[1:]),
        "tokens_per_s": options.rollouts * length / min(seconds[1:]),
        "bytes_per_row": size // rows,
        "memory_growth_mib": after - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or path; default: random weights, width 576, 8 layers, V = 49,152")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens of a rollout")
    parser.add_argument("--response", type=int, default=256, help="response tokens of a rollout")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--batched-tokens", type=int, default=1024, help="tokens of one prefill chunk")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes; the fastest counts")
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one only, in this process; print JSON")
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(asyncio.run(measure(options))))
        return

    results = []
    with tempfile.TemporaryDirectory() as directory:
        if not options.model:
            make_model(Path(directory))
        arguments = [f"--model={options.model or directory}"]
        for name in ("device", "dtype", "rollouts", "prompt", "response", "top_k", "batched_tokens", "repeats"):
            arguments.append(f"--{name.replace('_', '-')}={getattr(options, name)}")
        print(f"{'signal':>16} {'rows/s':>8} {'tokens/s':>9} {'bytes/row':>10} {'memory +MiB':>12}")
        environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        for variant in VARIANTS:
            command = [sys.executable, __file__, *arguments, f"--variant={variant}"]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            result = json.loads(child.stdout.splitlines()[-1])
            results.append(result)
            print(
                f"{variant:>16} {result['rows_per_s']:8.0f} {result['tokens_per_s']:9.0f} "
                f"{result['bytes_per_row']:10d} {result['memory_growth_mib']:12.0f}",
                flush=True,
            )
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "variant")}
        options.json.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
