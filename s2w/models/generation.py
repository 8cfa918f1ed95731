"""generation_config.json: where a response ends and how it is sampled, as transformers and vLLM read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from s2w.models.checkpoint import Checkpoint
from s2w.records import Mode, Sampling

FILE = "generation_config.json"
RECOMMENDED: dict[Mode, Sampling] = {"think": Sampling(0.6, 0.95, 20), "no_think": Sampling(0.7, 0.8, 20)}
"""Qwen3's, by mode (arXiv 2505.09388, section 4.6)."""


def recommended_sampling(checkpoint: Checkpoint, mode: Mode) -> Sampling:
    """How responses in ``mode`` are sampled best: as the checkpoint says, else as Qwen3 recommends.

    Qwen3's own files hold the values of think mode alone.
    """
    stated = _stated_sampling(_read(checkpoint.path))
    if stated is None or stated == RECOMMENDED["think"]:
        return RECOMMENDED[mode]
    return stated


def generation_config(base: Checkpoint, sampling: Sampling) -> str:
    """The file of a student that was made from ``base``: responses end where those of its rollouts ended.

    Args:
        sampling: for a base whose own file says nothing of sampling.
    """
    values = _read(base.path)
    for metadata in ("_from_model_config", "transformers_version"):
        values.pop(metadata, None)
    ends = list(base.eos_token_ids)
    values["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    pad = base.tokenizer.pad_token_id
    values["pad_token_id"] = next(iter(ends), None) if pad is None else pad
    if _stated_sampling(values) is None:
        values["do_sample"] = sampling.temperature > 0
        if values["do_sample"]:
            # transformers has its own default where nothing is said; 0 keeps every token, here as in vLLM.
            top_k = max(sampling.top_k, 0)
            values |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": top_k}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _read(directory: Path) -> dict[str, Any]:
    path = directory / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _stated_sampling(values: dict[str, Any]) -> Sampling | None:
    """What a file says of sampling, with vLLM's defaults for the rest; None if it says nothing."""
    temperature, top_p, top_k = (values.get(name) for name in ("temperature", "top_p", "top_k"))
    if temperature is None and top_p is None and top_k is None:
        return None
    return Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=top_k if top_k else -1,
    )
