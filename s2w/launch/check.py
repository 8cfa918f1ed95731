"""Refuses bad settings before anything starts; nothing here loads a model or touches the cluster.

The range of a single setting is declared beside it (:mod:`s2w.config.schema`); here are the checks across settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from s2w.actors.hardware import resolve_dtype
from s2w.config.bounds import check_bounds
from s2w.config.schema import DEFAULT_VERIFIER, Config, LoopConfig, RolloutConfig, StudentConfig, TeacherConfig
from s2w.data.files import rows
from s2w.data.verifiers import check_verifier
from s2w.errors import ConfigError, did_you_mean
from s2w.launch.run_directory import check_run_directory
from s2w.models.checkpoint import read_checkpoint
from s2w.models.modes import add_thinking_switch
from s2w.models.pair import ModelPair
from s2w.models.parallel import check_parallel
from s2w.models.shards import check_weights
from s2w.models.student import evenly_spaced
from s2w.models.tokenizers import compare_tokenizers
from s2w.objectives import Objective, objective_class
from s2w.objectives.divergences import DIVERGENCES, divergence_of, parameters_of
from s2w.objectives.support import signal_support
from s2w.observe.weights_and_biases import check_weights_and_biases
from s2w.records import Prompt
from s2w.rollout.thinking import check_thinking_budget
from s2w.teacher.routing import DEFAULT, context_lengths, reference_settings, routes, section, teacher_settings
from s2w.teacher_data.shards import response_files


def check(config: Config, *, generating: bool = False) -> ModelPair:
    """Checks everything that can be known without the cluster.

    Args:
        generating: the teacher's responses are generated, even if off_policy.steps is 0.

    Raises:
        ConfigError: one sentence: what is wrong, where, what to write instead.
    """
    teachers = check_settings(config)
    check_run_directory(config)
    if config.run.wandb:
        check_weights_and_biases()
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
    if config.signal.kind in ("topk", "ids") and config.signal.top_k > vocabulary.vocab_size:
        raise ConfigError(
            f"signal.top_k={config.signal.top_k} is larger than the vocabulary of {vocabulary.vocab_size} tokens: "
            "write a smaller one, or signal.kind=hidden for the whole distribution"
        )
    if (budget := config.rollout.thinking_budget) is not None:
        check_thinking_budget(budget, "rollout.thinking_budget", config.rollout, student.tokenizer)
    checkpoints = {DEFAULT: teacher, **others}
    contexts = {name: checkpoint.max_model_len for name, checkpoint in checkpoints.items()}
    length = check_lengths(config, teachers, contexts, student.max_model_len, generating)
    if on_policy(config).needs_reference:
        reference = reference_settings(config, config.student.model, config.student.revision)
        check_engine("reference", reference, student.config, _changed_fields(config.student))
    for name, settings in teachers.items():
        check_engine(section(name), settings, checkpoints[name].config)
        check_weights(checkpoints[name])
    if config.student.init == "pruned" and config.student.keep_layers is not None:
        evenly_spaced(student.config.get_text_config().num_hidden_layers, config.student.keep_layers)
    check_engine("rollout", config.rollout, student.config, _changed_fields(config.student))
    if config.student.init != "fresh":
        check_weights(student)
    return ModelPair(teacher, student, vocabulary, length)


def check_settings(config: Config) -> dict[str, TeacherConfig]:
    """The checks that need no model; returns the settings of every teacher by name. Errors as in :func:`check`."""
    check_bounds(config)
    _check_combinations(config)
    _check_loss(config)
    _check_signal(config)
    _check_preflight(config)
    _check_objective(config, on_policy(config))
    _check_off_policy(config)
    _check_verifier(config)
    teachers = teacher_settings(config)
    _check_routes(config)
    for name, settings in teachers.items():
        if name != DEFAULT:
            check_bounds(settings, f"teachers.{name}.")
    return teachers


def check_engine(
    section: str,
    engine: TeacherConfig | RolloutConfig,
    model: PretrainedConfig,
    overrides: dict[str, Any] | None = None,
) -> None:
    """Checks that a model can be laid out as an engine's settings ask, and that vLLM has the arguments that they add;
    ``overrides`` as in :func:`check_parallel`."""
    if engine.engine_args:
        from vllm import AsyncEngineArgs  # Takes seconds.

        known = {field.name for field in fields(AsyncEngineArgs)}
        if unknown := [name for name in engine.engine_args if name not in known]:
            raise ConfigError(
                f"{section}.engine_args: vLLM's AsyncEngineArgs has no {unknown[0]!r}{did_you_mean(unknown[0], known)}"
            )
    check_parallel(
        section,
        model,
        tensor_parallel=engine.tensor_parallel,
        pipeline_parallel=engine.pipeline_parallel,
        expert_parallel=engine.expert_parallel,
        overrides=overrides,
    )


def _changed_fields(student: StudentConfig) -> dict[str, Any]:
    """Fields of the student's configuration that differ from those of ``student.model``."""
    if student.init == "pruned":
        return {"num_hidden_layers": student.keep_layers}
    return dict(student.overrides) if student.init == "fresh" else {}


