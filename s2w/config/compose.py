"""From Hydra overrides to a configuration of :mod:`s2w.config.schema`, and ``--help``; errors say what to write."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from s2w.config.bounds import choices, describe, type_hints
from s2w.config.documentation import documentation
from s2w.config.schema import Config, EvalRun
from s2w.errors import ConfigError

Root = TypeVar("Root", Config, EvalRun)


@dataclass(frozen=True, slots=True)
class Program:
    """A command that has a configuration."""

    command: str
    file: str
    """Name of its root in the Hydra tree; there ``s2w_FILE`` stands for the dataclasses."""
    groups: tuple[str, ...]


PROGRAMS: dict[type, Program] = {
    Config: Program("train", "config", ("teacher", "student", "data", "cluster", "experiment")),
    EvalRun: Program("eval", "evaluation", ("eval", "cluster")),
}


def config_directory() -> Path:
    """The Hydra tree: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def compose(overrides: list[str], directories: list[Path] | None = None) -> Config:
    """The resolved configuration of ``s2w train``; see :func:`compose_as`."""
    return compose_as(Config, overrides, directories)


def compose_as(kind: type[Root], overrides: list[str], directories: list[Path] | None = None) -> Root:
    """The resolved configuration.

    Args:
        kind: :class:`~s2w.config.schema.Config` or :class:`~s2w.config.schema.EvalRun`.
        overrides: Hydra's: ``experiment=smollm2``, ``loop.steps=5``.
        directories: further directories to search for groups.

    Raises:
        ConfigError: an unknown setting or group, a value of the wrong type, a required setting that is missing.
    """
    for directory in directories or []:
        if not directory.is_dir():
            raise ConfigError(f"--config-dir {directory}: there is no such directory")
    program = PROGRAMS[kind]
    overrides = [_open(override, kind) for override in overrides]
    ConfigStore.instance().store(name=f"s2w_{program.file}", node=kind)
    if directories:
        paths = ",".join(f"file://{directory.resolve()}" for directory in directories)
        overrides = [*overrides, f"hydra.searchpath=[{paths}]"]
    OmegaConf.register_new_resolver("s2w", lambda path: str(Path(__file__).parent.parent / path), replace=True)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory().resolve()), version_base=None):
            composed = hydra_compose(program.file, overrides)
        # A plain container: merging it into the dataclasses also rejects keys added by `+name=value`.
        plain = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
        merged = OmegaConf.merge(OmegaConf.structured(kind), plain)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_sentence(error, kind)) from error
    if missing := OmegaConf.missing_keys(merged):
        where = " or choose an experiment" if "experiment" in program.groups else ""
        first = next(name for name, _, _ in settings(kind) if name in missing)
        raise ConfigError(f"{first} is not set: give it on the command line{where}")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, kind)
    return config


def _open(override: str, kind: type) -> str:
    """Lets an override add keys where a setting is a free mapping (student.overrides): Hydra wants ``++`` there."""
    name = override.partition("=")[0]
    mappings = [setting for setting, default, _ in settings(kind) if isinstance(default, dict)]
    inside = any(name == mapping or name.startswith(f"{mapping}.") for mapping in mappings)
    return f"++{override}" if inside else override


def to_yaml(config: Config | EvalRun) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def settings(kind: type = Config) -> list[tuple[str, Any, str]]:
    """Every setting as (dotted name, default, documentation), in the order of schema.py."""
    return list(_walk(kind, ""))


def help_text(kind: type = Config) -> str:
    """What ``s2w train --help`` or ``s2w eval --help`` prints."""
    program = PROGRAMS[kind]
    lines = [f"usage: s2w {program.command} [OVERRIDE ...]", "", "Groups (NAME=CHOICE):"]
    for group in program.groups:
        names = ", ".join(sorted(path.stem for path in (config_directory() / group).glob("*.yaml")))
        lines.append(f"  {group}={names}")
    lines += ["", "Settings (NAME=VALUE):"]
    hints = dict(_hints(kind, ""))
    for name, default, text in settings(kind):
        shown = "must be given" if default is MISSING else f"default: {default}"
        lines.append(f"  {name}  ({'; '.join(filter(None, (shown, describe(hints[name]))))})")
        lines += [f"      {line.strip()}" for line in text.splitlines()]
        lines += [f"      {choice}: {meaning}" for choice, meaning in choices(hints[name]).items()]
    return "\n".join(lines) + "\n"


def _walk(kind: type, prefix: str) -> Iterator[tuple[str, Any, str]]:
    texts = documentation(kind)
    for field in fields(kind):
        default: Any = field.default_factory() if callable(field.default_factory) else field.default
        if is_dataclass(default):
            yield from _walk(type(default), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, default, texts.get(field.name, "")


def _hints(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every setting's type by dotted name."""
    for name, hint in type_hints(kind).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _hints(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def _sentence(error: BaseException, kind: type) -> str:
    """One clear sentence for what Hydra and OmegaConf raise."""
    for cause in _causes(error):
        key = str(getattr(cause, "full_key", None) or "")
        if isinstance(cause, ConfigKeyError | ConfigAttributeError):
            return unknown_setting(key, kind)
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group, _, choice = cause.missing_cfg_file.rpartition("/")
            return f"there is no {group}={choice}: the choices are {', '.join(cause.options or [])}"
        if isinstance(cause, ValidationError):
            return f"{key}: {str(cause).splitlines()[0]}"
    return " ".join(str(error).split())


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def unknown_setting(key: str, kind: type) -> str:
    """Error message for a setting that does not exist, with the nearest one that does."""
    names = [name for name, _, _ in settings(kind)]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
    hint = f"did you mean {near[0]}?" if near else f"s2w {PROGRAMS[kind].command} --help lists them"
    return f"unknown setting {key}: {hint}"
