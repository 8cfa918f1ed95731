"""A character tokenizer with Qwen3's markers and chat template.

Digits, operators and white space are one token each; so are Qwen3's markers and the role names, to keep prompts short.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")
"""Added but, as in Qwen3, not special: decoding keeps them."""
ROLES = ("system", "user", "assistant")
CHARACTERS = "\n +=0123456789"
WORDS = (*ROLES, "\n\n", *CHARACTERS)

# Qwen3's template without its tools: earlier turns lose their thoughts, and `enable_thinking=False` opens the answer
# with an empty think block.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""


def make_tokenizer(model_max_length: int = 256) -> PreTrainedTokenizerFast:
    """The tokenizer: ``eos`` is ``<|im_end|>``, ``pad`` is ``<|endoftext|>``.

    It has no unknown token: encoding any other character raises an ``Exception`` of the tokenizers library.
    """
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *THINK_TOKENS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    words = "|".join((*ROLES, r"\n\n", r"[\s\S]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens(list(THINK_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )
