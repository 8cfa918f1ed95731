"""Whether the weight files of a checkpoint are whole, from their headers alone: no weight is read."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from s2w.errors import ConfigError
from s2w.models.checkpoint import Checkpoint

INDEX = "model.safetensors.index.json"


def check_weights(checkpoint: Checkpoint) -> None:
    """Reads the headers of the safetensors files, and the index where there is one.

    Files of a hub id that its cache does not hold yet are fetched when the model loads, and pass.

    Raises:
        ConfigError: a directory has no weights, a file is cut off or damaged, or the index names what is not there.
    """
    path, reference = checkpoint.path, checkpoint.reference
    fetched_later = not Path(reference).expanduser().is_dir()
    tensors = {file.name: _tensor_names(file) for file in sorted(path.glob("*.safetensors"))}
    if not tensors and not fetched_later:
        raise ConfigError(f"{reference!r} has no weights: the directory holds no .safetensors file")
    index = path / INDEX
    if not index.is_file():
        return
    for name, file in _weight_map(index).items():
        if file not in tensors and fetched_later:
            continue
        if name not in tensors.get(file, ()):
            lacks = f"the tensor {name!r} is not in it" if file in tensors else "there is no such file"
            raise ConfigError(f"{str(index)!r} names {file!r}, but {lacks}: copy or fetch the checkpoint again")


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
