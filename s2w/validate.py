"""Refuses bad settings before anything starts; nothing here loads a model or touches the cluster."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from s2w.config import Config, LoopConfig, Objective, Preflight, SignalDtype, SignalKind, StudentInit
from s2w.errors import ConfigError
from s2w.learner.carriage import carries
from s2w.learner.divergence import make_divergence
from s2w.models.checkpoint import Checkpoint, read_checkpoint
from s2w.models.tokenizers import SharedVocabulary, compare_tokenizers
from s2w.modes import add_thinking_switch
from s2w.records import Prompt
from s2w.rollout.thinking import check_thinking_budget
from s2w.teacher.routing import DEFAULT, routes, teacher_settings

DTYPES = ("auto", "bfloat16", "float16", "float32")
MAY_CHANGE = (
    "cluster.", "run.", "rollout.engines", "rollout.cpus", "rollout.threads", "rollout.kv_cache_gib",
    "teacher.replicas", "teacher.cpus", "teacher.threads", "teacher.kv_cache_gib", "learner.cpus", "learner.threads",
    "signal.bias_every", "loop.steps", "loop.eval_every", "loop.checkpoint_every", "loop.keep_checkpoints",
    "off_policy.engines", "off_policy.shard_responses", "off_policy.eval_every", "off_policy.checkpoint_every",
)  # fmt: skip
"""Settings that a resumed run may change: they do not change what is computed. A trailing dot is a whole section."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What validation found out and the run needs."""

    teacher: Checkpoint
    student: Checkpoint
    vocabulary: SharedVocabulary
    max_model_len: int
    """Longest prompt plus response, tokens."""


def check(config: Config, *, generating: bool = False) -> Facts:
    """Checks all that can be known without the cluster.

    Args:
        generating: the teacher's responses are generated, even if off_policy.steps is 0.

    Raises:
        ConfigError: one sentence: what is wrong, where, what to write instead.
    """
    _check_numbers(config)
    _check_loss(config)
    _check_signal(config)
    _check_preflight(config)
    _check_reward(config)
    _check_off_policy(config)
    _check_run_directory(config)
    teachers = teacher_settings(config)
    _check_routes(config)
    teacher = read_checkpoint(config.teacher.model, config.teacher.revision)
    student = read_checkpoint(config.student.model, config.student.revision)
    vocabulary = compare_tokenizers(teacher, student)
    others = {}
    for name, settings in teachers.items():
        if name != DEFAULT:
            others[name] = read_checkpoint(settings.model, settings.revision)
            if (shared := compare_tokenizers(others[name], student).vocab_size) != vocabulary.vocab_size:
                raise ConfigError(
                    f"teachers.{name} shares {shared} tokens with the student and `{DEFAULT}` {vocabulary.vocab_size}: "
                    "they must have the same vocabulary"
                )
    if config.student.thinking_switch:
        add_thinking_switch(student.tokenizer)
    if config.signal.kind in (SignalKind.topk, SignalKind.ids) and config.signal.top_k > vocabulary.vocab_size:
        raise ConfigError(
            f"signal.top_k={config.signal.top_k} is larger than the vocabulary of {vocabulary.vocab_size} tokens: "
            "write a smaller one, or signal.kind=hidden for the whole distribution"
        )
    if (budget := config.rollout.thinking_budget) is not None:
        check_thinking_budget(budget, "rollout.thinking_budget", config.rollout, student.tokenizer)
    length = config.data.max_prompt_tokens + config.rollout.max_tokens
    lengths = {"rollout.max_tokens": length}
    if generating or _uses_off_policy(config):
        lengths["off_policy.max_tokens"] = config.data.max_prompt_tokens + config.off_policy.max_tokens
    for setting, tokens in lengths.items():
        for side, checkpoint in (("teacher", teacher), ("student", student), *others.items()):
            if checkpoint.max_model_len is not None and tokens > checkpoint.max_model_len:
                raise ConfigError(
                    f"data.max_prompt_tokens + {setting} = {tokens} is more than the {side}'s context of "
                    f"{checkpoint.max_model_len} tokens: write smaller ones"
                )
    for setting, checkpoint, parallel in (
        ("teacher.tensor_parallel", teacher, config.teacher.tensor_parallel),
        ("rollout.tensor_parallel", student, config.rollout.tensor_parallel),
        *(
            (f"teachers.{name}.tensor_parallel", other, teachers[name].tensor_parallel)
            for name, other in others.items()
        ),
    ):
        heads = checkpoint.config.get_text_config().num_attention_heads
        if heads % parallel:
            raise ConfigError(f"{setting}={parallel} does not divide the {heads} attention heads of the model")
    return Facts(teacher, student, vocabulary, length)


