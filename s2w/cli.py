"""The console command ``s2w``."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Collection
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
  s2w data [FILE] [OVERRIDE ...] [--json FILE]
                             what a run's prompts are: counts by mode, task and verifier, lengths, repetitions, the
                             first prompt of each mode as the model reads it; same settings as train, FILE is data.path
  s2w plan [OVERRIDE ...] [--json FILE]
                             whether that run fits the cluster, where everything goes, what it takes; nothing starts
  s2w eval model=MODEL [OVERRIDE ...] [--json FILE]
                             pass@1, pass@k, mode adherence and length of a checkpoint, by mode
  s2w eval --help            every setting of it
  s2w sample MODEL [FILE] [--prompt TEXT] [--teacher MODEL] [--mode think|no_think] [OVERRIDE ...]
                             responses of a checkpoint or of a run's newest one, as they come, the teacher's beside
                             them: to a text (--prompt may be repeated), to the rows of a file, or to lines on standard
                             input, typed at a terminal or piped
  s2w sample --help          every setting of it
  s2w report RUN [--output DIR]
                             one page about a run directory, finished or not: figures, before and after, samples,
                             where the time went; it goes to RUN/report
  s2w report RUN RUN ... [--output DIR]
                             one page that compares runs: settings that differ, held-out curves, cost, responses to the
                             same prompts; it goes to comparison/ beside the first
  s2w signals RUN [--output FILE.png]
                             what cheaper teacher signals would have given in a run with signal.bias_every: a table, and
                             a figure in RUN/signals.png
  s2w doctor [--address HOST:PORT] [--nodes N] [--dir DIR]
                             what runs trip over, on this machine or on all nodes of the Ray cluster (waits for N):
                             driver, NCCL, /dev/shm, disks, clocks, ports, models, versions, token; DIR is for runs
  s2w --help                 this text

OVERRIDE is Hydra's: a group (experiment=smollm2, teacher=qwen3_32b) or a setting (rollout.engines=2).
  --config-dir DIR           looks for groups in DIR too: experiment=my_job is DIR/experiment/my_job.yaml
  --cfg                      only prints the resolved configuration
  -q, --quiet                train, generate, eval: only warnings, errors and the summary
  -v, --verbose              train, generate, eval: also what the actors' libraries (vLLM, DeepSpeed) and Ray log

SIGINT (Ctrl-C) or SIGTERM, even in the background, ends a run after the update or save under way, saves, and exits with
130; a second one ends it at once, and the last checkpoint stands. s2w train run.resume=true run.dir=DIR continues.

examples:
  s2w train experiment=smollm2 rollout.engines=2
  s2w train teacher.model=Qwen/Qwen3-32B student.model=Qwen/Qwen3-4B data.path=prompts.jsonl
  s2w data prompts.jsonl student.model=Qwen/Qwen3-4B
  s2w plan teacher=qwen3_32b student=qwen3_4b data.path=prompts.jsonl cluster.nodes='[{gpus: 8, gpu_memory_gib: 80}]'
  s2w eval model=Qwen/Qwen3-4B eval=math500 eval.samples=16 eval.k=[1,4,16] --json math500.json
  s2w sample runs/smollm2-20260101-120000 --teacher HuggingFaceTB/SmolLM2-135M-Instruct --prompt "What is 17 + 25?"
  s2w report runs/smollm2-20260101-120000
"""
OVERRIDE = re.compile(r"[+~]*[A-Za-z_][\w.]*=")
"""How a setting on the command line begins."""

DATA_USAGE = """\
usage: s2w data [FILE] [OVERRIDE ...] [--json FILE]

Prints what a run would make of its prompts: training and held-out ones by mode and by what verifies them, quantiles of
their lengths, how many are too long, repetitions, and the first prompt of each mode with its special tokens.

FILE stands for data.path=FILE. Overrides are those of s2w train; data, student.model, student.thinking_switch and
run.seed count here. Without student.model nothing is rendered, and lengths are in characters.
  --json FILE                writes the same for scripts
  --config-dir DIR           looks for groups in DIR too

The exit code is 2 if a run would refuse the prompts, with the reason in a sentence.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0 on success, 1 if a run failed, 2 if the input is bad or a plan does not fit, 130 if it was interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    command, *rest = arguments
    commands = {
        "train": _train,
        "generate": _generate,
        "data": _data,
        "plan": _plan,
        "eval": _eval,
        "sample": _sample,
        "report": _report,
        "signals": _signals,
        "doctor": _doctor,
    }
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

    quiet, arguments = _verbosity(arguments)
    config = _configuration(Config, arguments)
    if config is None:
        return 0
    from s2w.launch.train import train

    return train(config, quiet=quiet)


def _generate(arguments: list[str]) -> int:
    from s2w.config.schema import Config

    quiet, arguments = _verbosity(arguments)
    config = _configuration(Config, arguments)
    if config is None:
        return 0
    from s2w.launch.generate import generate

    return generate(config, quiet=quiet)


def _data(arguments: list[str]) -> int:
    from s2w.config.schema import Config

    if any(argument in ("-h", "--help") for argument in arguments):
        print(DATA_USAGE, end="")
        return 0
    output, arguments = _option(arguments, "--json", "the name of a file")
    file = None
    if arguments and not arguments[0].startswith("-") and ("=" not in arguments[0] or Path(arguments[0]).is_file()):
        file, *arguments = arguments
    config = _configuration(Config, arguments, ["teacher.model", "student.model"])
    if config is None:
        return 0
    if file is not None:
        config.data.path = file
    from s2w.launch.describe import describe

    describe(config, Path(output) if output else None)
    return 0


def _plan(arguments: list[str]) -> int:
    from s2w.config.schema import Config

    output, arguments = _option(arguments, "--json", "the name of a file")
    config = _configuration(Config, arguments)
    if config is None:
        return 0
    from s2w.launch.plan import plan

    return plan(config, output)


def _eval(arguments: list[str]) -> int:
    from s2w.config.schema import EvalRun

    output, arguments = _option(arguments, "--json", "the name of a file")
    quiet, arguments = _verbosity(arguments)
    run = _configuration(EvalRun, arguments)
    if run is None:
        return 0
    if output is not None:
        run.eval.output = output
    from s2w.launch.evaluate import evaluate

    evaluate(run, quiet=quiet)
    return 0


def _sample(arguments: list[str]) -> int:
    from s2w.config.schema import SampleRun

    settings: list[str] = []
    for option, setting, what in (("--teacher", "teacher.model", "a model"), ("--mode", "mode", "a mode")):
        value, arguments = _option(arguments, option, what)
        settings += [f"{setting}={_quoted(value)}"] if value is not None else []
    texts: list[str] = []
    while "--prompt" in arguments:
        text, arguments = _option(arguments, "--prompt", "a text")
        texts += [text] if text is not None else []
    names, given = _names(arguments)
    if len(names) > 2:
        raise ConfigError(
            f"s2w sample takes a model and one file of prompts: put {names[2]!r} in quotes, after --prompt"
        )
    settings += [f"model={_quoted(name)}" for name in names[:1]]
    run = _configuration(SampleRun, [*settings, *given])
    if run is None:
        return 0
    from s2w.launch.sample import sample

    sample(run, texts, Path(names[1]) if len(names) == 2 else None)
    return 0


def _names(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments that are neither settings nor options, and the others."""
    names, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config-dir":
            others += [argument, next(rest, "")]
        elif argument in ("-h", "--help", "--cfg") or OVERRIDE.match(argument):
            others.append(argument)
        elif argument.startswith("-"):
            raise ConfigError(f"there is no option {argument!r}: settings are written as rollout.max_tokens=512")
        else:
            names.append(argument)
    return names, others