def check_lengths(
    config: Config,
    teachers: Mapping[str, TeacherConfig],
    contexts: Mapping[str, int | None],
    student_context: int | None,
    generating: bool,
) -> int:
    """Checks that prompts and responses fit the models' contexts and the teachers' engines.

    Args:
        contexts: longest sequence of each teacher's model, tokens; None if it does not say.
        generating: as in :func:`check`.

    Returns:
        The student's longest prompt plus response, tokens.
    """
    data, off = config.data, config.off_policy
    length = data.max_prompt_tokens + config.rollout.max_tokens
    lengths = {"rollout.max_tokens": length}
    if generating or uses_off_policy(config):
        lengths["off_policy.max_tokens"] = data.max_prompt_tokens + off.max_tokens
    scored = {"rollout.max_tokens": config.loop.steps > 0, "off_policy.max_tokens": bool(_scored_responses(config))}
    for setting, tokens in lengths.items():
        for side, context in (*contexts.items(), ("student", student_context)):
            if context is not None and tokens > context:
                raise ConfigError(
                    f"data.max_prompt_tokens + {setting} = {tokens} is more than the {side}'s context of {context} "
                    "tokens: write smaller ones"
                )
        for name, teacher in teachers.items():
            if scored[setting] and teacher.max_model_len is not None and teacher.max_model_len < tokens:
                raise ConfigError(
                    f"{section(name)}.max_model_len={teacher.max_model_len} is less than data.max_prompt_tokens + "
                    f"{setting} = {tokens}, which it has to score: must be >= {tokens}, or null"
                )
    for name, teacher in teachers.items():
        context = contexts[name]
        if teacher.max_model_len is not None and context is not None and teacher.max_model_len > context:
            raise ConfigError(
                f"{section(name)}.max_model_len={teacher.max_model_len} is more than the model's context of {context} "
                "tokens: write a smaller one, or null"
            )
    return length


def check_gradients(config: Config, device: str) -> None:
    """Raises ConfigError if the learner would not accumulate gradients in float32."""
    learner = config.learner
    if learner.zero_stage == 0 and (dtype := resolve_dtype(learner.dtype, device)) != "float32":
        raise ConfigError(
            f"learner.zero_stage=0 would accumulate gradients in {dtype}: write learner.zero_stage=1, or "
            "learner.dtype=float32"
        )


def _check_combinations(config: Config) -> None:
    data = config.data
    if data.think_ratio_end is not None and data.think_ratio is None:
        raise ConfigError(f"data.think_ratio_end={data.think_ratio_end} needs data.think_ratio, its start value")
    if data.think_ratio is not None and len(data.modes) == 1:
        raise ConfigError(
            f"data.think_ratio={data.think_ratio} mixes two modes, but data.modes has only {data.modes[0]}: "
            "remove one of the settings"
        )
    if config.loop.steps == config.off_policy.steps == 0:
        raise ConfigError("loop.steps=0 and off_policy.steps=0: there is nothing to do: set one of them above 0")
    if config.run.deterministic and config.loop.max_staleness:
        raise ConfigError(
            f"run.deterministic=true with loop.max_staleness={config.loop.max_staleness}: overlapping batches mix "
            "differently in the engines each time; write loop.max_staleness=0"
        )
    for name, teacher in teacher_settings(config).items():
        check_batches(section(name), teacher)
    check_batches("rollout", config.rollout)
    _check_shares(config)
    if config.student.init == "pruned" and config.student.keep_layers is None:
        raise ConfigError("student.init=pruned: set student.keep_layers to the number of layers to keep")