def check_resources(config: Config, device: str, available: dict[str, float]) -> None:
    """Compares what the actors reserve with what the cluster has.

    Args:
        available: Ray's cluster resources.

    Raises:
        ConfigError: names the resource, how much is asked for, and how much there is.
    """
    if _uses_off_policy(config) and config.off_policy.path is None:
        check_generation(config, device, available)
    rollout, learner = config.rollout, config.learner
    teachers = list(teacher_settings(config).values())
    teacher_cpus = sum(teacher.replicas * teacher.cpus for teacher in teachers)
    cpus = teacher_cpus + rollout.engines * rollout.cpus + learner.ranks * learner.cpus
    there = available.get("CPU", 0)
    if cpus > there:
        raise ConfigError(
            f"the run reserves {cpus:g} CPUs (teachers {teacher_cpus:g}, rollout engines "
            f"{rollout.engines} x {rollout.cpus:g}, learner ranks {learner.ranks} x {learner.cpus:g}) but the cluster "
            f"has {there:g}: ask for fewer, or for smaller shares (teacher.cpus, rollout.cpus, learner.cpus)"
        )
    if device == "cuda":
        of_teachers = sum(t.replicas * t.tensor_parallel * t.pipeline_parallel for t in teachers)
        of_rollouts = rollout.engines * rollout.tensor_parallel * rollout.pipeline_parallel
        gpus = of_teachers + of_rollouts + learner.ranks * learner.gpus
        there = available.get("GPU", 0)
        if gpus > there:
            raise ConfigError(
                f"the run asks for {gpus:g} GPUs (teachers {of_teachers}, rollout engines {of_rollouts}, learner "
                f"{learner.ranks * learner.gpus:g}) but the cluster has {there:g}"
            )


def check_generation(config: Config, device: str, available: dict[str, float]) -> None:
    """:func:`check_resources` for the engines that generate the teacher's responses; nothing else runs beside them."""
    teacher = config.teacher
    engines = config.off_policy.engines or teacher.replicas
    world = teacher.tensor_parallel * teacher.pipeline_parallel
    needs = {"CPU": engines * teacher.cpus, "GPU": engines * world if device == "cuda" else 0}
    for resource, needed in needs.items():
        if needed > (there := available.get(resource, 0)):
            raise ConfigError(
                f"{engines} engines that generate the teacher's responses take {needed:g} {resource}s but the cluster "
                f"has {there:g}: write a smaller off_policy.engines"
            )


