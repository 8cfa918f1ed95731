"""Prompts of a run: read or generated, rendered in their mode, tokenised once; and the order they are used in."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from s2w.config.schema import Config, DataConfig
from s2w.data.files import Row, read_rows
from s2w.data.tasks import derive_seed, generate
from s2w.data.verifiers import VERIFIERS, check_verifier
from s2w.errors import ConfigError, did_you_mean
from s2w.models.modes import render, soft_switch, supported_modes
from s2w.records import Mode, Prompt

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    """What a prompt is made from."""

    uid: str
    messages: tuple[dict[str, str], ...]
    task: str
    answer: str | None
    metadata: dict[str, Any]
    mode: Mode | None
    """None takes its turn among the run's modes."""


def build_prompts(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    modes: Sequence[Mode] = (),
    context_length: int | None = None,
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts.

    A prompt's mode is that of its file row, else the soft switch in its messages, else ``modes`` in turn, so that
    every task gets every mode in equal parts.

    Args:
        tokenizer: the student's; teacher and student share its vocabulary.
        seed: of generated tasks and of each prompt's first sample.
        modes: modes of the run; empty means all that the chat template can ask for.
        context_length: longest sequence, in tokens, that both models take.

    Raises:
        ConfigError: no or two sources, an unreadable row, a prompt that is too long, a mode the template lacks.
    """
    if bool(data.tasks) == bool(data.path):
        raise ConfigError(f"Set one of data.tasks and data.path{', not both' if data.path else ''}")
    if data.path:
        train, heldout = _file_sources(data)
    else:
        train, heldout = _task_sources(data, seed)
    if data.system_prompt is not None:
        system = {"role": "system", "content": data.system_prompt}
        train, heldout = ([_with_system(source, system) for source in sources] for sources in (train, heldout))
    chosen = tuple(modes) or supported_modes(tokenizer)
    of_task = _task_modes(data, {source.task for source in (*train, *heldout)})
    limit, limit_name = data.max_prompt_tokens, "data.max_prompt_tokens"
    if context_length is not None and context_length - 1 < limit:
        limit, limit_name = context_length - 1, "the models' context, less one token of response"
    kwargs = _plain(data.chat_template_kwargs)
    built = []
    for sources in (train, heldout):
        turns: dict[str, int] = {}
        prompt_modes = []
        for source in sources:
            own = of_task.get(source.task, chosen)
            # Asked for modes that the task does not have, its prompts keep to those that it has.
            allowed = [mode for mode in chosen if mode in own] or own
            prompt_modes.append(source.mode or _take_turn(source.task, allowed, turns))
        texts = [
            render(tokenizer, source.messages, mode, kwargs) for source, mode in zip(sources, prompt_modes, strict=True)
        ]
        # The template has written every special token already.
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        prompts = []
        for source, mode, ids in zip(sources, prompt_modes, encoded, strict=True):
            if len(ids) > limit:
                raise ConfigError(f"Prompt {source.uid!r} has {len(ids)} tokens, more than {limit} ({limit_name})")
            prompts.append(
                Prompt(
                    uid=source.uid,
                    messages=source.messages,
                    token_ids=np.asarray(ids, dtype=np.int32),
                    mode=mode,
                    seed=derive_seed("prompt", seed, source.uid),
                    task=source.task,
                    answer=source.answer,
                    metadata=source.metadata,
                )
            )
        built.append(prompts)
    return built[0], built[1]


@dataclasses.dataclass(frozen=True, slots=True)
class ThinkRatio:
    """Share of think mode among the prompts that may be in either, and its schedule."""

    first: float
    last: float
    steps: int
    """Batches from the first to the last."""
    thinking: Sequence[Prompt]
    """The prompts of the run, in think mode where they may be; beside them, in the same order, those that do not."""

    def at(self, batch: int) -> float:
        """Of a batch, the first being 0; linear, and constant after the last."""
        return self.first + (self.last - self.first) * min(1.0, batch / max(1, self.steps - 1))


class PromptStream:
    """Batches of prompts in a repeatable order: every epoch is its own permutation, each prompt in it once.

    A batch may span two epochs. Each use of a prompt has its own seed, so a second epoch samples anew.

    Args:
        prompts: of one run, always in the same order.
        prompts_per_step: size of a batch.
        seed: of the permutations and the samples.
        state: of an earlier stream over the same prompts, see :meth:`state_dict`.
        ratio: draws the mode anew for every batch; ``prompts`` are then in no_think mode where they may be. None
            leaves them as they are.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prompts_per_step: int,
        seed: int,
        state: dict[str, int] | None = None,
        ratio: ThinkRatio | None = None,
    ) -> None:
        if not prompts:
            raise ConfigError("There are no training prompts")
        if prompts_per_step < 1:
            raise ConfigError(f"loop.prompts_per_step must be at least 1, not {prompts_per_step}")
        self._prompts = list(prompts)
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._ratio = ratio
        self._epoch = self._position = self._batches = 0
        self._order = self._permutation()
        if state is not None:
            self.load_state_dict(state)

    @property
    def epoch(self) -> int:
        """Epoch of the next prompt, from 0."""
        return self._epoch

    def next_batch(self) -> list[Prompt]:
        """The next ``prompts_per_step`` prompts."""
        batch, indices = [], []
        for _ in range(self._prompts_per_step):
            index = int(self._order[self._position])
            seed = derive_seed("sample", self._seed, self._epoch, index)
            batch.append(dataclasses.replace(self._prompts[index], seed=seed))
            indices.append(index)
            self._position += 1
            if self._position == len(self._prompts):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._permutation()
        if self._ratio is not None:
            self._set_modes(batch, indices, self._ratio)
        self._batches += 1
        return batch

    def _set_modes(self, batch: list[Prompt], indices: Sequence[int], ratio: ThinkRatio) -> None:
        """Puts the wanted share of the batch into think mode: to the nearest prompt, and exactly on average."""
        free = [place for place, index in enumerate(indices) if ratio.thinking[index].mode != batch[place].mode]
        random = np.random.default_rng([self._seed, self._batches])
        count = int(ratio.at(self._batches) * len(free) + random.random())
        for place in random.permutation(free)[:count]:
            batch[place] = dataclasses.replace(ratio.thinking[indices[place]], seed=batch[place].seed)

    def state_dict(self) -> dict[str, int]:
        """Where the stream is, and what it runs over."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "batches": self._batches,
            "seed": self._seed,
            "prompts": len(self._prompts),
            "fingerprint": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at ``state``.

        Raises:
            ConfigError: the state belongs to other prompts or another seed.
        """
        own = self.state_dict()
        for name in ("seed", "prompts", "fingerprint"):
            if state[name] != own[name]:
                raise ConfigError(
                    f"Cannot resume: the checkpoint's prompts are not those of this run (its {name} was {state[name]}, "
                    f"now {own[name]})"
                )
        self._epoch, self._position, self._batches = state["epoch"], state["position"], state["batches"]
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        return np.random.default_rng([self._seed, self._epoch]).permutation(len(self._prompts))

    def _fingerprint(self) -> int:
        return derive_seed(*(prompt.uid for prompt in self._prompts))


