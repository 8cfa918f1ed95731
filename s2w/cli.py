"""The console command ``s2w``."""

from __future__ import annotations

import sys
from pathlib import Path

USAGE = """\
s2w: strong-to-weak distillation of large language models

usage:
  s2w train [OVERRIDE ...]   distil: generate -> score -> KL update -> hot swap
  s2w train --help           every setting, its default and its meaning; the ready experiments
  s2w --help                 this text

OVERRIDE is Hydra's: a group (experiment=smollm2, teacher=qwen3_32b) or a setting (rollout.engines=2).
  --config-dir DIR           looks for groups in DIR too
  --cfg                      prints the resolved configuration and does nothing else

examples:
  s2w train experiment=smollm2 rollout.engines=2
  s2w train teacher.model=Qwen/Qwen3-32B student.model=Qwen/Qwen3-4B data.path=prompts.jsonl
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 0 when it did its work, 1 when a run failed, 2 when the input is bad."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    command, *rest = arguments
    from s2w.errors import ConfigError

    try:
        if command != "train":
            raise ConfigError(f"unknown command {command}: the commands are train")
        return _train(rest)
    except ConfigError as error:
        print(f"s2w: {error}", file=sys.stderr)
        return 2


def _train(arguments: list[str]) -> int:
    from s2w import compose

    if any(argument in ("-h", "--help") for argument in arguments):
        print(compose.help_text(), end="")
        return 0
    directories, overrides, show = [], [], False
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config-dir":
            directories.append(Path(next(rest, "")))
        elif argument == "--cfg":
            show = True
        else:
            overrides.append(argument)
    config = compose.compose(overrides, directories)
    if show:
        print(compose.to_yaml(config), end="")
        return 0
    from s2w.train import train

    return train(config)


if __name__ == "__main__":
    raise SystemExit(main())
