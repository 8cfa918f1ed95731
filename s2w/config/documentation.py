"""The documentation of settings, read from where it stands: the string under each field of a dataclass."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import is_dataclass


@functools.cache
def documentation(kind: type) -> dict[str, str]:
    """The string under each field of a class, as schema.py writes them; those of the dataclasses it extends too."""
    own = [_own(part) for part in reversed(kind.__mro__) if part is kind or is_dataclass(part)]
    return {name: text for texts in own for name, text in texts.items()}


def _own(kind: type) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        target = getattr(statement, "target", None) or next(iter(getattr(statement, "targets", [])), None)
        if isinstance(target, ast.Name) and isinstance(following, ast.Expr):
            value = getattr(following.value, "value", None)
            if isinstance(value, str):
                texts[target.id] = inspect.cleandoc(value)
    return texts


def summary(kind: type) -> str:
    """First paragraph of a class's docstring."""
    return (inspect.getdoc(kind) or "").partition("\n\n")[0]
