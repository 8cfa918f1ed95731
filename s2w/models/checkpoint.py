"""What a model reference (directory or hub id) stands for: its configuration and tokenizer, without its weights."""

from __future__ import annotations

import functools
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from s2w.actors import bars, stages
from s2w.errors import ConfigError
from s2w.models.modes import end_of_turn

TEXT_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]
"""Hub files that hold configuration, tokenizer and chat template."""
CARD_FILE = "README.md"
"""The model card: metadata as YAML front matter, and Markdown."""
WEIGHT_FILES = ["*.safetensors"]
HUB_ANSWER_S = 10
"""Seconds that the hub may take to accept a connection."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Facts about a checkpoint, read without its weights."""

    reference: str
    """As the user wrote it."""
    path: Path
    """Directory that holds the configuration and tokenizer; for a hub id, its snapshot in the hub cache."""
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    """Ids that end a response: the one that the chat template puts after it, and those of generation_config.json,
    else the tokenizer's."""

    @property
    def max_model_len(self) -> int | None:
        """Longest sequence that the configuration allows, in tokens; None if it does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding included."""
        return self.config.get_text_config().vocab_size


@dataclass(frozen=True, slots=True)
class ModelReference:
    """A checkpoint as passed to actors: each finds it on its own node, which may have another hub cache."""

    reference: str
    """Hub id or directory."""
    revision: str | None = None

    @classmethod
    def of(cls, reference: str, revision: str | None = None) -> ModelReference:
        """A directory becomes absolute: actors may run elsewhere."""
        path = Path(reference).expanduser()
        return cls(str(path.absolute())) if path.is_dir() else cls(reference, revision)

    def resolve(self) -> Path:
        """:func:`resolve_path` with the weights, on the node of the caller."""
        return resolve_path(self.reference, self.revision, weights=True)


def resolve_path(reference: str, revision: str | None = None, weights: bool = False) -> Path:
    """Directory of a checkpoint; a hub id is fetched into the hub cache, its weights only if ``weights``.

    An existing directory is never looked up on the hub.

    Raises:
        ConfigError: there is no such directory and the hub does not provide it.
    """
    path = Path(reference).expanduser()
    if reference and path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{reference!r} is not a checkpoint: the directory has no config.json")
        return path
    looks_like_path = reference.startswith(("/", "~", ".")) or reference.count("/") > 1 or not reference
    if looks_like_path or path.exists():
        raise ConfigError(
            f"No checkpoint directory at {str(path.absolute())!r}: write a directory that holds config.json, "
            "or a hub id such as 'Qwen/Qwen3-0.6B'"
        )
    stages.enter(f"downloading {reference}")
    try:
        return Path(
            snapshot_download(
                reference,
                revision=revision,
                allow_patterns=[*TEXT_FILES, CARD_FILE, *(WEIGHT_FILES if weights else [])],
                local_files_only=not hub_answers(),
                tqdm_class=bars.downloads(reference),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        if isinstance(error, LocalEntryNotFoundError):
            reason = "the hub cannot be reached and the local cache does not hold it"
        else:
            reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(
            f"Cannot get {reference!r}{at} from the Hugging Face hub ({reason}), "
            "and there is no directory of that name: write a hub id you may read, or the path of a checkpoint"
        ) from error


@functools.cache
def hub_answers() -> bool:
    """Whether the hub accepts a connection; if not, its client, which retries for a minute or two, need not be asked.

    Behind a proxy only the client can tell, so it is asked.
    """
    url = urlsplit(constants.ENDPOINT)
    if constants.is_offline_mode() or url.scheme in getproxies():
        return True
    try:
        socket.create_connection((url.hostname, url.port or url.scheme), timeout=HUB_ANSWER_S).close()
    except OSError:
        return False
    return True


def read_checkpoint(reference: str, revision: str | None = None) -> Checkpoint:
    """Reads a checkpoint's configuration and tokenizer.

    Raises:
        ConfigError: the checkpoint cannot be found, or its configuration or tokenizer cannot be read.
    """
    path = resolve_path(reference, revision)
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (StrictDataclassError, OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"Cannot read the configuration and tokenizer of {reference!r}: {reason}") from error
    return Checkpoint(reference, path, config, tokenizer, _eos_token_ids(path, tokenizer))


def _eos_token_ids(path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    eos = None
    if (path / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(path).eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    stated = eos if isinstance(eos, list) else [eos]
    # A base model states the end of a document, and may have a chat template all the same.
    return tuple(dict.fromkeys(i for i in (end_of_turn(tokenizer), *stated) if i is not None))