def _check_numbers(config: Config) -> None:
    at_least_one = {
        "teacher.replicas": config.teacher.replicas,
        "teacher.tensor_parallel": config.teacher.tensor_parallel,
        "teacher.pipeline_parallel": config.teacher.pipeline_parallel,
        "teacher.max_batched_tokens": config.teacher.max_batched_tokens,
        "teacher.max_sequences": config.teacher.max_sequences,
        "rollout.engines": config.rollout.engines,
        "rollout.tensor_parallel": config.rollout.tensor_parallel,
        "rollout.pipeline_parallel": config.rollout.pipeline_parallel,
        "rollout.max_tokens": config.rollout.max_tokens,
        "rollout.max_sequences": config.rollout.max_sequences,
        "learner.ranks": config.learner.ranks,
        "learner.tokens_per_micro_batch": config.learner.tokens_per_micro_batch,
        "signal.top_k": config.signal.top_k,
        "loss.chunk_rows": config.loss.chunk_rows,
        "loop.prompts_per_step": config.loop.prompts_per_step,
        "loop.samples_per_prompt": config.loop.samples_per_prompt,
        "loop.keep_checkpoints": config.loop.keep_checkpoints,
        "data.heldout_prompts": config.data.heldout_prompts,
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: write at least 1")
    at_least_zero = {
        "loop.steps": config.loop.steps,
        "loop.max_staleness": config.loop.max_staleness,
        "loop.eval_every": config.loop.eval_every,
        "loop.checkpoint_every": config.loop.checkpoint_every,
        "signal.bias_every": config.signal.bias_every,
        "learner.warmup_steps": config.learner.warmup_steps,
        "learner.weight_decay": config.learner.weight_decay,
        "learner.max_grad_norm": config.learner.max_grad_norm,
        "rollout.temperature": config.rollout.temperature,
    }
    for name, amount in at_least_zero.items():
        if amount < 0:
            raise ConfigError(f"{name}={amount}: write 0 or more")
    if config.learner.learning_rate <= 0 or not math.isfinite(config.learner.learning_rate):
        raise ConfigError(f"learner.learning_rate={config.learner.learning_rate}: write a number above 0")
    if config.learner.zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"learner.zero_stage={config.learner.zero_stage}: DeepSpeed has the stages 0, 1, 2 and 3")
    for name, dtype in (
        ("teacher.dtype", config.teacher.dtype),
        ("rollout.dtype", config.rollout.dtype),
        ("learner.dtype", config.learner.dtype),
    ):
        choices = tuple(d for d in DTYPES if d != "float16") if name == "learner.dtype" else DTYPES
        if dtype not in choices:
            raise ConfigError(f"{name}={dtype}: write one of {', '.join(choices)}")
    data = config.data
    for name, share in (("data.think_ratio", data.think_ratio), ("data.think_ratio_end", data.think_ratio_end)):
        if share is not None and not 0 <= share <= 1:
            raise ConfigError(f"{name}={share}: write a share from 0 to 1")
    if data.think_ratio_end is not None and data.think_ratio is None:
        raise ConfigError(
            f"data.think_ratio_end={data.think_ratio_end} without data.think_ratio: write where it starts"
        )
    if data.think_ratio is not None and len(data.modes) == 1:
        raise ConfigError(
            f"data.think_ratio={data.think_ratio} mixes two modes, and data.modes has {data.modes[0].value} alone: "
            "leave one of them out"
        )
    if config.loop.steps == config.off_policy.steps == 0:
        raise ConfigError("loop.steps=0 and off_policy.steps=0: there is nothing to do; give one of them steps")
    if config.cluster.device not in ("auto", "cuda", "cpu"):
        raise ConfigError(f"cluster.device={config.cluster.device}: write auto, cuda or cpu")
    if config.run.deterministic and config.loop.max_staleness:
        raise ConfigError(
            f"run.deterministic=true with loop.max_staleness={config.loop.max_staleness}: overlapped batches meet in "
            "the engines differently each time; write loop.max_staleness=0"
        )
    if config.student.init is StudentInit.pruned and config.student.keep_layers is None:
        raise ConfigError("student.init=pruned: say how many layers to keep with student.keep_layers")


def _check_loss(config: Config) -> None:
    loss = config.loss
    if loss.objective is Objective.cross_entropy:
        raise ConfigError(
            "loss.objective=cross_entropy: write divergence or grpo; the teacher's responses are learned in the "
            "off-policy phase (off_policy.loss=cross_entropy)"
        )
    if loss.temperature <= 0:
        raise ConfigError(f"loss.temperature={loss.temperature}: write a number above 0")
    try:
        make_divergence(loss.divergence, beta=loss.beta, alpha=loss.alpha)
    except ValueError as error:
        raise ConfigError(f"loss.divergence={loss.divergence}: {error}") from error
    if not 0 <= loss.discount <= 1:
        raise ConfigError(f"loss.discount={loss.discount}: write a number from 0 to 1")
    if loss.importance_limit is not None and loss.importance_limit <= 0:
        raise ConfigError(f"loss.importance_limit={loss.importance_limit}: write a number above 0, or null")
    if config.signal.kind is not SignalKind.sampled and (loss.discount or loss.importance_limit is not None):
        raise ConfigError(
            f"loss.discount and loss.importance_limit are for policy gradients from sampled tokens, and "
            f"signal.kind={config.signal.kind.value} has a distribution at each: write signal.kind=sampled, or leave "
            "them out"
        )
    carriage = carries(config.signal.kind.value, loss.divergence)
    if carriage.strength == "not possible":
        raise ConfigError(
            f"signal.kind={config.signal.kind.value} cannot carry loss.divergence={loss.divergence}: {carriage.reason}"
        )


