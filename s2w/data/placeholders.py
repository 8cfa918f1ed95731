"""The names in braces of a teacher's privileged context, and the columns of a prompt's row that they ask for."""

from __future__ import annotations

import string

from s2w.config.schema import Config
from s2w.errors import ConfigError

OF_EVERY_PROMPT = ("question", "answer")


def placeholders(setting: str, template: str) -> list[str]:
    """Names in braces, in order; braces that stand for themselves are doubled, as for :meth:`str.format`.

    Raises:
        ConfigError: a brace is left open, or holds more than a name.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{setting}={template!r}: {error}; write {{{{ for a brace that is text") from error
    for _, name, form, conversion in parts:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise ConfigError(f"{setting}={template!r}: {{{name}}} is not a name; write {{{{ for a brace that is text")
    return [name for _, name, _, _ in parts if name is not None]


def context_columns(config: Config) -> frozenset[str]:
    """Columns, besides question and answer, that the context of some teacher asks for; errors as above."""
    templates = {"teacher.context": config.teacher.context}
    for name, teacher in config.teachers.items():
        templates[f"teachers.{name}.context"] = teacher.get("context") if isinstance(teacher, dict) else None
    names = {
        name
        for setting, template in templates.items()
        if isinstance(template, str)
        for name in placeholders(setting, template)
    }
    return frozenset(names.difference(OF_EVERY_PROMPT))
