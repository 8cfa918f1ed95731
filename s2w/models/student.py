"""Where the student's first weights come from: a checkpoint, a pruned copy of one, or random numbers."""

from __future__ import annotations

import copy
import difflib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from s2w.config.schema import StudentConfig
from s2w.errors import ConfigError
from s2w.models.checkpoint import TEXT_FILES, ModelReference, read_checkpoint, resolve_path
from s2w.models.shards import write_weights
from s2w.models.tokenizers import token_count

RECORD_FILE = "made_from"
"""File that says what a materialised student was made from: a later run reuses it only if it asks for the same."""
LAYER = re.compile(r"^(.*?\b(?:layers|h)\.)(\d+)(\..*)$")
LAYER_INDEX_FIELDS = ("mlp_only_layers", "moe_layers", "full_attn_idxs")
"""Configuration fields that list the indices of some layers (others have one entry per layer)."""


def materialise_student(student: StudentConfig, directory: Path, seed: int) -> Path:
    """Directory of an ordinary checkpoint to start the student from.

    ``init=checkpoint`` is the resolved ``student.model`` itself. The other two write ``directory``, in one rename;
    if it already holds what is asked for, nothing is done.

    Args:
        seed: seed of the random weights (init=fresh).

    Raises:
        ConfigError: the model cannot be found, a setting does not fit it, or ``directory`` holds something else.
    """
    if student.init == "checkpoint":
        return resolve_path(student.model, student.revision, weights=True)
    overrides = student.overrides
    if isinstance(overrides, DictConfig):
        overrides = OmegaConf.to_container(overrides, resolve=True)
    record: dict[str, Any] = {"init": student.init, "model": student.model, "revision": student.revision}
    if student.init == "pruned":
        record["keep_layers"] = student.keep_layers
    else:
        record |= {"overrides": overrides, "seed": seed}
    if directory.exists() and any(directory.iterdir()):
        if _read_record(directory) != record:
            raise ConfigError(
                f"{str(directory)!r} holds something other than the student asked for: delete it or choose another "
                "run.dir"
            )
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        if student.init == "pruned":
            _write_pruned(student, partial)
        else:
            _write_fresh(student, overrides, partial, seed)
        (partial / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
        partial.chmod(0o755)
        partial.replace(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def student_reference(student: StudentConfig, directory: Path, seed: int) -> ModelReference:
    """The student's first checkpoint: ``student.model`` itself, or what :func:`materialise_student` writes.

    Raises:
        ConfigError: as in that function.
    """
    if student.init == "checkpoint":
        return ModelReference.of(student.model, student.revision)
    return ModelReference.of(str(materialise_student(student, directory, seed)))


def evenly_spaced(layers: int, keep: int) -> list[int]:
    """``keep`` of ``layers`` indices, evenly spaced, including the first and the last.

    Raises:
        ConfigError: ``keep`` is not in 2 to ``layers``.
    """
    if not 2 <= keep <= layers:
        raise ConfigError(f"student.keep_layers must be between 2 and the model's {layers} layers, not {keep}")
    gaps = keep - 1
    return [(2 * i * (layers - 1) + gaps) // (2 * gaps) for i in range(keep)]


def pruned_config(config: PretrainedConfig, kept: list[int]) -> PretrainedConfig:
    """The configuration of a model that has only the layers ``kept`` (old indices, ascending) of ``config``.

    Raises:
        ConfigError: the configuration says something about single layers that this function does not know.
    """
    fields = copy.deepcopy(config.to_dict())
    layers = config.num_hidden_layers
    for name, value in fields.items():
        if not isinstance(value, list | tuple):
            continue
        if name in LAYER_INDEX_FIELDS:
            fields[name] = [new for new, old in enumerate(kept) if old in value]
        elif len(value) == layers and ("layer" in name or "pattern" in name):
            fields[name] = [value[old] for old in kept]
    sparse_step = fields.get("decoder_sparse_step")
    if sparse_step not in (None, 1):
        # Which layers have experts was a rule over the old indices; spell it out for the new ones.
        dense = set(config.mlp_only_layers) | {i for i in range(layers) if (i + 1) % sparse_step}
        fields["mlp_only_layers"] = [new for new, old in enumerate(kept) if old in dense]
        fields["decoder_sparse_step"] = 1
    if fields.get("first_k_dense_replace") is not None:
        fields["first_k_dense_replace"] = sum(old < fields["first_k_dense_replace"] for old in kept)
    fields["num_hidden_layers"] = len(kept)
    pruned = type(config).from_dict(fields)
    before, after = _layer_shapes(config), _layer_shapes(pruned)
    if [before[old] for old in kept] != [after[new] for new in range(len(kept))]:
        raise ConfigError(
            f"Cannot prune a {config.model_type} model: its layers differ by a rule that s2w does not know"
        )
    return pruned


def _layer_shapes(config: PretrainedConfig) -> dict[int, dict[str, tuple[int, ...]]]:
    """Names and shapes of each layer's parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        if match := LAYER.match(name):
            shapes.setdefault(int(match[2]), {})[match[3]] = tuple(tensor.shape)
    return shapes


def _write_pruned(student: StudentConfig, target: Path) -> None:
    config = _text_config(student)
    if student.keep_layers is None:
        raise ConfigError("student.init=pruned needs student.keep_layers")
    kept = evenly_spaced(config.num_hidden_layers, student.keep_layers)
    config = pruned_config(config, kept)
    source = resolve_path(student.model, student.revision, weights=True)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{student.model!r} has no safetensors weights to prune")
    write_weights(target, _kept_tensors(files, {old: new for new, old in enumerate(kept)}))
    config.save_pretrained(target)
    _copy_text_files(source, target)


def _kept_tensors(files: list[Path], new_index: dict[int, int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors outside the layers and those of kept layers, renumbered; the others are not read."""
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                match = LAYER.match(name)
                if match is None:
                    yield name, weights.get_tensor(name)
                elif int(match[2]) in new_index:
                    yield f"{match[1]}{new_index[int(match[2])]}{match[3]}", weights.get_tensor(name)


def _write_fresh(student: StudentConfig, overrides: dict[str, Any], target: Path, seed: int) -> None:
    base = _text_config(student)
    config = fresh_config(base, overrides)
    source = read_checkpoint(student.model, student.revision)
    tokens = token_count(source.tokenizer)
    if config.vocab_size < tokens:
        raise ConfigError(
            f"student.overrides: vocab_size {config.vocab_size} is smaller than the tokenizer's {tokens} tokens"
        )
    with _valid_overrides(base), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with _no_bars():
        model.to(base.dtype or torch.float32).save_pretrained(target)
    _copy_text_files(source.path, target)


def fresh_config(base: PretrainedConfig, overrides: dict[str, Any]) -> PretrainedConfig:
    """``base`` with the fields ``overrides``.

    Raises:
        ConfigError: it has no such field, or the values do not go together.
    """
    fields = base.to_dict()
    for name in overrides:
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)
            raise ConfigError(
                f"student.overrides: {base.model_type} has no field {name!r} in its configuration; "
                f"did you mean {nearest[0]!r}?"
            )
    if overrides.get("num_hidden_layers", base.num_hidden_layers) != base.num_hidden_layers:
        # Lists with one entry per layer no longer fit; the configuration derives them again.
        for name in [n for n, v in fields.items() if isinstance(v, list) and len(v) == base.num_hidden_layers]:
            if "layer" in name:
                del fields[name]
    with _valid_overrides(base):
        return type(base).from_dict(fields | overrides)


@contextmanager
def _valid_overrides(base: PretrainedConfig) -> Iterator[None]:
    try:
        yield
    except (StrictDataclassError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"student.overrides do not give a valid {base.model_type} model: {reason}") from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars; those of downloads stay."""
    before = logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **kwargs | {"disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _text_config(student: StudentConfig) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(resolve_path(student.model, student.revision))
    if config.get_text_config() is not config:
        raise ConfigError(f"{student.model!r} ({config.model_type}) is not a text-only decoder model")
    return config


def _copy_text_files(source: Path, target: Path) -> None:
    """Tokenizer, chat template and generation configuration, as they are."""
    for pattern in TEXT_FILES:
        for file in source.glob(pattern):
            if file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)


def _read_record(directory: Path) -> dict[str, Any] | None:
    path = directory / RECORD_FILE
    return json.loads(path.read_text()) if path.is_file() else None
