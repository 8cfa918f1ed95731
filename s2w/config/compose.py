"""From Hydra overrides to a configuration of :mod:`s2w.config.schema`, and ``--help``; errors say what to write."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from s2w.config.bounds import choices, describe, resumable, type_hints
from s2w.config.documentation import documentation
from s2w.config.schema import Config, EvalRun, SampleRun
from s2w.errors import ConfigError

Root = TypeVar("Root", Config, EvalRun, SampleRun)

STORED = "config.yaml"
"""The resolved configuration of a run, in its directory."""


@dataclass(frozen=True, slots=True)
class Program:
    """A command that has a configuration."""

    command: str
    file: str
    """Name of its root in the Hydra tree; there ``s2w_FILE`` stands for the dataclasses."""
    groups: tuple[str, ...]
    arguments: str = ""
    """Besides overrides."""


PROGRAMS: dict[type, Program] = {
    Config: Program("train", "config", ("teacher", "student", "data", "cluster", "experiment")),
    EvalRun: Program("eval", "evaluation", ("eval", "cluster")),
    SampleRun: Program(
        "sample", "sampling", ("cluster",), "MODEL [FILE] [--prompt TEXT] [--teacher MODEL] [--mode think|no_think] "
    ),
}


def config_directory() -> Path:
    """The Hydra tree: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def compose(overrides: list[str], directories: list[Path] | None = None) -> Config:
    """The resolved configuration of ``s2w train``; see :func:`compose_as`."""
    return compose_as(Config, overrides, directories)


def compose_as(
    kind: type[Root],
    overrides: list[str],
    directories: list[Path] | None = None,
    may_be_missing: Collection[str] = (),
) -> Root:
    """The resolved configuration. With ``run.resume`` that of the run in ``run.dir``, and the overrides on top.

    Args:
        kind: the dataclass of a command's whole configuration, one of :data:`PROGRAMS`.
        overrides: Hydra's: ``experiment=smollm2``, ``loop.steps=5``.
        directories: further directories to search for groups.
        may_be_missing: required settings that are left empty if they are not given.

    Raises:
        ConfigError: an unknown setting or group, a value of the wrong type, a required setting that is missing, no run
            to resume.
    """
    for directory in directories or []:
        if not directory.is_dir():
            raise ConfigError(f"--config-dir {directory}: there is no such directory")
    overrides = [_open(override, kind) for override in overrides]
    if directories:
        paths = ",".join(f"file://{directory.resolve()}" for directory in directories)
        overrides = [*overrides, f"hydra.searchpath=[{paths}]"]
    merged = _merged(kind, overrides, kind)
    if resume := OmegaConf.select(merged, "run.resume"):
        stored = Path(merged.run.dir) / STORED
        if stored.exists():
            # What the command adds (`+name=value`) is in the run's file already.
            overrides = [f"++{one.lstrip('+')}" if one.startswith("+") else one for one in overrides]
            merged = _merged(kind, overrides, from_yaml(kind, stored))
        elif resume is True:
            raise ConfigError(
                f"run.resume=true, but run.dir={stored.parent} contains no run: there is no {stored}: write the "
                "run.dir of the run to continue"
            )
    missing = OmegaConf.missing_keys(merged)
    for name in missing.intersection(may_be_missing):
        OmegaConf.update(merged, name, "")
    if missing := missing.difference(may_be_missing):
        where = " or choose an experiment" if "experiment" in PROGRAMS[kind].groups else ""
        first = next(name for name, _, _ in settings(kind) if name in missing)
        raise ConfigError(f"{first} is not set: give it on the command line{where}")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, kind)
    return config


def _merged(kind: type[Root], overrides: list[str], base: Root | type[Root]) -> DictConfig:
    """The overrides on top of ``base``, which is ``kind`` with its defaults or a configuration."""
    file = PROGRAMS[kind].file
    ConfigStore.instance().store(name=f"s2w_{file}", node=base)
    OmegaConf.register_new_resolver("s2w", lambda path: str(Path(__file__).parent.parent / path), replace=True)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory().resolve()), version_base=None):
            composed = hydra_compose(file, overrides)
        # A plain container: merging it into the dataclasses also rejects keys added by `+name=value`.
        plain = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
        merged = OmegaConf.merge(OmegaConf.structured(kind), plain)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_sentence(error, kind)) from error
    assert isinstance(merged, DictConfig)
    return merged


def _open(override: str, kind: type) -> str:
    """Lets an override add keys where a setting is a free mapping (student.overrides): Hydra wants ``++`` there, and
    for a section that is given as a whole with such a mapping in it."""
    name, _, value = override.partition("=")
    mappings = [setting for setting, default, _ in settings(kind) if isinstance(default, dict)]
    inside = any(name == mapping or name.startswith(f"{mapping}.") for mapping in mappings)
    around = value.lstrip().startswith("{") and any(mapping.startswith(f"{name}.") for mapping in mappings)
    return f"++{override}" if inside or around else override


def to_yaml(config: Config | EvalRun | SampleRun) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(kind: type[Root], path: Path) -> Root:
    """What :func:`to_yaml` wrote into the file ``path``; settings that did not exist then have their defaults.

    Raises:
        ConfigError: the file holds something else.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.load(path)))
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is not the configuration of a run: {_sentence(error, kind)}") from error
    assert isinstance(config, kind)
    return config


def settings(kind: type = Config) -> list[tuple[str, Any, str]]:
    """Every setting as (dotted name, default, documentation), in the order of schema.py."""
    return list(_walk(kind, ""))


def help_text(kind: type = Config) -> str:
    """What ``s2w train --help``, ``s2w eval --help`` or ``s2w sample --help`` prints."""
    program = PROGRAMS[kind]
    lines = [f"usage: s2w {program.command} {program.arguments}[OVERRIDE ...]", "", "Groups (NAME=CHOICE):"]
    for group in program.groups:
        names = ", ".join(sorted(path.stem for path in (config_directory() / group).glob("*.yaml")))
        lines.append(f"  {group}={names}")
    lines += ["", "Settings (NAME=VALUE):"]
    hints = dict(_hints(kind, ""))
    may_change = set(resumable(kind)) if kind is Config else ()  # Only a run is resumed.
    for name, default, text in settings(kind):
        shown = "must be given" if default is MISSING else f"default: {default}"
        change = "may change at resume" if name in may_change else ""
        lines.append(f"  {name}  ({'; '.join(filter(None, (shown, describe(hints[name]), change)))})")
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
            if key.partition(".")[0] == "experiment":
                return "the file of the experiment must begin with the line `# @package _global_`"
            return unknown_setting(key, kind)
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group, _, choice = cause.missing_cfg_file.rpartition("/")
            own = f"for a file of your own, DIR/{group}/{choice}.yaml, add --config-dir DIR"
            return f"there is no {group}={choice}: the choices are {', '.join(cause.options or [])}; {own}"
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
