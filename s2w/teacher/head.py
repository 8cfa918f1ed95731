"""The teacher's output head, for a learner that gets hidden rows; read from the checkpoint, not from a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Suffixes of tensor names: models differ in what they put before them.
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


@dataclass(frozen=True, slots=True)
class TeacherHead:
    """logits = scale * softcap * tanh((hidden @ weight.T + bias) / softcap), without the tanh if there is no soft cap.

    ``hidden`` is a row of signal kind ``hidden``: taken after the final norm.
    """

    weight: torch.Tensor
    """[vocabulary, d], in the checkpoint's dtype."""
    bias: torch.Tensor | None
    """[vocabulary]"""
    softcap: float | None
    scale: float

    @property
    def vocab_size(self) -> int:
        return len(self.weight)


def load_head(model: str, revision: str | None = None) -> TeacherHead:
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
    softcap = getattr(config, "final_logit_softcapping", None)
    return TeacherHead(
        weight=weight,
        bias=_read(model, revision, shards, bias_name) if bias_name in shards else None,
        softcap=float(softcap) if softcap else None,
        scale=logit_scale(config),
    )


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