def _check_reward(config: Config) -> None:
    reward, loop, rollout = config.reward, config.loop, config.rollout
    if reward.weight < 0:
        raise ConfigError(f"reward.weight={reward.weight}: write 0 or more")
    if not 0 < reward.clip_low < 1 or reward.clip_high <= 0:
        raise ConfigError(
            f"reward.clip_low={reward.clip_low}, reward.clip_high={reward.clip_high}: write a number between 0 and 1, "
            "and one above 0"
        )
    if not 0 <= loop.unreliable_weight <= 1:
        raise ConfigError(f"loop.unreliable_weight={loop.unreliable_weight}: write a number from 0 to 1")
    if loop.unreliable_weight < 1 and not config.off_policy.filters.verified:
        raise ConfigError(
            f"loop.unreliable_weight={loop.unreliable_weight} needs the verdicts on the teacher's answers: write "
            "off_policy.filters.verified=true"
        )
    grpo = config.loss.objective is Objective.grpo
    if not grpo and reward.weight == 0:
        return
    what = "loss.objective=grpo" if grpo else f"reward.weight={reward.weight}"
    if loop.samples_per_prompt < 2:
        raise ConfigError(
            f"{what} compares the responses to a prompt with each other: write loop.samples_per_prompt=2 or more"
        )
    if loop.off_policy_fraction:
        raise ConfigError(f"{what} learns from what the student sampled: write loop.off_policy_fraction=0")
    if rollout.temperature != config.loss.temperature or rollout.top_p != 1 or rollout.top_k != -1:
        raise ConfigError(
            f"{what} needs the log-probs of what was sampled: write rollout.temperature={config.loss.temperature} "
            "(that of the loss), rollout.top_p=1, rollout.top_k=-1"
        )


def _check_routes(config: Config) -> None:
    """Tasks that a teacher takes must be the run's."""
    for route in routes(config):
        for task in route.tasks:
            if config.data.tasks and task not in config.data.tasks:
                raise ConfigError(
                    f"teachers.{route.name}.tasks names {task!r}, which is not in data.tasks "
                    f"({', '.join(config.data.tasks)})"
                )


def check_verifiable(config: Config, prompts: Sequence[Prompt]) -> None:
    """GRPO learns from nothing but verified answers.

    Raises:
        ConfigError: names the first prompt that has no verifier.
    """
    if config.loss.objective is Objective.grpo:
        for prompt in prompts:
            if not prompt.task:
                raise ConfigError(
                    f"loss.objective=grpo needs prompts whose answers can be checked, and {prompt.uid!r} has neither "
                    "`task` nor `answer`"
                )


def _check_signal(config: Config) -> None:
    signal = config.signal
    if signal.bias_every and config.loss.objective is Objective.grpo:
        raise ConfigError(
            f"signal.bias_every={signal.bias_every}: with loss.objective=grpo no signal reaches the learner; write 0"
        )
    if signal.kind is SignalKind.hidden:
        return
    if signal.dtype is not SignalDtype.auto:
        raise ConfigError(
            f"signal.dtype={signal.dtype.value} says how hidden rows travel, and signal.kind={signal.kind.value} sends "
            "none: write signal.dtype=auto"
        )
    if signal.bias_every:
        raise ConfigError(
            f"signal.bias_every={signal.bias_every} compares with the whole distribution, which "
            f"signal.kind={signal.kind.value} does not have: write signal.kind=hidden, or signal.bias_every=0"
        )


def _check_preflight(config: Config) -> None:
    way, kind, temperature = config.run.preflight, config.signal.kind, config.loss.temperature
    if way is Preflight.log_probs and kind is not SignalKind.hidden and temperature != 1:
        raise ConfigError(
            f"run.preflight=log_probs compares log-probs at temperature 1, and signal.kind={kind.value} has those of "
            f"loss.temperature={temperature:g}: write run.preflight=divergence"
        )


