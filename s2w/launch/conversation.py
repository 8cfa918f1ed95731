"""Prompts to one or two models, and their responses as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from s2w.eval.grading import Grader
from s2w.models.text_stream import Piece, TextStream
from s2w.observe.transcript import Transcript
from s2w.records import Prompt, Request, Rollout, Sampling
from s2w.rollout.pool import RolloutPool


@dataclass
class Speaker:
    """A model whose engines are up."""

    name: str
    """What the transcript calls it."""
    pool: RolloutPool
    grader: Grader
    sampling: dict[str, Sampling]
    """By mode."""
    verdicts: list[bool] = field(default_factory=list)
    """Which of its responses were right, of those to prompts that have a verifier."""

    async def summary(self, rollout: Rollout) -> str:
        """How a response ended, and whether it is right."""
        prompt = rollout.prompt
        [graded] = await asyncio.to_thread(self.grader.grade, [rollout])
        parts = [
            f"{len(rollout.token_ids):,} tokens",
            rollout.finish_reason,
            f"{rollout.finished - rollout.started:.1f} s",
        ]
        if not graded.adherent:
            parts.append(f"not in {prompt.mode} mode")
        if graded.correct is not None:
            self.verdicts.append(graded.correct)
            reference = "" if graded.correct or prompt.answer is None else f", the answer is {prompt.answer!r}"
            parts.append(f"{'right' if graded.correct else 'wrong'} by {prompt.task}{reference}")
        return ", ".join(parts)


class _Response:
    """A response under way."""

    def __init__(self, speaker: Speaker, prompt: Prompt) -> None:
        self.speaker, self.prompt = speaker, prompt
        self._news: asyncio.Queue[Piece | Rollout] = asyncio.Queue()

    async def generate(self, room: asyncio.Semaphore) -> None:
        """Generates it, as soon as there is room."""
        prompt, speaker = self.prompt, self.speaker
        text = TextStream(speaker.grader.tokenizer, prompt.mode)
        async with room:
            async for part in speaker.pool.stream(Request(prompt, sampling=speaker.sampling[prompt.mode])):
                rollout = part if isinstance(part, Rollout) else None
                tokens = part.token_ids if isinstance(part, Rollout) else part
                for piece in text.read(tokens, last=rollout is not None):
                    self._news.put_nowait(piece)
                if rollout is not None:
                    self._news.put_nowait(rollout)

    async def show(self, index: int, transcript: Transcript) -> None:
        """Writes it as it comes."""
        while isinstance(news := await self._news.get(), Piece):
            transcript.write(index, news)
        transcript.end(index, await self.speaker.summary(news))


async def converse(
    speakers: Sequence[Speaker],
    prompts: Sequence[tuple[str, Sequence[Prompt]]],
    transcript: Transcript,
    at_once: int,
) -> None:
    """Asks every speaker every prompt; responses are generated ahead, and shown in order.

    Args:
        prompts: a heading each, and the prompt of each speaker.
        at_once: prompts that are generated at the same time.
    """
    room = asyncio.Semaphore(at_once * len(speakers))
    async with asyncio.TaskGroup() as group:
        under_way = []
        for heading, versions in prompts:
            responses = [_Response(speaker, prompt) for speaker, prompt in zip(speakers, versions, strict=True)]
            for response in responses:
                group.create_task(response.generate(room))
            under_way.append((heading, responses))
        for heading, responses in under_way:
            names = [f"{response.speaker.name} ({response.prompt.mode})" for response in responses]
            transcript.prompt(heading, names)
            if transcript.in_turn:
                for index, response in enumerate(responses):
                    await response.show(index, transcript)
            else:
                await asyncio.gather(*(response.show(i, transcript) for i, response in enumerate(responses)))
