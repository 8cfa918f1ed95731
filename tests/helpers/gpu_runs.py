"""Runs of `s2w train` on GPUs: checkpoints of published shapes with random weights, and what each actor takes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from tiny_models import ADDED_TOKENS, CHAT_TEMPLATE, SPECIAL_TOKENS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from s2w.models.shapes import PUBLISHED

QWEN3_TOKENS = 151_669
"""Ids of Qwen3's tokenizer; its heads have 151,936 rows."""
ACTORS = {"teacher": "ray::TeacherEngine", "rollout": "ray::RolloutEngine", "learner": "ray::LearnerRank"}
"""Processes by their titles, which Ray sets."""


def make_published(path: Path, name: str) -> Path:
    """A bfloat16 checkpoint with the configuration of a published model, random weights, and a byte-level tokenizer of
    Qwen3's size; made on the GPU.

    The weights are three times as wide as transformers makes them: its own give a distribution that is nearly uniform.
    """
    config = AutoConfig.for_model(**json.loads(PUBLISHED.read_text())[name], initializer_range=0.06)
    tokenizer = _tokenizer()
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    del model
    torch.cuda.empty_cache()
    return path


def _tokenizer() -> PreTrainedTokenizerFast:
    plain = QWEN3_TOKENS - len(SPECIAL_TOKENS) - len(ADDED_TOKENS)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"Ġw{number}" for number in range(plain - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens(list(ADDED_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def _asked(what: str, columns: str) -> list[list[int]]:
    """Rows of numbers that nvidia-smi tells; memory is in MiB."""
    command = ["nvidia-smi", f"--query-{what}={columns}", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [[int(value) for value in line.split(",")] for line in lines if "N/A" not in line]


class GpuSampler:
    """Watches what the actors below this process hold on the GPUs, as nvidia-smi tells."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._actors: dict[int, str | None] = {}
        self.whole = 0
        """MiB that all processes hold, at the most."""
        self.peaks: dict[str, int] = {}
        """Bytes by actor, with its children, at the most."""

    def __enter__(self) -> GpuSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            held: dict[str, int] = {}
            self.whole = max(self.whole, sum(used for [used] in _asked("gpu", "memory.used")))
            for pid, used in _asked("compute-apps", "pid,used_memory"):
                if (actor := self._actor(pid)) is not None:
                    held[actor] = held.get(actor, 0) + used * 2**20
            for actor, size in held.items():
                self.peaks[actor] = max(size, self.peaks.get(actor, 0))

    def _actor(self, pid: int) -> str | None:
        if pid not in self._actors:
            found = None
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                for one in (process, *process.parents()):
                    title = " ".join(one.cmdline())
                    found = found or next((name for name, begin in ACTORS.items() if title.startswith(begin)), None)
            self._actors[pid] = found
        return self._actors[pid]


@dataclass(frozen=True)
class GpuRun:
    """A run that has ended well."""

    lines: list[dict[str, Any]]
    """metrics.jsonl."""
    summary: dict[str, Any]
    gpu_bytes: dict[str, int]
    """By actor, at the most."""
    all_bytes: int
    """Of everything on the GPUs, at the most."""


def train(directory: Path, *overrides: str) -> GpuRun:
    """`s2w train` in a process of its own, on a Ray cluster of its own."""
    command = [sys.executable, "-m", "s2w.cli", "train", *overrides, f"run.dir={directory}", "cluster.device=cuda"]
    with GpuSampler() as sampler:
        subprocess.run(command, check=True)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return GpuRun(lines, json.loads((directory / "summary.json").read_text()), sampler.peaks, sampler.whole * 2**20)


def check_swaps(run: GpuRun, what: str) -> None:
    """Each of four swaps reached every engine: the probes agree within what two programs differ by in bfloat16."""
    errors = [line["probe_error"] for line in run.lines]
    print(f"{what}: probe errors {errors}, swaps of {[line['swap_ms'] for line in run.lines]} ms")
    assert len(errors) == 4 and all(error < 0.25 for error in errors), errors