def _quoted(text: str) -> str:
    """The text as a quoted string of Hydra's grammar."""
    return "'" + text.replace("'", "\\'") + "'"


def _report(arguments: list[str]) -> int:
    runs, output = _runs_and_output(arguments, "the name of a directory")
    if not runs:
        raise ConfigError("s2w report needs a run directory, or several to compare, and takes --output DIR")
    if len(runs) == 1:
        from s2w.report.page import write_report

        print(write_report(runs[0], output))
    else:
        from s2w.report.several import write_comparison

        print(write_comparison(runs, output))
    return 0


def _signals(arguments: list[str]) -> int:
    runs, output = _runs_and_output(arguments, "the name of a file")
    if len(runs) != 1:
        raise ConfigError("s2w signals needs one run directory, and takes --output FILE.png")
    from s2w.report.signal_bias import write_signals

    table, path = write_signals(runs[0], output)
    print(table)
    print(path)
    return 0


def _doctor(arguments: list[str]) -> int:
    address, arguments = _option(arguments, "--address", "a Ray head, HOST:PORT")
    nodes, arguments = _option(arguments, "--nodes", "a count")
    directory, arguments = _option(arguments, "--dir", "the name of a directory")
    if arguments:
        raise ConfigError(f"s2w doctor takes --address HOST:PORT, --nodes N and --dir DIR, not {arguments[0]!r}")
    if nodes is not None and not (nodes.isdecimal() and int(nodes)):
        raise ConfigError(f"--nodes {nodes}: must be a whole number >= 1")
    from s2w.launch.doctor import doctor

    return doctor(address, int(nodes or 1), directory)


def _runs_and_output(arguments: list[str], what: str) -> tuple[list[Path], Path | None]:
    """The run directories that a command is about, and where its result goes: ``what`` it is."""
    output, runs = _option(arguments, "--output", what)
    if unknown := [run for run in runs if run.startswith("-")]:
        raise ConfigError(f"there is no option {unknown[0]}: the only one is --output")
    return [Path(run) for run in runs], Path(output) if output else None


def _verbosity(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether a run is to be quiet, and the other arguments; a verbose one has a setting among them."""
    quiet, verbose = (any(one in names for one in arguments) for names in (("-q", "--quiet"), ("-v", "--verbose")))
    if quiet and verbose:
        raise ConfigError("-q and -v ask for less and for more output: write one of them")
    rest = [one for one in arguments if one not in ("-q", "--quiet", "-v", "--verbose")]
    return quiet, rest + ["cluster.log_to_driver=true"] * verbose


def _option(arguments: list[str], name: str, what: str) -> tuple[str | None, list[str]]:
    """The value of an option, None if it is not there, and the other arguments."""
    if name not in arguments:
        return None, arguments
    at = arguments.index(name)
    value = "".join(arguments[at + 1 : at + 2])
    if not value:
        raise ConfigError(f"{name} needs {what}")
    return value, arguments[:at] + arguments[at + 2 :]


def _configuration(kind: type[Root], arguments: list[str], may_be_missing: Collection[str] = ()) -> Root | None:
    """The configuration that the arguments ask for; None if they only ask for a text, which is printed.

    Args:
        may_be_missing: as in :func:`s2w.config.compose.compose_as`.
    """
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
        option, equals, value = argument.partition("=")
        if option == "--config-dir":
            if not (directory := value if equals else next(rest, "")):
                raise ConfigError("--config-dir needs the name of a directory")
            directories.append(Path(directory))
        elif argument == "--cfg":
            show = True
        else:
            overrides.append(argument)
    config = compose.compose_as(kind, overrides, directories, may_be_missing)
    if show:
        print(compose.to_yaml(config), end="")
        return None
    return config


if __name__ == "__main__":
    raise SystemExit(main())
