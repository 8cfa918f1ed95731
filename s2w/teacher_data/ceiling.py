"""The teachers' own responses to the held-out prompts, once a run: the ceiling that its student is compared with."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from s2w.actors.calls import each
from s2w.actors.place import Reserve, nothing_reserved
from s2w.config.schema import Config
from s2w.eval.grading import Grader
from s2w.eval.heldout import heldout_responses, heldout_samples, make_heldout
from s2w.models.checkpoint import ModelReference, read_checkpoint
from s2w.models.pair import ModelPair
from s2w.observe.progress import Progress
from s2w.observe.recorder import Recorder
from s2w.records import Prompt, Request, Rollout, Sampling
from s2w.rollout.pool import RolloutPool
from s2w.teacher.routing import DEFAULT, contexts, routes, teacher_name, teacher_settings
from s2w.teacher_data.engines import engine_settings, generating_engines


class Ceiling:
    """Each held-out prompt answered by the teacher that scores it, sampled and graded as the student's responses are.

    A teacher with a privileged context reads it here too. What the run directory already holds is not measured again.

    Args:
        device: the engines', cuda or cpu.
        prompts: the held-out ones.
        context_tokens: the most tokens that each teacher's context adds to a prompt.
        reserve: finds places for the engines.
    """

    def __init__(
        self,
        config: Config,
        models: ModelPair,
        device: str,
        prompts: Sequence[Prompt],
        context_tokens: Mapping[str, int],
        recorder: Recorder,
        progress: Progress,
        reserve: Reserve = nothing_reserved,
    ) -> None:
        self._config, self._models, self._device = config, models, device
        self._context_tokens, self._recorder, self._progress = context_tokens, recorder, progress
        self._reserve = reserve
        found = routes(config)
        self._prompts = [(teacher_name(found, prompt), prompt) for prompt in prompts]
        self._contexts = contexts(config, models.student.tokenizer)
        self._rollouts: dict[int, Rollout] = {}
        """By the position of the prompt."""

    def max_model_len(self, name: str) -> int:
        """Tokens of the longest prompt plus response of a teacher."""
        data, rollout = self._config.data, self._config.rollout
        return data.max_prompt_tokens + max(0, self._context_tokens.get(name, 0)) + rollout.max_tokens

    async def measure_with(self, pool: RolloutPool) -> None:
        """Evaluates the first teacher with engines that are up for something else, if that is wanted."""
        wanted = self._config.loop.eval_teacher
        if wanted is None:
            wanted = all(name == DEFAULT for name, _ in self._prompts)
        if wanted and self._due():
            await self._generate(DEFAULT, pool)
            await self._record()

    async def measure(self) -> None:
        """With ``loop.eval_teacher=true``, evaluates the teachers that are left, each with its own pool, in turn."""
        if not self._config.loop.eval_teacher or not self._due():
            return
        for name, teacher in teacher_settings(self._config).items():
            if not self._missing(name):
                continue
            checkpoint = read_checkpoint(teacher.model, teacher.revision)
            settings = replace(engine_settings(replace(self._config, teacher=teacher)), engines=teacher.replicas)
            self._progress.say(f"held-out responses of {name} itself: starting {settings.engines} engines ...")
            async with generating_engines(
                self._config,
                settings,
                ModelReference.of(teacher.model, teacher.revision),
                device=self._device,
                max_model_len=self.max_model_len(name),
                vocab_size=self._models.vocabulary.vocab_size,
                stop_token_ids=checkpoint.eos_token_ids,
                name=name if name == DEFAULT else f"teacher {name}",
                watcher=self._progress,
                reserve=self._reserve,
            ) as pool:
                await self._generate(name, pool)
        await self._record()

    def _due(self) -> bool:
        """Without an on-policy phase there is no evaluation of the student to compare with."""
        return self._config.loop.steps > 0 and self._recorder.teacher_evaluation() is None

    def _missing(self, name: str) -> list[int]:
        """Positions of the prompts of a teacher that it has not responded to."""
        return [i for i, (taker, _) in enumerate(self._prompts) if taker == name and i not in self._rollouts]

    async def _generate(self, name: str, pool: RolloutPool) -> None:
        """One response to each prompt of a teacher, by engines with its checkpoint."""
        rollout, missing = self._config.rollout, self._missing(name)
        context = self._contexts.get(name)
        requests = [
            Request(
                context.prompt(prompt) if context else prompt,
                max_tokens=rollout.max_tokens,
                thinking_budget=rollout.thinking_budget,
                sampling=Sampling(rollout.temperature, rollout.top_p, rollout.top_k),
            )
            for prompt in (self._prompts[i][1] for i in missing)
        ]
        if self._config.run.deterministic:
            responses = await pool.generate_batch(requests)
        else:
            responses = await each(requests, pool.generate)
        for i, response in zip(missing, responses, strict=True):
            self._rollouts[i] = replace(response, prompt=self._prompts[i][1])

    async def _record(self) -> None:
        """Grades and writes the evaluation, once all prompts have their response."""
        if len(self._rollouts) < len(self._prompts):
            return
        rollouts = [self._rollouts[i] for i in range(len(self._prompts))]
        # If this is cancelled, closing the grader ends the thread.
        with Grader(self._models.student.tokenizer) as grader:
            graded = await asyncio.to_thread(grader.grade, rollouts)
            names = [name for name, _ in self._prompts]
            responses = heldout_responses(None, rollouts, graded, names, np.zeros((len(rollouts), 2)))
            result = make_heldout(responses)
            self._recorder.heldout(result, responses, heldout_samples(None, rollouts, graded, grader.text))
        self._progress.heldout(result)
