"""The program behind ``s2w sample``: a student, and beside it a teacher, answer prompts while one reads along."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import psutil
import ray

from s2w.actors.failures import reported
from s2w.actors.stopping import run_stoppable
from s2w.config.bounds import check_bounds
from s2w.config.options import read_options
from s2w.config.schema import SampleRollout, SampleRun
from s2w.data.questions import Question, as_prompts, with_system_prompt
from s2w.errors import ConfigError
from s2w.eval.grading import Grader
from s2w.launch.check import check_batches, check_engine, check_pool, reserved
from s2w.launch.cluster import connected
from s2w.launch.conversation import Speaker, converse
from s2w.launch.run_directory import trained_model
from s2w.launch.sample_prompts import known_questions, typed_questions
from s2w.launch.sizing import itemsize_of
from s2w.models.checkpoint import Checkpoint, ModelReference, read_checkpoint
from s2w.models.generation import recommended_sampling
from s2w.models.modes import soft_switch, supported_modes
from s2w.models.shapes import shape_of
from s2w.models.shards import check_weights
from s2w.models.tokenizers import token_count
from s2w.observe.progress import Progress
from s2w.observe.transcript import make_transcript
from s2w.plan.engine_memory import GIB
from s2w.records import Mode, Prompt, Sampling
from s2w.rollout.serving import serving
from s2w.rollout.thinking import check_thinking_budget

PROCESS_BYTES = GIB
"""What an engine's processes take on the CPU besides weights and KV cache."""
WEIGHT_COPIES = 2
"""On the CPU vLLM packs the weights for its products, beside those that it has read."""


@dataclass
class Side:
    """One of the models that answer."""

    name: str
    """student or teacher."""
    config: SampleRollout
    revision: str | None
    checkpoint: Checkpoint
    prompts: list[Prompt] = field(default_factory=list)
    """All of them; none where they are typed."""

    @property
    def title(self) -> str:
        return f"{self.name} {self.checkpoint.reference}"

    def sampling(self, mode: Mode) -> Sampling:
        """The settings, where none is given as the checkpoint recommends."""
        own, config = recommended_sampling(self.checkpoint, mode), self.config
        return Sampling(
            own.temperature if config.temperature is None else config.temperature,
            own.top_p if config.top_p is None else config.top_p,
            own.top_k if config.top_k is None else config.top_k,
        )

    def length(self, longest_typed: int) -> int:
        """Longest prompt plus response, in tokens; where the context is shorter, responses end with it."""
        longest = max((len(prompt.token_ids) for prompt in self.prompts), default=longest_typed)
        return min(longest + self.config.max_tokens, self.checkpoint.max_model_len or sys.maxsize)


def sample(run: SampleRun, texts: Sequence[str] = (), file: Path | None = None) -> None:
    """Prints the responses as they come.

    Args:
        texts: prompts of the command line.
        file: of prompts; without texts and file they come from standard input.

    Raises:
        ConfigError: bad input; nothing was started.
        RunError: an engine failed.
        KeyboardInterrupt: SIGINT or SIGTERM came.
    """
    check_bounds(run)
    sides = list(_sides(run))
    questions = known_questions(texts, file)
    for question in questions or []:
        for side, prompt in zip(sides, _ask(run, question, sides), strict=True):
            side.prompts.append(prompt)
    log = Path(tempfile.gettempdir(), f"s2w-sample-{os.getpid()}.log")
    with reported(lambda: log, lambda: "run it again"), connected(run.cluster) as (device, resources):
        for side in sides:
            check_pool("rollout" if side.name == "student" else "teacher", side.config, device, resources)
        groups = [sides]
        # Elsewhere than on this machine alone, nobody knows where they will run.
        free = psutil.virtual_memory().available if len(ray.nodes()) == 1 else None
        if why := _too_large_together(sides, device, resources, free):
            if questions is None:
                raise ConfigError(
                    f"{why}: typed prompts need both models at once; give the prompts with --prompt or in a file, and "
                    "one model answers after the other"
                )
            print(f"{why}: one after the other", file=sys.stderr)
            groups = [[side] for side in sides]
        for group in groups:
            run_stoppable(_sample(run, group, device))


def _sides(run: SampleRun) -> Iterator[Side]:
    """The models, checked as far as they can be before anything starts."""
    yield _side("student", "rollout", run.rollout, run.model, run.revision)
    if run.teacher:
        given = dict(run.teacher)
        model, revision = given.pop("model", None), given.pop("revision", None)
        if not isinstance(model, str):
            raise ConfigError("teacher.model is not set: write --teacher MODEL")
        config = read_options(run.rollout, given, "teacher.", also=("model", "revision"))
        yield _side("teacher", "teacher", config, model, revision)


def _side(name: str, section: str, config: SampleRollout, model: str, revision: str | None) -> Side:
    check_batches(section, config)
    checkpoint = read_checkpoint(trained_model(model), revision)
    check_weights(checkpoint)
    check_engine(section, config, checkpoint.config)
    if config.thinking_budget is not None:
        check_thinking_budget(config.thinking_budget, f"{section}.thinking_budget", config, checkpoint.tokenizer)
    return Side(name, config, revision, checkpoint)


