"""The testbed's teacher: a Qwen3-MoE of 1M parameters, trained on gold responses.

``python -m s2w.testbed.teacher DIR`` trains it, in about twelve CPU minutes, and writes a bfloat16 Hugging Face
checkpoint with its tokenizer. On held-out problems, sampled at temperature 1, it has a pass@1 of 0.955 in think mode
(400 problems) and 0.30 in no_think mode, where its pass@16 is 0.965 (200 problems).
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from s2w.records import Mode
from s2w.testbed import task
from s2w.testbed.tokenizer import make_tokenizer

STEPS = 700
WARMUP_STEPS = 50
LEARNING_RATE = 3e-3
MIN_LR_RATIO = 0.02
BATCH: dict[Mode, int] = {"think": 64, "no_think": 128}
"""Responses of one step; those of ``no_think`` are short, so they cost less."""
NO_THINK_WEIGHT = 0.3
"""Weight of the mean loss of ``no_think`` tokens, next to 1 for ``think``."""
IGNORED = -100
"""Label of tokens without a loss, in transformers."""


def teacher_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    """Sizes that vLLM can run on CPU with two tensor-parallel workers, whole experts or halves of each."""
    return Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim is in Qwen3's files, not among the class's fields
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        intermediate_size=256,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def encode(tokenizer: PreTrainedTokenizerFast, problem: task.Problem, mode: Mode) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the gold response, end-of-sequence token included."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.question}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=mode == "think",
    )
    ids, response = tokenizer([str(prompt), problem.response(mode)])["input_ids"]
    return ids, [*response, tokenizer.eos_token_id]


def collate(samples: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-padded ``input_ids``, ``attention_mask``, ``labels`` (int64, [samples, longest]) of (prompt, response)."""
    sequences = [torch.tensor(prompt + response) for prompt, response in samples]
    labels = [torch.tensor([IGNORED] * len(prompt) + response) for prompt, response in samples]
    return {
        "input_ids": pad_sequence(sequences, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to ``MIN_LR_RATIO``."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return LEARNING_RATE * warmup * (MIN_LR_RATIO + (1 - MIN_LR_RATIO) * cosine)


def train(tokenizer: PreTrainedTokenizerFast, steps: int = STEPS, seed: int = 0) -> Qwen3MoeForCausalLM:
    """Trains the teacher in float32 on fresh problems of the train split; prints the losses every 20 steps.

    A loss is the mean over response tokens, in nats, plus the router's balance loss, 0.02 when experts share equally.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = Qwen3MoeForCausalLM(teacher_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        losses: dict[Mode, torch.Tensor] = {}
        for mode, count in BATCH.items():
            samples = [encode(tokenizer, task.draw(rng, "train"), mode) for _ in range(count)]
            losses[mode] = model(**collate(samples, tokenizer.pad_token_id), output_router_logits=True).loss
            (losses[mode] * (NO_THINK_WEIGHT if mode == "no_think" else 1.0)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            shown = ", ".join(f"{mode} {loss.item():.4f}" for mode, loss in losses.items())
            print(f"step {step + 1}/{steps}: loss {shown}", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m s2w.testbed.teacher", description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    tokenizer = make_tokenizer()
    train(tokenizer).bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()
