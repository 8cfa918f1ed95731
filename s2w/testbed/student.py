"""The testbed's student: a dense Qwen3 of 0.1M parameters, to be initialised at random (``student.init=fresh``).

``python -m s2w.testbed.student DIR`` writes its configuration and tokenizer, no weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import PreTrainedTokenizerFast, Qwen3Config

from s2w.testbed.tokenizer import make_tokenizer


def student_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Half the teacher's width and depth; the head size is the smallest that vLLM's attention has on CPU."""
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=160,
        tie_word_embeddings=True,
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m s2w.testbed.student", description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    tokenizer = make_tokenizer()
    student_config(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()