def _ask(run: SampleRun, question: Question, sides: Sequence[Side]) -> list[Prompt]:
    """The question as a prompt of each side.

    Raises:
        ConfigError: a chat template cannot ask for its mode or rejects it, or it is too long.
    """
    question = with_system_prompt(question, run.system_prompt)
    wanted = soft_switch(question.messages) or run.mode or question.mode
    prompts = []
    for side, mode in zip(sides, _modes(wanted, sides), strict=True):
        [prompt] = as_prompts([(question, mode)], side.checkpoint.tokenizer, ("sample", run.seed), {})
        context = side.checkpoint.max_model_len
        if context is not None and len(prompt.token_ids) >= context:
            raise ConfigError(
                f"prompt {prompt.uid!r} has {len(prompt.token_ids)} tokens, which leaves no room for a response in the "
                f"context of the {side.title}, {context} tokens"
            )
        prompts.append(prompt)
    return prompts


def _modes(wanted: Mode | None, sides: Sequence[Side]) -> list[Mode]:
    """Each side's mode: the one that is asked for, else the first that all have, else its own first.

    Raises:
        ConfigError: a chat template cannot ask for the wanted one.
    """
    able = [supported_modes(side.checkpoint.tokenizer) for side in sides]
    for side, modes in zip(sides, able, strict=True):
        if wanted is not None and wanted not in modes:
            raise ConfigError(
                f"mode {wanted} is asked for, but the chat template of the {side.title} has only {modes[0]}"
            )
    common = [mode for mode in able[0] if all(mode in modes for modes in able)]
    return [wanted or (common or modes)[0] for modes in able]


def _too_large_together(sides: Sequence[Side], device: str, resources: dict[str, float], free: int | None) -> str:
    """Why the engines of two sides cannot run at the same time; empty if they can.

    Args:
        resources: of the cluster, by Ray's names.
        free: memory in bytes that is free for engines on the CPU; None if it is not known.
    """
    for resource, amount in reserved([side.config for side in sides], device).items():
        if amount > (there := resources.get(resource, 0)):
            return f"the engines of both models need {amount:g} {resource}s, and the cluster has {there:g}"
    if device == "cpu" and free is not None and len(sides) > 1 and (needed := sum(map(_cpu_bytes, sides))) > free:
        return f"the engines of both models need about {needed / GIB:.1f} GiB, and {free / GIB:.1f} are free"
    return ""


def _cpu_bytes(side: Side) -> int:
    """About the memory that the engines of a side take on the CPU."""
    weights = shape_of(side.checkpoint.config).parameters * itemsize_of(side.config.dtype, "cpu")
    return side.config.engines * (WEIGHT_COPIES * weights + side.config.kv_cache_gib * GIB + PROCESS_BYTES)


async def _sample(run: SampleRun, sides: Sequence[Side], device: str) -> None:
    """Starts the engines of some sides at the same time, asks them all prompts, and ends them."""
    async with AsyncExitStack() as stack:
        speakers = []
        for side in sides:
            engines = serving(
                side.config,
                ModelReference.of(side.checkpoint.reference, side.revision),
                name=side.name,
                device=device,
                max_model_len=side.length(run.max_prompt_tokens),
                vocab_size=token_count(side.checkpoint.tokenizer),
                stop_token_ids=side.checkpoint.eos_token_ids,
                cluster=run.cluster,
            )
            pool = await stack.enter_async_context(engines)
            grader = stack.enter_context(Grader(side.checkpoint.tokenizer))
            sampling = {mode: side.sampling(mode) for mode in get_args(Mode)}
            speakers.append(Speaker(side.title, pool, grader, sampling))
        with Progress({}, verbose=run.cluster.log_to_driver, stream=sys.stderr) as progress:
            timeout_s = run.cluster.start_timeout_s
            await asyncio.gather(*(speaker.pool.start(0, timeout_s, progress) for speaker in speakers))
        transcript = make_transcript(sys.stdout, len(sides))
        at_once = run.rollout.max_sequences
        if sides[0].prompts:
            prompts = list(zip(*(side.prompts for side in sides), strict=True))
            headed = [(f"{i}/{len(prompts)}: {_text(same[0])}", same) for i, same in enumerate(prompts, 1)]
            await converse(speakers, headed, transcript, at_once)
            for speaker in speakers:
                if len(speaker.verdicts) > 1:
                    print(f"{speaker.name}: {sum(speaker.verdicts)} of {len(speaker.verdicts)} right")
            return
        async for question in typed_questions():
            try:
                same = _ask(run, question, sides)
                if (length := max(len(prompt.token_ids) for prompt in same)) > run.max_prompt_tokens:
                    raise ConfigError(
                        f"the prompt has {length} tokens, more than max_prompt_tokens={run.max_prompt_tokens}"
                    )
            except ConfigError as error:
                print(f"s2w: {error}", file=sys.stderr)
                continue
            await converse(speakers, [("", same)], transcript, at_once)


def _text(prompt: Prompt) -> str:
    """What is asked: the last user message."""
    return next(message["content"] for message in reversed(prompt.messages) if message["role"] == "user").strip()
