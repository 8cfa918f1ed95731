"""What the mask of a padded vocabulary costs: an engine's logits with it and without, in one engine.

    python benchmarks/vocabulary_mask.py --json vocabulary_mask.json

A vLLM engine runs in this process, on a model of random weights whose head is padded like Qwen3's (151,669 ids in
151,936 rows). Every computation of logits is timed; from one step to the next the mask is on and off in turn, so both
see the same load. The limit is the engine's own computation, without the mask. On CPU only: on a GPU the clock would
have to wait for it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from s2w.actors.hardware import resolve_dtype
from s2w.actors.vllm import prepare_process
from s2w.actors.vocabulary_mask import engine_option

IDS, ROWS = 151_669, 151_936
PROMPT = 8
"""Tokens of a prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="requests that run at once")
    parser.add_argument("--tokens", type=int, default=40, help="of each response")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # The engine core in this process, where it can be timed.
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    engine_options = prepare_process("cpu", 1, None, 1)
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory), options.width)
        results = measure(directory, resolve_dtype("auto", "cpu"), options, engine_options)
    for result in results:
        print(
            f"batch {result['batch']}: logits {result['plain_ms']:.3f} ms, masked {result['masked_ms']:.3f} ms, ratio "
            f"{result['masked_ms'] / result['plain_ms']:.4f}; a step {result['step_ms']:.2f} ms"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def make_model(directory: Path, width: int) -> None:
    """Two layers and a padded head, tied, with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=ROWS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.bfloat16()
    model.save_pretrained(directory)


def measure(
    model: str, dtype: str, options: argparse.Namespace, engine_options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Median milliseconds of the logits with and without the mask, and of a whole step, by batch."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    llm = LLM(
        model=model,
        dtype=dtype,  # type: ignore[arg-type]  # a Literal of vLLM's
        max_model_len=PROMPT + options.tokens,
        max_num_seqs=max(options.batch),
        skip_tokenizer_init=True,
        additional_config=engine_option(IDS),
        **engine_options,
    )
    masked, seconds, began = LogitsProcessor.forward, {True: [], False: []}, []  # type: ignore[var-annotated]

    def timed(self: Any, *arguments: Any, **keywords: Any) -> Any:
        on = len(began) % 2 == 0
        self.s2w_vocab_size = IDS if on else None
        began.append(time.perf_counter())
        logits = masked(self, *arguments, **keywords)
        seconds[on].append(time.perf_counter() - began[-1])
        return logits

    LogitsProcessor.forward = timed  # type: ignore[method-assign]
    results = []
    for batch in options.batch:
        for values in (*seconds.values(), began):
            values.clear()
        prompts = [{"prompt_token_ids": [i + 1] * PROMPT} for i in range(batch)]
        parameters = SamplingParams(max_tokens=options.tokens, ignore_eos=True, detokenize=False)
        llm.generate(prompts, parameters, use_tqdm=False)  # type: ignore[arg-type]
        # The first two steps are the prefill and the first use of the batch's shapes.
        steps = [after - before for before, after in pairwise(began[2:])]
        results.append(
            {
                "batch": batch,
                "masked_ms": median(seconds[True][1:]) * 1e3,
                "plain_ms": median(seconds[False][1:]) * 1e3,
                "step_ms": median(steps) * 1e3,
            }
        )
    return results


if __name__ == "__main__":
    main()
