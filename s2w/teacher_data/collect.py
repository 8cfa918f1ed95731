"""The responses that the student trains on: generated, or read from a file, then filtered; and what was dropped."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from pathlib import Path

from s2w.actors.place import Reserve, nothing_reserved
from s2w.config.schema import Config
from s2w.data.verifier_process import VerifierProcess
from s2w.errors import ConfigError
from s2w.models.modes import opens_thinking
from s2w.models.pair import ModelPair
from s2w.observe.progress import Progress
from s2w.teacher_data.batches import Split, split
from s2w.teacher_data.ceiling import Ceiling
from s2w.teacher_data.dataset import read_dataset
from s2w.teacher_data.filters import Filtered, apply_filters
from s2w.teacher_data.generate import generate, open_store, teacher_prompts
from s2w.teacher_data.response import Response
from s2w.teacher_data.shards import DROPPED, write_responses

TABLE = "filters.json"


class TeacherResponses:
    """The teacher's responses of a run, collected when they are first asked for: a resumed run may not need them.

    Args:
        directory, device, progress, ceiling, reserve: as in :func:`collect`.
    """

    def __init__(
        self,
        config: Config,
        models: ModelPair,
        device: str,
        directory: Path,
        progress: Progress,
        ceiling: Ceiling | None = None,
        reserve: Reserve = nothing_reserved,
    ) -> None:
        self._config, self._models, self._device = config, models, device
        self._directory, self._progress, self._ceiling, self._reserve = directory, progress, ceiling, reserve
        self._filtered: Filtered | None = None
        self._split: Split | None = None

    async def split(self) -> Split:
        """Those to train on and the held-out ones.

        Raises:
            ConfigError: as in :func:`collect` and :func:`~s2w.teacher_data.batches.split`.
        """
        if self._split is None:
            heldout = self._config.off_policy.heldout_responses
            self._split = split((await self.filtered()).kept, heldout, self._config.run.seed)
        return self._split

    async def filtered(self) -> Filtered:
        """All of them; dropped ones with the filter that dropped them."""
        if self._filtered is None:
            self._filtered = await collect(
                self._config,
                self._models,
                self._device,
                self._directory,
                self._progress,
                self._ceiling,
                self._reserve,
            )
        return self._filtered


async def collect(
    config: Config,
    models: ModelPair,
    device: str,
    directory: Path,
    progress: Progress,
    ceiling: Ceiling | None = None,
    reserve: Reserve = nothing_reserved,
) -> Filtered:
    """The responses, as kept and dropped by the filters; missing ones are generated first.

    Writes the shards, ``filters.json`` and ``dropped.parquet`` (with the column ``reason``) into ``directory``.

    Args:
        device: the engines', cuda or cpu.
        ceiling: the held-out evaluation of the teacher, made with the engines that generate; None for none.
        reserve: finds places for the engines that generate.

    Raises:
        ConfigError: the dataset cannot be read, or nothing passes the filters; the message shows the table.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if config.off_policy.path is not None:
        provenance = {"path": config.off_policy.path}
        responses = await asyncio.to_thread(read_dataset, config, models)
    else:
        prompts = teacher_prompts(config, models.student.tokenizer)
        store = open_store(config, models, directory)
        provenance = store.provenance
        await generate(config, models, prompts, store, device, progress, ceiling, reserve)
        responses = store.read(prompts, config.off_policy.samples_per_prompt)
    filtered = await _filter(config, models, responses)
    (directory / TABLE).write_text(json.dumps(filtered.table(), indent=2) + "\n")
    dropped = [response for response, _ in filtered.dropped]
    write_responses(directory / DROPPED, dropped, provenance, reasons=[reason for _, reason in filtered.dropped])
    if not filtered.kept:
        # A run that computed nothing, because it was given the responses, leaves no directory.
        where = f"; {directory / DROPPED} holds them" if config.off_policy.path is None else ""
        raise ConfigError(f"none of the teacher's responses passed the filters{where}:\n{filtered.text()}")
    progress.say(filtered.text())
    return filtered


async def _filter(config: Config, models: ModelPair, responses: list[Response]) -> Filtered:
    """Filters in a thread; if this is cancelled, closing the verifier ends the thread."""
    filters = config.off_policy.filters
    with ExitStack() as stack:
        verifies = filters.verified and any(response.prompt.task for response in responses)
        return await asyncio.to_thread(
            apply_filters,
            responses,
            filters,
            max_tokens=config.off_policy.max_tokens,
            max_prompt_tokens=config.data.max_prompt_tokens,
            opened=opens_thinking(models.student.tokenizer),
            verifier=stack.enter_context(VerifierProcess()) if verifies else None,
        )