def _check_shares(config: Config) -> None:
    """Raises ConfigError if shares of a GPU do not go together."""
    learner, rollout = config.learner, config.rollout
    engines = {section(name): teacher for name, teacher in teacher_settings(config).items()} | {"rollout": rollout}
    for name, engine in engines.items():
        if engine.gpus < 1 and (world := engine.tensor_parallel * engine.pipeline_parallel) > 1:
            raise ConfigError(
                f"{name}.gpus={engine.gpus:g} and {world} workers (tensor_parallel x pipeline_parallel): an engine "
                f"that has a share of a GPU has one worker: write {name}.gpus=1, or 1 for both"
            )
    if learner.gpus < 1 and learner.ranks > 1:
        raise ConfigError(
            f"learner.gpus={learner.gpus:g} and learner.ranks={learner.ranks}: NCCL refuses two ranks on one GPU: "
            "write learner.gpus=1 or learner.ranks=1"
        )
    if config.loop.steps and (learner.gpus < 1) != (rollout.gpus < 1):
        raise ConfigError(
            f"learner.gpus={learner.gpus:g} and rollout.gpus={rollout.gpus:g}: either both have GPUs of their own (1), "
            "or both are on one (below 1), where new weights pass from one to the other in its memory"
        )
    if learner.gpus < 1 and config.loop.steps and learner.gpus + rollout.engines * rollout.gpus > 1:
        raise ConfigError(
            f"learner.gpus={learner.gpus:g} and rollout.engines={rollout.engines} of rollout.gpus={rollout.gpus:g} "
            "must be on one GPU: write shares whose sum is at most 1"
        )


def check_pool(section: str, pool: RolloutConfig, device: str, available: dict[str, float]) -> None:
    """Raises ConfigError if the cluster is too small for the engines of a pool."""
    for resource, amount in reserved([pool], device).items():
        if amount > (there := available.get(resource, 0)):
            raise ConfigError(
                f"{section}.engines={pool.engines} reserve {amount:g} {resource}s, but the cluster has {there:g}"
            )


def reserved(pools: Sequence[RolloutConfig], device: str) -> dict[str, float]:
    """What the engines of all pools reserve, by the name of Ray's resource."""
    needs = {"CPU": sum(pool.engines * pool.cpus for pool in pools)}
    if device == "cuda":
        needs["GPU"] = sum(pool.engines * pool.tensor_parallel * pool.pipeline_parallel * pool.gpus for pool in pools)
    return needs


def check_batches(section: str, engine: TeacherConfig | RolloutConfig) -> None:
    """Raises ConfigError if an engine's batch does not have a token for each of its requests."""
    if engine.max_batched_tokens is not None and engine.max_batched_tokens < engine.max_sequences:
        raise ConfigError(
            f"{section}.max_batched_tokens={engine.max_batched_tokens} is less than {section}.max_sequences="
            f"{engine.max_sequences}, but each sequence needs at least one token: raise the first or lower the second"
        )


def on_policy(config: Config) -> Objective:
    """The objective of the on-policy phase.

    Raises:
        ConfigError: there is none of that name for this phase, or a setting of it is out of range.
    """
    return objective_class(config.loss.objective, "loss.objective", "on_policy").make(config)


def off_policy(config: Config) -> Objective:
    """The objective of the off-policy phase; errors as in :func:`on_policy`."""
    return objective_class(config.off_policy.loss, "off_policy.loss", "off_policy").make(config)


def _check_loss(config: Config) -> None:
    loss, kind = config.loss, config.signal.kind
    try:
        divergence_of(loss)
    except ValueError as error:
        raise ConfigError(f"loss.divergence={loss.divergence}: {error}") from error
    known = [*on_policy(config).options(), *parameters_of(DIVERGENCES[loss.divergence])]
    for name in loss.options:
        if name not in known:
            what = f"loss.objective={loss.objective} and loss.divergence={loss.divergence}"
            there = did_you_mean(name, known) or f": their settings are {', '.join(known) or 'none'}"
            raise ConfigError(f"unknown setting loss.options.{name} of {what}{there}")
    if kind != "sampled" and (loss.discount or loss.importance_limit is not None):
        raise ConfigError(
            f"loss.discount and loss.importance_limit are for policy gradients from sampled tokens, and "
            f"signal.kind={kind} has a distribution at each token: write signal.kind=sampled, or leave them out"
        )
    support = signal_support(kind, loss.divergence)
    if support.strength == "not possible":
        raise ConfigError(f"signal.kind={kind} does not support loss.divergence={loss.divergence}: {support.reason}")


