"""A run's self-test before its first step: does the learner decode what the teacher computed? (``run.preflight``)

Two ways, depending on what the learner ranks have room for:

``divergence``
    The ranks load the teacher's checkpoint as their student. The run's rollout engines answer held-out prompts, its
    teacher scores them, the signals go through the run's wire, and the divergence of a student that is its own teacher
    must be zero up to rounding.
``log_probs``
    For teachers that the ranks cannot hold. A vLLM engine in the generate runner gives the teacher's log-probs of
    held-out prompts, and is stopped; then the learner decodes the same log-probs from the signals of the run. This
    checks teacher, wire and head; the student's side is what the probe after each swap compares.

A teacher whose signal is shifted by one position, another model's, or a uniform distribution is off by whole nats.
Before any model loads, both ways compare how the chat templates of teacher and student render the prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import ray

from s2w.actors.calls import each
from s2w.actors.hardware import resolve_dtype
from s2w.actors.place import Place
from s2w.config.schema import Config
from s2w.errors import ConfigError, PreflightError
from s2w.launch.job import Job, start_learner
from s2w.launch.places import reserve_engines
from s2w.learner.group import LearnerGroup
from s2w.models.checkpoint import ModelReference, read_checkpoint
from s2w.models.modes import render
from s2w.records import Prompt, Request, Rollout, Scored
from s2w.rollout.pool import RolloutPool
from s2w.teacher.routing import Teachers, routes, teacher_name, teacher_settings
from s2w.teacher_data.engines import engine_settings, generating_engines

PROMPTS = 8
"""Held-out prompts that are used."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest error that rounding explains, in nats/token."""

    divergence: float
    """Of a student that is its teacher: quadratic in the errors of log-probs."""
    log_prob: float
    """Mean |difference|."""


FLOAT32 = Tolerance(divergence=1e-6, log_prob=1e-3)
LOW_PRECISION = Tolerance(divergence=0.05, log_prob=0.25)
"""With bfloat16, float16 or float8 on the way: two implementations of a model's layers may differ by 0.14 nats per
log-prob, and another distribution differs by nats."""


def tolerance(config: Config, device: str) -> Tolerance:
    """What the run's own dtypes allow."""
    dtypes = {resolve_dtype(teacher.dtype, device) for teacher in teacher_settings(config).values()}
    dtypes.add(resolve_dtype(config.learner.dtype, device))
    exact = dtypes == {"float32"} and config.signal.dtype == "auto"
    return FLOAT32 if exact else LOW_PRECISION


def check_templates(config: Config, prompts: Sequence[Prompt]) -> None:
    """Checks that each teacher's own chat template renders the prompts to the tokens that it is going to score.

    Teachers without a template pass, and so do all where ``student.thinking_switch`` changes the student's.

    Raises:
        ConfigError: it does not; says where they differ.
    """
    if config.student.thinking_switch:
        return
    for name, teacher in teacher_settings(config).items():
        tokenizer = read_checkpoint(teacher.model, teacher.revision).tokenizer
        if not tokenizer.chat_template:
            continue
        for prompt in prompts[:PROMPTS]:
            try:
                text = render(tokenizer, prompt.messages, prompt.mode, config.data.chat_template_kwargs)
            except ConfigError as error:
                raise ConfigError(
                    f"run.preflight: the chat template of {name} ({teacher.model}) does not render prompt "
                    f"{prompt.uid!r} in mode {prompt.mode}, as the student's does: give both models one template"
                ) from error
            own = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"])
            shared = min(len(own), len(prompt.token_ids))
            parted = np.flatnonzero(own[:shared] != prompt.token_ids[:shared])
            if len(parted) or len(own) != len(prompt.token_ids):
                at = int(parted[0]) if len(parted) else shared
                sides = [tokenizer.decode(ids[max(at - 4, 0) : at + 8]) for ids in (own, prompt.token_ids)]
                raise ConfigError(
                    f"run.preflight: the chat template of {name} ({teacher.model}) renders prompt {prompt.uid!r} "
                    f"differently from the student's template from token {at} on ({sides[0]!r}, not {sides[1]!r}), "
                    "so it would score prompts in a format that is not its own: give both models one template"
                )


async def check_teachers_as_students(
    job: Job, rollouts: RolloutPool, teachers: Teachers, prompts: Sequence[Prompt], ranks: Sequence[Place]
) -> None:
    """``divergence``, before the run's learner starts: a learner group for each teacher, one after the other.

    Args:
        ranks: places of the learner's ranks.

    Raises:
        PreflightError: see :func:`check_divergence`.
    """

    async def generate_and_score(prompt: Prompt) -> Scored:
        rollout = await rollouts.generate(Request(prompt))
        return Scored(rollout, await teachers.score(rollout))

    samples = await each(prompts[:PROMPTS], generate_and_score)
    config, limit = job.config, tolerance(job.config, job.device)
    settings = teacher_settings(config)
    for name in sorted({sample.signal.name for sample in samples if sample.signal}):
        own = [sample for sample in samples if sample.signal and sample.signal.name == name]
        model = ModelReference.of(settings[name].model, settings[name].revision)
        learner = await start_learner(config, model, job, ranks)
        try:
            value = await check_divergence(learner, own, limit)
        finally:
            learner.shutdown()
        job.progress.say(f"preflight: a student equal to {name} has a divergence of {value:.1e} nats/token")