def prompt_stream(
    config: Config, prompts: Sequence[Prompt], prompts_per_step: int, tokenizer: PreTrainedTokenizerBase
) -> PromptStream:
    """The on-policy phase's stream over the training ``prompts``, with the mode mix of ``data.think_ratio``.

    Raises:
        ConfigError: the chat template has not both modes.
    """
    data, seed = config.data, config.run.seed
    if data.think_ratio is None:
        return PromptStream(prompts, prompts_per_step, seed)
    thinking, plain = (build_prompts(data, tokenizer, seed, [mode])[0] for mode in ("think", "no_think"))
    last = data.think_ratio if data.think_ratio_end is None else data.think_ratio_end
    ratio = ThinkRatio(data.think_ratio, last, config.loop.steps, thinking)
    return PromptStream(plain, prompts_per_step, seed, ratio=ratio)


def _task_modes(data: DataConfig, tasks: set[str]) -> dict[str, tuple[Mode, ...]]:
    """``data.task_modes``.

    Raises:
        ConfigError: it names a task that no prompt has, or something else than modes.
    """
    modes = {}
    for task, given in _plain(data.task_modes).items():
        if task not in tasks:
            raise ConfigError(f"data.task_modes names {task!r}, which no prompt has{did_you_mean(task, tasks)}")
        if not isinstance(given, list) or not given or any(mode not in get_args(Mode) for mode in given):
            raise ConfigError(f"data.task_modes.{task}={given}: write a list of {' and '.join(get_args(Mode))}")
        modes[task] = tuple(given)
    return modes


def _task_sources(data: DataConfig, seed: int) -> tuple[list[_Source], list[_Source]]:
    splits: dict[str, list[list[_Source]]] = {"train": [], "heldout": []}
    names = list(data.tasks)
    all_options = _plain(data.task_options)
    if unused := all_options.keys() - set(names):
        raise ConfigError(f"data.task_options names {min(unused)!r}, which is not in data.tasks ({', '.join(names)})")
    for position, name in enumerate(names):
        if name in names[:position]:
            raise ConfigError(f"data.tasks names {name!r} twice")
        options = all_options.get(name) or {}
        train, heldout = generate(
            name,
            _share(data.train_prompts, position, names),
            _share(data.heldout_prompts, position, names),
            seed,
            options,
        )
        for split, entries in (("train", train), ("heldout", heldout)):
            splits[split].append(
                [
                    _Source(
                        uid=f"{name}/{split}/{i}",
                        messages=({"role": "user", "content": entry["question"]},),
                        task=name,
                        answer=entry["answer"],
                        metadata={"entry": entry, "options": options},
                        mode=None,
                    )
                    for i, entry in enumerate(entries)
                ]
            )
    return _interleave(splits["train"]), _interleave(splits["heldout"])