def _check_objective(config: Config, objective: Objective) -> None:
    """Checks that what the objective needs is there."""
    loop, rollout, reward = config.loop, config.rollout, config.reward
    if loop.unreliable_weight < 1 and not config.off_policy.filters.verified:
        raise ConfigError(
            f"loop.unreliable_weight={loop.unreliable_weight} needs the verdicts on the teacher's answers: write "
            "off_policy.filters.verified=true"
        )
    what = f"loss.objective={objective.name}"
    objective.check(config)
    if reward.weight and objective.reward_needed == "unused":
        raise ConfigError(f"{what} uses no reward, but reward.weight={reward.weight}: write loss.objective=kdrl, or 0")
    if config.reference and not objective.needs_reference:
        raise ConfigError(f"{what} uses no reference model, but `reference` is set: remove it")
    if objective.groups and loop.samples_per_prompt < 2:
        raise ConfigError(
            f"{what} compares the responses to a prompt with each other: write loop.samples_per_prompt=2 or more"
        )
    if not objective.own_samples_only:
        return
    if loop.off_policy_fraction:
        raise ConfigError(f"{what} trains on what the student sampled: write loop.off_policy_fraction=0")
    if rollout.temperature != config.loss.temperature or rollout.top_p != 1 or rollout.top_k != -1:
        raise ConfigError(
            f"{what} needs the log-probs of what was sampled: write rollout.temperature={config.loss.temperature} "
            "(that of the loss), rollout.top_p=1, rollout.top_k=-1"
        )


def _check_routes(config: Config) -> None:
    """Checks that the tasks that a teacher takes are the run's."""
    for route in routes(config):
        for task in route.tasks:
            if config.data.tasks and task not in config.data.tasks:
                raise ConfigError(
                    f"teachers.{route.name}.tasks names {task!r}, which is not in data.tasks "
                    f"({', '.join(config.data.tasks)})"
                )


def check_prompts(config: Config, models: ModelPair, prompts: Sequence[Prompt]) -> dict[str, int]:
    """Checks what the objective and the teachers need of the prompts.

    Returns:
        The most tokens that each teacher's context adds to a prompt, see :func:`s2w.teacher.routing.context_lengths`.

    Raises:
        ConfigError: names the first prompt that has no verifier, or lacks what a teacher's context needs.
    """
    objective = on_policy(config)
    if config.loop.steps and objective.reward_needed == "required":
        for prompt in prompts:
            if not prompt.task:
                raise ConfigError(
                    f"loss.objective={objective.name} needs prompts whose answers can be checked, and {prompt.uid!r} "
                    f"has no verifier: {_without_verifier(prompt, config.data.verifier)}"
                )
    return context_lengths(config, models.student.tokenizer, prompts)


def _without_verifier(prompt: Prompt, default: str | None) -> str:
    """Why a prompt has no verifier, and what to write."""
    row = prompt.place or "its row"
    if prompt.answer is not None and default is None:
        return f"{row} has an `answer` and no `task`: write data.verifier={DEFAULT_VERIFIER}"
    return f"{row} has neither `task` nor `answer`: write one of them, or a data.verifier that needs no answer"


def _check_verifier(config: Config) -> None:
    """Checks the verifier of rows that name none."""
    data = config.data
    if data.verifier is not None:
        try:
            check_verifier(data.verifier)
        except ConfigError as error:
            raise ConfigError(f"data.verifier: {error}") from error
    if data.path is None and config.off_policy.path is None and data.verifier != DEFAULT_VERIFIER:
        raise ConfigError(
            f"data.verifier={data.verifier} is for rows of a file (data.path, off_policy.path), and data.tasks have "
            "verifiers of their own: remove it"
        )


def _check_signal(config: Config) -> None:
    signal = config.signal
    objective = on_policy(config)
    if signal.bias_every and not objective.signals:
        raise ConfigError(
            f"signal.bias_every={signal.bias_every}: with loss.objective={objective.name} no signal reaches the "
            "learner; write 0"
        )
    if signal.kind == "hidden":
        return
    _check_sampling(config)
    if signal.dtype != "auto":
        raise ConfigError(
            f"signal.dtype={signal.dtype} says how hidden states travel, and signal.kind={signal.kind} sends none: "
            "write signal.dtype=auto"
        )
    if signal.bias_every:
        raise ConfigError(
            f"signal.bias_every={signal.bias_every} compares with the whole distribution, which "
            f"signal.kind={signal.kind} does not have: write signal.kind=hidden, or signal.bias_every=0"
        )


