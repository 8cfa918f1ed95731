"""The teacher answers: vLLM engines with its checkpoint generate responses into Parquet shards.

A response is identified by prompt uid, mode and sample; those that a shard already holds are not generated again, so
an interrupted generation continues where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from s2w.actors.calls import each
from s2w.actors.place import Reserve, nothing_reserved
from s2w.config.schema import Config
from s2w.data.placeholders import context_columns
from s2w.data.prompts import build_prompts
from s2w.models.checkpoint import ModelReference
from s2w.models.modes import supported_modes
from s2w.models.pair import ModelPair
from s2w.observe.progress import Countdown, Progress
from s2w.records import Mode, Prompt, Request, Rollout
from s2w.rollout.pool import RolloutPool
from s2w.teacher.routing import DEFAULT
from s2w.teacher_data.ceiling import Ceiling
from s2w.teacher_data.engines import engine_settings, generating_engines
from s2w.teacher_data.response import Response
from s2w.teacher_data.shards import VOCABULARY, ShardStore, vocabulary_hash


def teacher_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The training prompts, each in every mode of the run; one that names its own mode only in that mode."""
    modes: list[Mode] = list(config.data.modes) or list(supported_modes(tokenizer))
    columns = context_columns(config)
    by_mode = [build_prompts(config.data, tokenizer, config.run.seed, [mode], columns=columns)[0] for mode in modes]
    count = config.off_policy.prompts
    versions = [same[:count] for same in by_mode]
    unique = {(prompt.uid, prompt.mode): prompt for same in zip(*versions, strict=True) for prompt in same}
    return list(unique.values())


def open_store(config: Config, models: ModelPair, directory: Path) -> ShardStore:
    """The shards of this run's generation.

    Raises:
        ConfigError: the directory holds responses that were generated with other settings.
    """
    off = config.off_policy
    template = models.student.tokenizer.chat_template
    provenance: dict[str, Any] = {
        "teacher": config.teacher.model,
        "revision": config.teacher.revision,
        "dtype": config.teacher.dtype,
        "temperature": off.temperature,
        "top_p": off.top_p,
        "top_k": off.top_k,
        "max_tokens": off.max_tokens,
        "seed": config.run.seed,
        VOCABULARY: vocabulary_hash(models.student.tokenizer),
        "chat_template_sha256": hashlib.sha256(str(template).encode()).hexdigest(),
        "chat_template_kwargs": dict(config.data.chat_template_kwargs),
        "system_prompt": config.data.system_prompt,
    }
    return ShardStore(directory, provenance)


async def generate(
    config: Config,
    models: ModelPair,
    prompts: list[Prompt],
    store: ShardStore,
    device: str,
    progress: Progress,
    ceiling: Ceiling | None = None,
    reserve: Reserve = nothing_reserved,
) -> None:
    """Generates the responses that ``store`` lacks; starts the teacher's engines only if it lacks any, and ends them.

    If interrupted, it first writes what is finished.

    Args:
        ceiling: the held-out evaluation of the teacher, which these engines make first; None for none.
        reserve: finds places for the engines.
    """
    off = config.off_policy
    there = store.keys()
    requests = [
        Request(prompt, sample, off.max_tokens)
        for sample in range(off.samples_per_prompt)
        for prompt in prompts
        if (prompt.uid, prompt.mode, sample) not in there
    ]
    total = len(prompts) * off.samples_per_prompt
    if not requests:
        progress.say(f"all {total:,} responses of the teacher are in {store.directory}")
        return
    settings = engine_settings(config)
    progress.say(
        f"generating the teacher's responses to {len(prompts):,} prompts: {len(requests):,} of {total:,} to go; "
        f"starting {settings.engines} engines ..."
    )
    max_model_len = config.data.max_prompt_tokens + off.max_tokens
    async with generating_engines(
        config,
        settings,
        ModelReference.of(config.teacher.model, config.teacher.revision),
        device=device,
        max_model_len=max(max_model_len, ceiling.max_model_len(DEFAULT)) if ceiling else max_model_len,
        vocab_size=models.vocabulary.vocab_size,
        stop_token_ids=models.teacher.eos_token_ids,
        name="teacher",
        watcher=progress,
        reserve=reserve,
    ) as pool:
        if ceiling:
            await ceiling.measure_with(pool)
        with progress.countdown("generating", len(requests)) as countdown:
            writer = ShardWriter(store, models.student.tokenizer, off.shard_responses, countdown)
            if config.run.deterministic:
                await write_in_batches(pool, requests, writer)
            else:
                await write(pool, requests, writer)


class ShardWriter:
    """Collects finished rollouts and writes a shard whenever there are enough.

    Args:
        countdown: of all responses, for the progress lines.
    """

    def __init__(
        self,
        store: ShardStore,
        tokenizer: PreTrainedTokenizerBase,
        shard_responses: int,
        countdown: Countdown,
    ) -> None:
        self.store, self.tokenizer = store, tokenizer
        self.shard_responses, self.countdown = shard_responses, countdown
        self.finished: list[Rollout] = []
        self.written = 0

    def add(self, rollout: Rollout) -> None:
        """Adds one rollout; it is on disk once its shard is full or :meth:`flush` was called."""
        self.finished.append(rollout)
        self.countdown.add(len(rollout.token_ids))
        if len(self.finished) == self.shard_responses:
            self.flush()

    def flush(self) -> None:
        """Writes the pending rollouts, if there are any."""
        if not self.finished:
            return
        texts = self.tokenizer.batch_decode([r.token_ids.tolist() for r in self.finished], skip_special_tokens=True)
        self.store.add(
            [
                Response(rollout.prompt, rollout.sample, rollout.token_ids, text, rollout.finish_reason)
                for rollout, text in zip(self.finished, texts, strict=True)
            ]
        )
        self.written += len(self.finished)
        self.finished = []
        self.countdown.say(f"{self.written:,} of {self.countdown.total:,} responses written")


async def write(pool: RolloutPool, requests: Sequence[Request], writer: ShardWriter) -> None:
    """Generates the responses; however it ends, all finished ones are written."""
    try:
        await each(requests, pool.generate, at_once=pool.at_once, done=lambda _, rollout: writer.add(rollout))
    finally:
        writer.flush()


async def write_in_batches(pool: RolloutPool, requests: Sequence[Request], writer: ShardWriter) -> None:
    """Generates shard by shard, each repeatable bit for bit; slower, since a shard waits for its longest response."""
    size = writer.shard_responses
    for start in range(0, len(requests), size):
        for rollout in await pool.generate_batch(requests[start : start + size]):
            writer.add(rollout)
    writer.flush()
