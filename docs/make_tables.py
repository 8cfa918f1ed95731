"""Writes the generated tables of docs/*.md from the code that they are about; ``--check`` only compares.

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; everything else in a document is written by
hand and left alone.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import s2w.launch.train  # noqa: F401  (imports everything that defines a metric)
from s2w.config.bounds import describe, resumable, type_hints
from s2w.config.compose import settings
from s2w.config.documentation import documentation
from s2w.config.schema import Config, LossConfig
from s2w.data.columns import COLUMNS, PROBLEMS, PROMPTS, RESPONSES
from s2w.data.tasks import task_names
from s2w.metric import METRICS
from s2w.objectives import OBJECTIVES, Objective
from s2w.objectives.divergences import DIVERGENCES, OF_LOSS, Divergence
from s2w.objectives.objective import EVERY_KIND
from s2w.objectives.support import markdown_table

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
OVER = {
    "tokens": "response tokens, and by mode",
    "samples": "responses, and by mode",
    "step": "step",
}


def objectives() -> str:
    """A row an objective."""
    rows = []
    for name, cls in OBJECTIVES.items():
        phases = ", ".join(phase.replace("_", "-") for phase in cls.phases)
        rows.append(
            (f"`{name}`", phases, text(paragraphs(cls)[0]), needs(cls), cost(cls), text(cls.when), text(cls.source))
        )
    return table(("name", "phases", "minimises", "needs", "cost", "when", "source"), rows)


def needs(cls: type[Objective]) -> str:
    """What an objective cannot do without."""
    kinds = "any" if cls.signals == EVERY_KIND else " or ".join(cls.signals)
    parts = [f"a teacher signal, {kinds}" if cls.signals else "no teacher signal"]
    if cls.reward_needed == "required":
        parts.append("a verifier for every prompt")
    elif cls.reward_needed == "used":
        parts.append("verifiers, for the prompts that have one")
    if cls.groups:
        parts.append("several responses per prompt")
    if cls.own_samples_only:
        parts.append("only responses that the student sampled, uncut")
    return "; ".join(parts)


def cost(cls: type[Objective]) -> str:
    """What a step costs beside the update itself."""
    parts = []
    if "on_policy" in cls.phases:
        parts.append(f"rollouts{', several per prompt' if cls.groups else ''}")
    else:
        parts.append("the teacher's responses, once")
    if cls.signals:
        parts.append("the teacher's forward pass over them")
    if cls.teacher_log_probs:
        parts.append("4 bytes/token beside the signal")
    if cls.needs_reference is not Objective.needs_reference:
        parts.append("with a reference, a further engine's forward pass and signal")
    if cls.next_length_limit is not Objective.next_length_limit:
        parts.append("may shorten the rollouts")
    if cls.reward_needed != "unused":
        parts.append("verification on the CPU, beside the loop")
    return "; ".join(parts)


def objective_settings() -> str:
    """A row a setting of an objective."""
    rows = []
    for name, cls in OBJECTIVES.items():
        texts, hints, defaults = documentation(cls), type_hints(cls), cls()
        for option in cls.options():
            default = getattr(defaults, option)
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            row = (f"`{name}`", f"`{option}`", f"{shown}", describe(hints[option]), text(texts.get(option, "")))
            rows.append(row)
    return table(("objective", "`loss.options.`", "default", "range", "meaning"), rows)


def divergences() -> str:
    """A row a divergence."""
    rows = []
    for name, cls in DIVERGENCES.items():
        formula, *notes = paragraphs(cls)
        bounded = "yes" if cls.is_f_divergence else "no"
        rows.append((f"`{name}`", text(formula), divergence_settings(cls), bounded, text(" ".join(notes))))
    return table(("name", "D(p, q), p the teacher", "settings (default)", "f-divergence", "notes"), rows)


def divergence_settings(cls: type[Divergence]) -> str:
    """Parameters and where they are set."""
    own = asdict(cls())  # type: ignore[call-overload]
    return ", ".join(
        f"`loss.{name}` ({getattr(LossConfig(), name)})" if name in OF_LOSS else f"`loss.options.{name}` ({default})"
        for name, default in own.items()
    )


def resumable_settings() -> str:
    """A row a setting that a resumed run may change."""
    may_change = set(resumable(Config))
    rows = [(f"`{name}`", text(meaning)) for name, _, meaning in settings() if name in may_change]
    return table(("setting", "meaning"), rows)


def metrics() -> str:
    """A row a metric."""
    rows = [
        (f"`{metric.name}`", metric.unit, OVER[over], text(metric.text))
        for over in OVER
        for metric in METRICS.values()
        if metric.over == over
    ]
    return table(("name", "unit", "over", "meaning"), rows)


def columns() -> str:
    """A row a column of a file."""
    files = (PROMPTS, RESPONSES, PROBLEMS)
    rows = [
        (f"`{one.name}`", one.type, one.meaning, one.without, *("yes" if file in one.files else "" for file in files))
        for one in COLUMNS
    ]
    return table(("column", "type", "meaning", "without it", *(f"`{file}`" for file in files)), rows)


def tasks() -> str:
    """The names of the tasks that generate their questions."""
    return textwrap.fill(", ".join(task_names()), 125, break_on_hyphens=False) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "columns": columns,
    "objectives": objectives,
    "objective_settings": objective_settings,
    "divergences": divergences,
    "metrics": metrics,
    "resumable": resumable_settings,
    "support": markdown_table,
    "tasks": tasks,
}
"""The tables by the name in their documents."""


def paragraphs(cls: type) -> list[str]:
    """Of a class's docstring."""
    return (inspect.getdoc(cls) or "").split("\n\n")


def text(source: str) -> str:
    """reStructuredText of a docstring as one line of Markdown."""
    line = " ".join(source.split()).replace("``", "`")
    line = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", line)
    code = line.split("`")
    # Outside of code spans: what Markdown would read as a tag or as emphasis.
    code[::2] = [re.sub(r"([<*_])", r"\\\1", part) for part in code[::2]]
    return "`".join(code).replace("|", r"\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def filled(document: str) -> str:
    """A document with its tables made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]()}\n{block[3]}", document)


def main(arguments: Sequence[str]) -> int:
    """Writes, or with ``--check`` compares: then 1 if a document is not up to date."""
    stale = []
    for path in sorted(DOCS.glob("*.md")):
        document = path.read_text()
        if (made := filled(document)) != document:
            stale.append(path.name)
            if "--check" not in arguments:
                path.write_text(made)
    if stale:
        print(f"{'not up to date, run `make docs`' if '--check' in arguments else 'written'}: {', '.join(stale)}")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