async def check_divergence(learner: LearnerGroup, samples: Sequence[Scored], limit: Tolerance) -> float:
    """The larger of forward and reverse KL, in nats/token, of a learner whose student is the samples' teacher.

    With signal ``sampled``, which has no distribution, it is the mean |difference| between the log-probs of teacher and
    student at the sampled tokens. (In an estimate of the reverse KL, errors of opposite signs would cancel; those of
    a shifted signal do, except at the first and the last position.)

    Raises:
        PreflightError: it is above the limit; names the worst sample.
    """
    sampled = learner.config.signal.kind == "sampled"
    if sampled:
        sums = await _log_prob_differences(learner, samples)
    else:
        sums = np.abs(await learner.evaluate_samples(samples, ["forward_kl", "reverse_kl"]))
    tokens = np.array([len(sample.rollout.sampled_rows) for sample in samples])
    means = sums / tokens[:, None]
    value = float(sums.sum(0).max() / tokens.sum())
    allowed = limit.log_prob if sampled else limit.divergence
    if not value <= allowed:
        worst = int(np.nan_to_num(means.max(1), nan=np.inf).argmax())
        raise PreflightError(
            f"preflight: a student equal to the teacher has a divergence of {value:.3g} nats/token through engines "
            f"and wire, more than {allowed:g} ({means[worst].max():.3g} in {samples[worst].rollout.uid}), so the "
            "learner does not decode what the teacher's checkpoint computes: look for shifted positions, another "
            "checkpoint or head, or a teacher engine that computes wrongly"
        )
    return value


async def _log_prob_differences(learner: LearnerGroup, samples: Sequence[Scored]) -> np.ndarray:
    """|log p - log q| summed over each sample's sampled tokens, at the loss's temperature: float64 [samples, 1]."""
    sums = []
    for sample, log_p in zip(samples, await learner.teacher_log_probs(samples), strict=True):
        rollout = sample.rollout
        log_q = await learner.probe(rollout.input_ids, learner.config.loss.temperature)
        log_q = log_q[-len(rollout.token_ids) :][rollout.sampled_rows]
        sums.append([np.abs(log_p.astype(np.float64) - log_q).sum()])
    return np.array(sums)


@dataclass(frozen=True, slots=True)
class Reference:
    """A prompt's second half as the response to its first, with the teacher's log-probs from its generate engine."""

    rollout: Rollout
    log_probs: np.ndarray
    """float32 [n], nats."""


async def write_references(job: Job, prompts: Sequence[Prompt]) -> list[Reference]:
    """``log_probs``, before the run's parts start: a generate engine for each teacher, one after the other."""
    config = job.config
    found = routes(config)
    references = []
    for name, teacher in teacher_settings(config).items():
        taken = [prompt for prompt in prompts[:PROMPTS] if teacher_name(found, prompt) == name]
        if not taken:
            continue
        settings = replace(engine_settings(replace(config, teacher=teacher)), engines=1)
        job.progress.say(f"preflight: log-probs of {name} from a generating engine ...")
        async with generating_engines(
            config,
            settings,
            ModelReference.of(teacher.model, teacher.revision),
            device=job.device,
            max_model_len=config.data.max_prompt_tokens + 1,
            vocab_size=job.models.vocabulary.vocab_size,
            stop_token_ids=job.models.teacher.eos_token_ids,
            name=name,
            watcher=job.progress,
            reserve=reserve_engines(config, job.device),
        ) as pool:
            for prompt in taken:
                rollout = split(prompt)
                [log_probs] = await pool.log_probs(rollout.input_ids)
                references.append(Reference(rollout, log_probs[-len(rollout.token_ids) :]))
    return references


def split(prompt: Prompt) -> Rollout:
    """The second half of a prompt's tokens as the response to the first; its candidates are these tokens."""
    middle = len(prompt.token_ids) // 2
    response = prompt.token_ids[middle:]
    return Rollout(
        prompt=replace(prompt, token_ids=prompt.token_ids[:middle]),
        sample=0,
        token_ids=response,
        log_probs=np.zeros(len(response), np.float32),
        versions=(),
        finish_reason="stop",
        engine=0,
        started=0.0,
        finished=0.0,
        candidates=ray.put(response[:, None]),
    )


async def check_references(
    job: Job, references: Sequence[Reference], teachers: Teachers, learner: LearnerGroup
) -> None:
    """``log_probs``, with the run's own learner; nothing to do without references.

    Raises:
        PreflightError: see :func:`check_log_probs`.
    """
    if not references:
        return
    signals = await each([reference.rollout for reference in references], teachers.score)
    samples = [Scored(reference.rollout, signal) for reference, signal in zip(references, signals, strict=True)]
    value = await check_log_probs(learner, references, samples, tolerance(job.config, job.device))
    job.progress.say(f"preflight: the learner's log-probs of the teacher are off by {value:.1e} nats on average")


async def check_log_probs(
    learner: LearnerGroup, references: Sequence[Reference], samples: Sequence[Scored], limit: Tolerance
) -> float:
    """Mean |difference|, in nats, between the references and what the learner decodes from the samples' signals.

    Tokens that a ``topk`` signal says nothing about are left out.

    Raises:
        PreflightError: it is above the limit.
    """
    decoded = await learner.teacher_log_probs(samples)
    expected = np.concatenate([reference.log_probs for reference in references])
    difference = np.abs(np.concatenate(decoded) - expected)
    known = ~np.isnan(difference)
    value = float(difference[known].mean()) if known.any() else math.nan
    if not value <= limit.log_prob:
        raise PreflightError(
            f"preflight: the log-probs that the learner decodes from the teacher's signal differ by {value:.3g} nats "
            f"on average from those of the teacher in a generating engine, more than {limit.log_prob:g}, over "
            f"{known.sum()} tokens: look for shifted positions, another checkpoint or head, or a teacher engine "
            "that computes wrongly"
        )
    return value