def _share(total: int, position: int, names: Sequence[str]) -> int:
    """Part of ``total`` for one of the tasks; the first ones take the remainder."""
    return total // len(names) + (position < total % len(names))


def _interleave(lists: list[list[_Source]]) -> list[_Source]:
    """a0 b0 c0 a1 b1 ...: any head of the result is mixed in equal parts."""
    longest = max(map(len, lists), default=0)
    return [sources[i] for i in range(longest) for sources in lists if i < len(sources)]


def _file_sources(data: DataConfig) -> tuple[list[_Source], list[_Source]]:
    assert data.path is not None
    path = Path(data.path).expanduser()
    rows = read_rows(path)
    if data.heldout_path is not None:
        heldout_path = Path(data.heldout_path).expanduser()
        heldout = [_source(heldout_path, i, row, "heldout") for i, row in enumerate(read_rows(heldout_path))]
        train = [_source(path, i, row, "train") for i, row in enumerate(rows)]
    else:
        if data.heldout_prompts >= len(rows):
            raise ConfigError(
                f"{str(path)!r} has {len(rows)} prompts, too few to hold out {data.heldout_prompts} "
                "(data.heldout_prompts)"
            )
        first = len(rows) - data.heldout_prompts
        train = [_source(path, i, row, "train") for i, row in enumerate(rows[:first])]
        heldout = [_source(path, i, row, "heldout") for i, row in enumerate(rows[first:])]
    seen = {_key(source.messages) for source in train}
    distinct = [source for source in heldout if _key(source.messages) not in seen]
    if len(distinct) < len(heldout):
        if not distinct:
            raise ConfigError(f"Every held-out prompt of {str(path)!r} is also a training prompt")
        logger.warning("Left out %d held-out prompts that are training prompts too.", len(heldout) - len(distinct))
    return train, distinct


def _source(path: Path, index: int, row: Row, split: str) -> _Source:
    where = f"{str(path)!r}, {split} row {index}"
    given = row.get("messages") if row.get("messages") is not None else row.get("prompt")
    if given is None:
        raise ConfigError(
            f"{where}, has neither `messages` nor `prompt`; its columns are: {', '.join(map(str, row)) or 'none'}"
        )
    messages = parse_messages(where, given)
    answer = row.get("answer")
    if answer is not None:
        answer = str(answer)
    task = row.get("task") or ("exact_match" if answer is not None else "")
    if task:
        check_verifier(task)
    metadata: dict[str, Any] = {}
    if task and task not in VERIFIERS:
        question = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        metadata["entry"] = {"question": question, "answer": answer, "metadata": row.get("metadata") or {}}
    mode = row.get("mode")
    switch = soft_switch(messages)
    if mode is not None and mode not in get_args(Mode):
        raise ConfigError(f"{where}, has mode {mode!r}; a mode is {' or '.join(get_args(Mode))}")
    if mode is not None and switch is not None and mode != switch:
        raise ConfigError(f"{where}, has mode {mode!r}, but its messages say /{switch}")
    return _Source(
        uid=f"{task or path.stem}/{split}/{index}",
        messages=messages,
        task=task,
        answer=answer,
        metadata=metadata,
        mode=mode or switch,
    )


def parse_messages(where: str, given: Any) -> tuple[dict[str, str], ...]:
    """Chat messages of a prompt: those given, or one user message with the given text.

    Args:
        where: file and row, for the error's text.

    Raises:
        ConfigError: they are no messages, or the last one is not the user's or is empty.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where}: a prompt is a string or a list of messages with `role` and `content`")
    for message in given:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise ConfigError(
                f"{where}: a message has a role ({', '.join(ROLES)}) and a content string, not {message!r}"
            )
    if given[-1]["role"] not in ("user", "tool") or all(message["role"] != "user" for message in given):
        raise ConfigError(f"{where}: the last message of a prompt is the user's, not the {given[-1]['role']}'s")
    check_not_empty(where, given)
    return tuple({"role": message["role"], "content": message["content"]} for message in given)


def check_not_empty(where: str, messages: Sequence[dict[str, str]]) -> None:
    """Raises ConfigError if the last message is the user's and says nothing."""
    if messages[-1]["role"] == "user" and not messages[-1]["content"].strip():
        raise ConfigError(f"{where}: the prompt is empty")


def _with_system(source: _Source, system: dict[str, str]) -> _Source:
    """A prompt's own system message stays."""
    if source.messages[0]["role"] == "system":
        return source
    return dataclasses.replace(source, messages=(system, *source.messages))


def _take_turn(task: str, modes: Sequence[Mode], turns: dict[str, int]) -> Mode:
    turn = turns.get(task, 0)
    turns[task] = turn + 1
    return modes[turn % len(modes)]


def _key(messages: Iterable[dict[str, str]]) -> str:
    return json.dumps(list(messages))


def _plain(value: Any) -> dict[str, Any]:
    """A dict of plain Python values, whether it comes from OmegaConf or not."""
    if isinstance(value, DictConfig):
        value = OmegaConf.to_container(value, resolve=True)
    return dict(value)