def _check_sampling(config: Config) -> None:
    """Checks that the student samples from the distribution that the signals ``sampled`` and ``ids`` are about.

    ``sampled`` estimates a sum over the vocabulary, at loss.temperature, from draws of the engine's distribution, and
    weights each by the ratio of the two: unbiased where every token can be drawn. A token that top-p, top-k or greedy
    sampling leaves out never is. A ratio at one token does not correct what follows it, and a limit on ratios
    would cut fresh ones too: with loss.discount or loss.importance_limit both temperatures must be the same.

    The candidates of ``ids`` are the most likely of the engine's distribution, where all tokens left out are tied.
    """
    rollout, loss, kind = config.rollout, config.loss, config.signal.kind
    cut = rollout.top_p != 1 or rollout.top_k != -1
    if kind == "sampled" and (cut or rollout.temperature == 0):
        raise ConfigError(
            "signal.kind=sampled estimates the divergence from sampled tokens, and tokens that are never sampled bias "
            "it: write rollout.top_p=1, rollout.top_k=-1 and a rollout.temperature above 0"
        )
    credited = loss.discount or loss.importance_limit is not None
    if kind == "sampled" and credited and rollout.temperature != loss.temperature:
        raise ConfigError(
            f"signal.kind=sampled with loss.discount or loss.importance_limit needs samples at the temperature of the "
            f"loss: write rollout.temperature={loss.temperature}"
        )
    few = 0 < rollout.top_k < config.signal.top_k or rollout.top_p != 1
    if kind == "ids" and few:
        raise ConfigError(
            f"signal.kind=ids needs signal.top_k={config.signal.top_k} candidates that the student may sample: write "
            f"rollout.top_p=1 and rollout.top_k=-1, or at least {config.signal.top_k}"
        )


def _check_preflight(config: Config) -> None:
    way, kind, temperature = config.run.preflight, config.signal.kind, config.loss.temperature
    for name, teacher in teacher_settings(config).items():
        if way != "none" and (teacher.context is not None or teacher.system_prompt is not None):
            raise ConfigError(
                f"run.preflight={way} compares teachers on the student's own prompts, but {section(name)} "
                "reads other ones (context, system_prompt): write run.preflight=none"
            )
    if way == "log_probs" and kind != "hidden" and temperature != 1:
        raise ConfigError(
            f"run.preflight=log_probs compares log-probs at temperature 1, and signal.kind={kind} has those of "
            f"loss.temperature={temperature:g}: write run.preflight=divergence"
        )


def _check_off_policy(config: Config) -> None:
    off = config.off_policy
    if off.path is not None:
        for file in response_files(Path(off.path).expanduser()):
            next(rows(file), None)
    off_policy(config).check(config)
    kind = config.signal.kind
    off_policy_prompts(config.loop)
    scored = _scored_responses(config)
    if scored and kind not in ("hidden", "topk"):
        raise ConfigError(
            f"{scored[0]} with signal.kind={kind}: the student has not sampled the teacher's "
            "responses, so only hidden and topk are supported"
        )


def _scored_responses(config: Config) -> list[str]:
    """The settings that have the teacher score its own responses, as written."""
    off, fraction = config.off_policy, config.loop.off_policy_fraction
    candidates = (
        (f"off_policy.loss={off.loss}", off.steps and off_policy(config).signals),
        (f"loop.off_policy_fraction={fraction}", fraction),
    )
    return [setting for setting, used in candidates if used]


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


def uses_off_policy(config: Config) -> bool:
    """Whether the run needs responses of the teacher in one of its phases."""
    loop = config.loop
    return config.off_policy.steps > 0 or loop.off_policy_fraction > 0 or loop.unreliable_weight < 1


def check_output(setting: str, file: Path) -> None:
    """Checks that a file can be written: its directory is there, and it is none itself.

    Raises:
        ConfigError: names the setting.
    """
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{setting}={file}: there is no directory {str(file.absolute().parent)!r}")
    if file.is_dir():
        raise ConfigError(f"{setting}={file} is a directory: write the name of a file")
