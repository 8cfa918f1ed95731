"""From Hydra overrides to a configuration of :mod:`s2w.config`, with errors that a person can act on."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from s2w import config as schema
from s2w.bounds import describe, type_hints
from s2w.config import Config, EvalRun
from s2w.errors import ConfigError

Root = TypeVar("Root", Config, EvalRun)


@dataclass(frozen=True, slots=True)
class Program:
    """A command that is configured."""

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
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def compose(overrides: list[str], directories: list[Path] | None = None) -> Config:
    """The resolved configuration of ``s2w train``; see :func:`compose_as`."""
    return compose_as(Config, overrides, directories)


def compose_as(kind: type[Root], overrides: list[str], directories: list[Path] | None = None) -> Root:
    """The resolved configuration.

    Args:
        kind: which: :class:`~s2w.config.Config` or :class:`~s2w.config.EvalRun`.
        overrides: Hydra's: ``experiment=smollm2``, ``loop.steps=5``.
        directories: further directories to search for groups.

    Raises:
        ConfigError: an unknown setting or group, a value of the wrong type, a setting that must be given.
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
    OmegaConf.register_new_resolver("s2w", lambda path: str(Path(__file__).parent / path), replace=True)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory().resolve()), version_base=None):
            composed = hydra_compose(program.file, overrides)
        # A plain container: merging it into the dataclasses also refuses what `+name=value` added.
        plain = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
        merged = OmegaConf.merge(OmegaConf.structured(kind), plain)
        config = OmegaConf.to_object(merged)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_sentence(error, kind)) from error
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
    """Every setting as (dotted name, default, documentation), in the order of config.py."""
    return list(_walk(kind, ""))


def help_text(kind: type = Config) -> str:
    """What ``s2w train --help`` or ``s2w eval --help`` prints."""
    program = PROGRAMS[kind]
    lines = [f"usage: s2w {program.command} [OVERRIDE ...]", "", "Groups (NAME=CHOICE):"]
    for group in program.groups:
        choices = ", ".join(sorted(path.stem for path in (config_directory() / group).glob("*.yaml")))
        lines.append(f"  {group}={choices}")
    lines += ["", "Settings (NAME=VALUE):"]
    ranges = dict(_ranges(kind, ""))
    for name, default, text in settings(kind):
        shown = "must be given" if default is MISSING else f"default: {default}"
        lines.append(f"  {name}  ({'; '.join(filter(None, (shown, ranges[name])))})")
        lines += [f"      {line.strip()}" for line in text.splitlines()]
    return "\n".join(lines) + "\n"


def _walk(kind: type, prefix: str) -> Any:
    texts = _documentation(kind)
    for field in fields(kind):
        default: Any = field.default_factory() if callable(field.default_factory) else field.default
        if is_dataclass(default):
            yield from _walk(type(default), f"{prefix}{field.name}.")
        else:
            shown = getattr(default, "value", default)
            text = texts.get(field.name, "")
            if isinstance(default, Enum):
                choices = _documentation(type(default))
                text += "".join(f"\n{choice.value}: {choices.get(choice.name, '')}" for choice in type(default))
            yield prefix + field.name, shown, text.strip()


def _ranges(kind: type, prefix: str) -> Iterator[tuple[str, str]]:
    """Every setting's range in words, by dotted name."""
    for name, hint in type_hints(kind).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _ranges(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, describe(hint)


@functools.cache
def _documentation(kind: type) -> dict[str, str]:
    """The string under each name of a class, as config.py writes them."""
    tree = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        target = getattr(statement, "target", None) or next(iter(getattr(statement, "targets", [])), None)
        if isinstance(target, ast.Name) and isinstance(following, ast.Expr):
            value = getattr(following.value, "value", None)
            if isinstance(value, str):
                texts[target.id] = inspect.cleandoc(value)
    return texts


def _sentence(error: BaseException, kind: type) -> str:
    """One clear sentence for what Hydra and OmegaConf raise."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    for cause in causes:
        key = str(getattr(cause, "full_key", None) or "")
        if isinstance(cause, MissingMandatoryValue):
            where = " or choose an experiment" if "experiment" in PROGRAMS[kind].groups else ""
            return f"{_missing_key(cause, kind)} is not set: give it on the command line{where}"
        if isinstance(cause, ConfigKeyError) or type(cause).__name__ == "ConfigAttributeError":
            return unknown_setting(key, kind)
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group, _, choice = cause.missing_cfg_file.rpartition("/")
            return f"there is no {group}={choice}: the choices are {', '.join(cause.options or [])}"
        if isinstance(cause, ValidationError):
            return f"{key}: {str(cause).splitlines()[0]}"
    return " ".join(str(error).split())


def unknown_setting(key: str, kind: type) -> str:
    """The sentence for a setting that does not exist, with the nearest that does."""
    names = [name for name, _, _ in settings(kind)]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
    hint = f"did you mean {near[0]}?" if near else f"s2w {PROGRAMS[kind].command} --help lists them"
    return f"unknown setting {key}: {hint}"


def _missing_key(error: MissingMandatoryValue, kind: type) -> str:
    key = str(getattr(error, "full_key", "") or "")
    if key:
        return key
    # to_object names the class and the field only.
    text = str(error)
    if f"`{kind.__name__}`" in text:
        return text.rsplit(" ", 1)[-1]
    for section in fields(kind):
        part = getattr(schema, section.name.capitalize() + "Config", None)
        if part and f"`{part.__name__}`" in text:
            return f"{section.name}.{text.rsplit(' ', 1)[-1]}"
    return text.splitlines()[0]
