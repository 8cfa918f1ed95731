"""The console command ``s2w``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from s2w.actors.stopping import INTERRUPTED, handling_stop_signals
from s2w.errors import ConfigError, PreflightError, RunError

if TYPE_CHECKING:
    from s2w.config.compose import Root

USAGE = """\
s2w: strong-to-weak distillation of large language models

usage:
  s2w train [OVERRIDE ...]   distil: off-policy if off_policy.steps is set, then on-policy: generate -> score ->
                             KL update -> hot swap
  s2w train --help           every setting, its default and its meaning; the ready experiments
  s2w generate [OVERRIDE ...]
                             only the teacher's responses of the off-policy phase, filtered; same settings as train
  s2w eval model=MODEL [OVERRIDE ...] [--json FILE]
                             pass@1, pass@k, mode adherence and length of a checkpoint, by mode
  s2w eval --help            every setting of it
  s2w report RUN [--output DIR]
                             one page about a run directory, finished or not: figures, before and after, samples,
                             where the time went; it goes to RUN/report
  s2w signals RUN [--output FILE.png]
                             what cheaper teacher signals would have given in a run with signal.bias_every: a table, and
                             a figure in RUN/signals.png
  s2w --help                 this text

OVERRIDE is Hydra's: a group (experiment=smollm2, teacher=qwen3_32b) or a setting (rollout.engines=2).
  --config-dir DIR           looks for groups in DIR too
  --cfg                      only prints the resolved configuration

SIGINT (Ctrl-C) or SIGTERM, even in the background, ends a run after the update or save under way, saves, and exits with
130; a second one ends it at once, and the last checkpoint stands. run.resume=true continues.

examples:
  s2w train experiment=smollm2 rollout.engines=2
  s2w train teacher.model=Qwen/Qwen3-32B student.model=Qwen/Qwen3-4B data.path=prompts.jsonl
  s2w eval model=Qwen/Qwen3-4B eval=math500 eval.samples=16 eval.k=[1,4,16] --json math500.json
  s2w report runs/smollm2-20260101-120000
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0 on success, 1 if a run failed, 2 if the input is bad, 130 if it was interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    command, *rest = arguments
    commands = {"train": _train, "generate": _generate, "eval": _eval, "report": _report, "signals": _signals}
    try:
        if command not in commands:
            raise ConfigError(f"unknown command {command}: the commands are {', '.join(commands)}")
        # SIGTERM like SIGINT, even where a shell has SIGINT ignored; a run has its own handlers.
        with handling_stop_signals(signal.default_int_handler):
            return commands[command](rest)
    except KeyboardInterrupt:
        print("s2w: interrupted", file=sys.stderr)
        return INTERRUPTED
    except ConfigError as error:
        print(f"s2w: {error}", file=sys.stderr)
        return 2
    except (PreflightError, RunError) as error:
        print(f"s2w: {error}", file=sys.stderr)
        return 1


def _train(arguments: list[str]) -> int:
    from s2w.config.schema import Config

    config = _configuration(Config, arguments)
    if config is None:
        return 0
    from s2w.launch.train import train

    return train(config)


def _generate(arguments: list[str]) -> int:
    from s2w.config.schema import Config

    config = _configuration(Config, arguments)
    if config is None:
        return 0
    from s2w.launch.generate import generate

    return generate(config)


def _eval(arguments: list[str]) -> int:
    from s2w.config.schema import EvalRun

    output, arguments = _option(arguments, "--json", "a file")
    run = _configuration(EvalRun, arguments)
    if run is None:
        return 0
    if output is not None:
        run.eval.output = output
    from s2w.launch.evaluate import evaluate

    evaluate(run)
    return 0


def _report(arguments: list[str]) -> int:
    run, output = _run_and_output(arguments, "report", "a directory", "DIR")
    from s2w.report.page import write_report

    print(write_report(run, output))
    return 0


def _signals(arguments: list[str]) -> int:
    run, output = _run_and_output(arguments, "signals", "a file", "FILE.png")
    from s2w.report.signal_bias import write_signals

    table, path = write_signals(run, output)
    print(table)
    print(path)
    return 0


def _run_and_output(arguments: list[str], command: str, what: str, placeholder: str) -> tuple[Path, Path | None]:
    """The run directory that a command is about, and where its result goes."""
    output, runs = _option(arguments, "--output", what)
    if len(runs) != 1 or runs[0].startswith("-"):
        raise ConfigError(f"s2w {command} needs one run directory, and takes --output {placeholder}")
    return Path(runs[0]), Path(output) if output else None


def _option(arguments: list[str], name: str, what: str) -> tuple[str | None, list[str]]:
    """The value of an option, None if it is not there, and the other arguments."""
    if name not in arguments:
        return None, arguments
    at = arguments.index(name)
    value = "".join(arguments[at + 1 : at + 2])
    if not value:
        raise ConfigError(f"{name} needs the name of {what}")
    return value, arguments[:at] + arguments[at + 2 :]


def _configuration(kind: type[Root], arguments: list[str]) -> Root | None:
    """The configuration that the arguments ask for; None if they only ask for a text, which is printed."""
    from s2w.config import compose

    if any(argument in ("-h", "--help") for argument in arguments):
        print(compose.help_text(kind), end="")
        if "loss" in kind.__annotations__:
            from s2w import objectives

            print(f"\n{objectives.help_text()}\n{objectives.divergences.help_text()}", end="")
        return None
    directories, overrides, show = [], [], False
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config-dir":
            directories.append(Path(next(rest, "")))
        elif argument == "--cfg":
            show = True
        else:
            overrides.append(argument)
    config = compose.compose_as(kind, overrides, directories)
    if show:
        print(compose.to_yaml(config), end="")
        return None
    return config


if __name__ == "__main__":
    raise SystemExit(main())