def _check_off_policy(config: Config) -> None:
    off = config.off_policy
    at_least_one = {
        "samples_per_prompt": off.samples_per_prompt,
        "max_tokens": off.max_tokens,
        "shard_responses": off.shard_responses,
        "responses_per_step": off.responses_per_step,
        "prompts": 1 if off.prompts is None else off.prompts,
        "engines": 1 if off.engines is None else off.engines,
    }
    at_least_zero = {
        "steps": off.steps,
        "temperature": off.temperature,
        "heldout_responses": off.heldout_responses,
        "warmup_steps": off.warmup_steps,
        "eval_every": off.eval_every,
        "checkpoint_every": off.checkpoint_every,
        "filters.min_tokens": off.filters.min_tokens,
        "filters.loop_ngram": off.filters.loop_ngram,
        "filters.cjk_share": off.filters.cjk_share,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"off_policy.{name}={value}: write at least 1")
    for name, amount in at_least_zero.items():
        if amount < 0:
            raise ConfigError(f"off_policy.{name}={amount}: write 0 or more")
    if off.learning_rate <= 0 or not math.isfinite(off.learning_rate):
        raise ConfigError(f"off_policy.learning_rate={off.learning_rate}: write a number above 0")
    if off.path is not None and not Path(off.path).expanduser().exists():
        raise ConfigError(f"off_policy.path={off.path}: there is no such file or directory")
    if off.loss is Objective.grpo:
        raise ConfigError("off_policy.loss=grpo: write cross_entropy or divergence; the student samples nothing there")
    kind = config.signal.kind
    if not 0 <= config.loop.off_policy_fraction < 1:
        raise ConfigError(f"loop.off_policy_fraction={config.loop.off_policy_fraction}: write 0 or more, below 1")
    off_policy_prompts(config.loop)
    scored = [
        setting
        for setting, used in (
            ("off_policy.loss=divergence", off.steps and off.loss is Objective.divergence),
            (f"loop.off_policy_fraction={config.loop.off_policy_fraction}", config.loop.off_policy_fraction),
        )
        if used
    ]
    if scored and kind not in (SignalKind.hidden, SignalKind.topk):
        raise ConfigError(
            f"{scored[0]} with signal.kind={kind.value}: the student has not sampled the teacher's "
            "responses, so only hidden and topk say what is needed"
        )


def off_policy_prompts(loop: LoopConfig) -> int:
    """Prompts of a batch whose responses are the teacher's.

    Raises:
        ConfigError: ``loop.off_policy_fraction`` rounds to none of the prompts, or to all.
    """
    count = round(loop.off_policy_fraction * loop.prompts_per_step)
    if loop.off_policy_fraction and not 0 < count < loop.prompts_per_step:
        raise ConfigError(
            f"loop.off_policy_fraction={loop.off_policy_fraction} of loop.prompts_per_step={loop.prompts_per_step} "
            f"rounds to {count} prompts: write more prompts, or another fraction"
        )
    return count


def _uses_off_policy(config: Config) -> bool:
    """The run needs responses of the teacher in one of its phases."""
    loop = config.loop
    return config.off_policy.steps > 0 or loop.off_policy_fraction > 0 or loop.unreliable_weight < 1


def _check_run_directory(config: Config) -> None:
    """A run directory belongs to one configuration."""
    directory = Path(config.run.dir)
    stored = directory / "config.yaml"
    if not stored.exists():
        if config.run.resume:
            raise ConfigError(f"run.resume=true, but {directory} holds no run: there is no {stored}")
        return
    for name, before, now in _differences(OmegaConf.to_container(OmegaConf.load(stored)), _plain(config)):
        if not any(name.startswith(free) if free.endswith(".") else name == free for free in MAY_CHANGE):
            raise ConfigError(
                f"run.dir={directory} belongs to a run with {name}={before}, not {now}: "
                "choose another run.dir, or the settings of that run"
            )
    if not config.run.resume:
        raise ConfigError(
            f"run.dir={directory} already holds this run: add run.resume=true to continue it, or choose another run.dir"
        )


def _plain(config: Config) -> Any:
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(name), now.get(name), f"{prefix}{name}.")
    elif before != now:
        yield prefix.removesuffix("."), before, now
