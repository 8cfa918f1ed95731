"""Output heads, from hidden states to logits: a loaded model's, and one read on its own from a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from s2w.models.logits import LOG_ZERO, float32_product, statistics_dtype

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Suffixes of tensor names: models differ in what they put before them.
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


@dataclass(frozen=True)
class Head:
    """An output embedding: ``logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``."""

    weight: Tensor
    """[V, d]; V may include padding. ``hidden`` is taken after the final norm."""
    bias: Tensor | None = None
    """[V]; -inf masks a token."""
    softcap: float | None = None
    """``final_logit_softcapping`` of Gemma 2; None is no cap."""
    scale: float = 1.0
    """``logit_scale`` of Cohere, ``1 / logits_scaling`` of Granite."""

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [N, V] (float64 for float64 input), from float32 products, padding included; without gradient."""
        return self.cut(len(self.weight)).finish(float32_product(hidden, self.weight))[0]

    def cut(self, vocab_size: int) -> Head:
        """The first ``vocab_size`` tokens; log-probs that the bias sets to -inf become ``LOG_ZERO``."""
        bias = None if self.bias is None else self.bias[:vocab_size].clamp_min(LOG_ZERO)
        return Head(self.weight[:vocab_size], bias, self.softcap, self.scale)

    def finish(self, product: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """From ``hidden @ weight.T`` to logits / temperature, and the tanh of the softcap if there is one.

        The logits may be ``product`` itself.
        """
        logits = product.to(statistics_dtype(product.dtype))
        if self.bias is not None:
            logits = logits + self.bias
        if self.softcap is None:
            factor = self.scale / temperature
            return (logits if factor == 1 else logits * factor), None
        tanh = torch.tanh(logits * (self.scale / self.softcap))
        # The tanh of an infinite logit would pass for a valid number.
        return torch.where(logits.isfinite(), tanh * (self.softcap / temperature), torch.nan), tanh

    @property
    def vocab_size(self) -> int:
        """Rows, padding included."""
        return len(self.weight)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Head:
        """The same on ``device`` in ``dtype``."""
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return replace(self, weight=self.weight.to(device, dtype), bias=bias)

    def detach(self) -> Head:
        """The same weights without gradient."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())


def load_head(model: str, revision: str | None = None) -> Head:
    """Reads the head of a checkpoint, a directory or a hub id, of which only the shard with the head is fetched.

    Raises:
        ValueError: if the checkpoint has no safetensors, or no head in a plain floating-point format.
    """
    config = AutoConfig.from_pretrained(model, revision=revision).get_text_config()
    try:
        with open(_fetch(model, revision, _INDEX)) as file:
            shards: dict[str, str] = json.load(file)["weight_map"]
    except FileNotFoundError:
        try:
            with safe_open(_fetch(model, revision, _SINGLE), "pt") as tensors:
                shards = dict.fromkeys(tensors.keys(), _SINGLE)
        except FileNotFoundError as error:
            raise ValueError(f"{model} has neither {_INDEX} nor {_SINGLE}") from error

    kinds = (_EMBEDDINGS, _HEADS) if config.tie_word_embeddings else (_HEADS,)
    # The shortest name is the text model's own.
    names = [name for kind in kinds for name in sorted((n for n in shards if n.endswith(kind)), key=len)]
    if not names:
        raise ValueError(f"{model}: no tensor ends with {', '.join(sum(kinds, ()))}")
    bias_name = names[0].removesuffix("weight") + "bias"
    weight = _read(model, revision, shards, names[0])
    if not weight.is_floating_point() or weight.itemsize < 2:
        raise ValueError(f"{model}: the head is quantized ({weight.dtype}); signal kind hidden needs it in full")
    bias = _read(model, revision, shards, bias_name) if bias_name in shards else None
    return Head(weight, bias, softcap(config), logit_scale(config))


def head_of(model: PreTrainedModel) -> Head:
    """The head of a loaded model: its own parameters. At ZeRO stage 3 they are whole only inside its forward."""
    embedding, config = model.get_output_embeddings(), model.config.get_text_config()
    return Head(embedding.weight, getattr(embedding, "bias", None), softcap(config), logit_scale(config))


def softcap(config: PretrainedConfig) -> float | None:
    """``final_logit_softcapping`` of Gemma 2; None is no cap."""
    value = getattr(config, "final_logit_softcapping", None)
    return float(value) if value else None


def logit_scale(config: PretrainedConfig) -> float:
    """Factor on the logits: Cohere's and Llama's ``logit_scale``, Falcon-H1's multiplier, Granite's divisor."""
    for name in ("logit_scale", "lm_head_multiplier"):
        if (scale := getattr(config, name, None)) is not None:
            return float(scale)
    return 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)


def _fetch(model: str, revision: str | None, name: str) -> Path:
    """Local path of a file of the checkpoint.

    Raises:
        FileNotFoundError: if it has no such file.
    """
    if (directory := Path(model).expanduser()).is_dir():
        return directory / name
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except EntryNotFoundError as error:
        raise FileNotFoundError(name) from error


def _read(model: str, revision: str | None, shards: dict[str, str], name: str) -> torch.Tensor:
    with safe_open(_fetch(model, revision, shards[name]), "pt") as tensors:
        return tensors.get_tensor(name)
