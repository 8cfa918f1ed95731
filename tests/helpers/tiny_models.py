"""Tiny random Qwen3 checkpoints with a tokenizer, made in code: no downloads.

Token ids 0 to 505 are byte-level BPE, 506 to 511 are the added tokens, so every id of the model's vocabulary decodes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

Kind = Literal["tied", "untied", "moe"]
KINDS: tuple[Kind, ...] = ("tied", "untied", "moe")

VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED_TOKENS = ("<think>", "</think>", "<|reserved|>")
"""Added but, as in Qwen3, not special: decoding keeps them."""

# Qwen3's template for plain messages: `enable_thinking=False` opens the answer with an empty think block.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

DENSE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "max_position_embeddings": 4096,
    "initializer_range": 0.12,
}
# 48 is no multiple of 32, at one worker or at two (24 each): vLLM pads such experts.
MOE: dict[str, Any] = {
    "moe_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 entries with ``eos`` ``<|im_end|>``, ``pad`` ``<|endoftext|>`` and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(ADDED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = (f"What is {i} plus {i * i % 1000}? The answer is {i + i * i % 1000}.\n" for i in range(1000))
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens(list(ADDED_TOKENS))
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise AssertionError(f"the tokenizer has {tokenizer.get_vocab_size()} entries, not {VOCAB_SIZE}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=DENSE["max_position_embeddings"],
    )


def make_model(kind: Kind, seed: int, **overrides: Any) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    """A float32 model with random weights; ``overrides`` are fields of its configuration.

    Norm weights are drawn too (uniform in 0.7 to 1.3), so that a norm which is not updated shows.
    """
    tokens = {"eos_token_id": VOCAB_SIZE - 4, "pad_token_id": VOCAB_SIZE - 6, "bos_token_id": None}
    fields = {**DENSE, "tie_word_embeddings": kind == "tied", **tokens}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Qwen3ForCausalLM | Qwen3MoeForCausalLM
        if kind == "moe":
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**fields, **MOE, **overrides}))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**{**fields, **overrides}))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.uniform_(0.7, 1.3)
    return model.eval()


@torch.no_grad()
def prefer(model: Qwen3ForCausalLM | Qwen3MoeForCausalLM, likely: Mapping[int, float]) -> None:
    """Sets the logits of some tokens of an untied model to about so many nats, whatever stands before them.

    Qwen3's head has no bias: the first component of every embedding becomes 2, and the head's rows of those tokens take
    from it what a bias would give. The other tokens' logits are as random as they were, with a log sum of about 7.
    """
    model.model.embed_tokens.weight[:, 0] = 2.0
    component = model.model(torch.arange(VOCAB_SIZE)[None]).last_hidden_state[0, :, 0].mean()
    model.lm_head.weight[:, 0] = 0.0
    for token, nats in likely.items():
        model.lm_head.weight[token] = 0.0
        model.lm_head.weight[token, 0] = nats / component


def make_checkpoint(
    path: str | Path,
    kind: Kind,
    seed: int,
    dtype: str = "float32",
    likely: Mapping[int, float] | None = None,
    **overrides: Any,
) -> Path:
    """Writes model, configuration, generation configuration and tokenizer to ``path``; returns ``path``.

    Args:
        kind: ``tied`` (dense, ``lm_head`` is the embedding), ``untied`` (dense) or ``moe`` (untied, 8 experts).
        seed: of the weights; the tokenizer is always the same.
        dtype: of the weights in the file.
        likely: see :func:`prefer`.
        overrides: fields of the model's configuration, such as ``num_hidden_layers=4``, or ``vocab_size=576`` for a
            head that is padded past the tokenizer, with rows as likely as the others.
    """
    path = Path(path)
    model = make_model(kind, seed, **overrides)
    if likely is not None:
        prefer(model, likely)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def add_to_hub_cache(cache: Path, repository: str, checkpoint: Path) -> None:
    """Puts a checkpoint into a hub cache (``HF_HUB_CACHE``), as a download of ``repository`` would."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(checkpoint, folder / "snapshots" / commit)
