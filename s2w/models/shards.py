"""The weight files of a checkpoint: written shard by shard, and checked for completeness by their headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from s2w.errors import ConfigError
from s2w.models.checkpoint import Checkpoint

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 2**30


def check_weights(checkpoint: Checkpoint) -> None:
    """Reads the headers of the safetensors files, and the index where there is one.

    Files of a hub id that are not in the cache yet are fetched when the model loads, and pass.

    Raises:
        ConfigError: a directory has no weights, a file is cut off or damaged, or the index names something missing.
    """
    path, reference = checkpoint.path, checkpoint.reference
    fetched_later = not Path(reference).expanduser().is_dir()
    tensors = {file.name: _tensor_names(file) for file in sorted(path.glob("*.safetensors"))}
    if not tensors and not fetched_later:
        raise ConfigError(f"{reference!r} has no weights: the directory contains no .safetensors file")
    index = path / INDEX
    if not index.is_file():
        return
    for name, file in _weight_map(index).items():
        if file not in tensors and fetched_later:
            continue
        if name not in tensors.get(file, ()):
            lacks = f"the tensor {name!r} is not in it" if file in tensors else "there is no such file"
            raise ConfigError(f"{str(index)!r} names {file!r}, but {lacks}: copy or fetch the checkpoint again")


def write_weights(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes safetensors as ``save_pretrained`` lays them out, holding one shard in memory.

    Args:
        tensors: names in the checkpoint, and tensors, each valid until the next is asked for.
        max_shard_bytes: a larger single tensor has its own shard.
    """
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = total_parameters = 0

    def flush() -> None:
        nonlocal pending_bytes
        path = directory / f"shard-{len(shards)}.partial"
        save_file(pending, path, metadata={"format": "pt"})
        shards.append((path, list(pending)))
        pending.clear()
        pending_bytes = 0

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
        pending[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        total_parameters += tensor.numel()
    flush()

    if len(shards) == 1:
        shards[0][0].rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tensor_names(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as weights:
            return set(weights.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{str(file)!r} is cut off or no safetensors file ({error}): copy or fetch the checkpoint again"
        ) from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{str(index)!r} is not an index of weights: copy or fetch the checkpoint again") from error
