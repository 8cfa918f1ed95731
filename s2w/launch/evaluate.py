"""The program behind ``s2w eval``: a checkpoint, problems, samples from the rollout pool, a report."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from s2w.actors.calls import each
from s2w.actors.failures import reported
from s2w.actors.hardware import resolve_dtype
from s2w.actors.stopping import run_stoppable
from s2w.config.bounds import check_bounds
from s2w.config.schema import EvalRun, RolloutConfig
from s2w.errors import ConfigError
from s2w.eval.grading import Grader
from s2w.eval.problems import make_prompts, read_problems
from s2w.eval.scores import EvalReport, make_report
from s2w.launch.check import check_batches
from s2w.launch.cluster import connected
from s2w.models.checkpoint import Checkpoint, ModelReference, read_checkpoint
from s2w.models.modes import supported_modes
from s2w.models.parallel import check_parallel
from s2w.models.shards import check_weights
from s2w.models.tokenizers import token_count
from s2w.records import Mode, Request, Rollout
from s2w.rollout.pool import RolloutPool
from s2w.rollout.thinking import check_thinking_budget

QUEUE_DEPTH = 2
"""Requests sent to an engine for each that it can run at once: it never waits for the next one, and few queue in Ray,
which warns of long queues of calls."""


def evaluate(run: EvalRun) -> EvalReport:
    """Measures a checkpoint, prints the table and writes ``eval.output`` where that is set.

    Raises:
        ConfigError: bad input; nothing was started.
        RunError: an engine failed.
        KeyboardInterrupt: SIGINT or SIGTERM came.
    """
    check_bounds(run)
    _check_samples(run)
    output = Path(run.eval.output) if run.eval.output else None
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"eval.output={output}: there is no directory {str(output.absolute().parent)!r}")
    if output is not None and output.is_dir():
        raise ConfigError(f"eval.output={output} is a directory: write the name of a file")
    checkpoint = read_checkpoint(run.model, run.revision)
    check_weights(checkpoint)
    check_parallel(
        "rollout",
        checkpoint.config,
        tensor_parallel=run.rollout.tensor_parallel,
        pipeline_parallel=run.rollout.pipeline_parallel,
        expert_parallel=run.rollout.expert_parallel,
    )
    problems = read_problems(run.eval)
    # No budget is a budget that cannot be reached: None would be the pool's own setting.
    unlimited = run.rollout.max_tokens
    budgets, requests = [], []
    for mode, budget in _settings(run, checkpoint.tokenizer):
        for prompt in make_prompts(problems, mode, checkpoint.tokenizer, run.eval):
            for sample in range(run.eval.samples):
                budgets.append(budget)
                requests.append(Request(prompt, sample, thinking_budget=unlimited if budget is None else budget))
    length = max(len(request.prompt.token_ids) for request in requests) + run.rollout.max_tokens
    if checkpoint.max_model_len is not None and length > checkpoint.max_model_len:
        raise ConfigError(
            f"the longest prompt and rollout.max_tokens={run.rollout.max_tokens} are {length} tokens, more than the "
            f"model's context of {checkpoint.max_model_len}: write a smaller rollout.max_tokens"
        )
    log = output.with_suffix(".error.log") if output else Path(tempfile.gettempdir(), f"s2w-eval-{os.getpid()}.log")
    with reported(log, lambda: "no report was written: run it again"):
        with connected(run.cluster) as (device, resources):
            _check_resources(run.rollout, device, resources)
            rollouts = run_stoppable(_sample(run, checkpoint, device, length, requests))
        with Grader(checkpoint.tokenizer) as grader:
            graded = grader.grade(rollouts)
    rollout = run.rollout
    report = make_report(
        zip(budgets, graded, strict=True),
        run.eval.k,
        model=run.model,
        revision=run.revision,
        seed=run.eval.seed,
        sampling={
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "top_k": rollout.top_k,
            "max_tokens": rollout.max_tokens,
        },
    )
    print(report.table())
    if output is not None:
        output.write_text(report.to_json() + "\n")
    return report


def _check_samples(run: EvalRun) -> None:
    """Refuses samples that cannot give the pass@k asked for, and engines that cannot sample them."""
    evaluation = run.eval
    check_batches("rollout", run.rollout)
    if not evaluation.k:
        raise ConfigError("eval.k=[]: give at least one k, such as [1]")
    if (k := max(evaluation.k)) > evaluation.samples:
        raise ConfigError(f"eval.k asks for pass@{k}, which needs {k} samples, and eval.samples={evaluation.samples}")
    if run.rollout.temperature == 0 and evaluation.samples > 1:
        raise ConfigError(
            f"rollout.temperature=0 makes all of eval.samples={evaluation.samples} the same: write eval.samples=1"
        )


def _settings(run: EvalRun, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Mode, int | None]]:
    """What is measured: modes, and in think mode its thinking budgets."""
    modes: list[Mode] = list(run.eval.modes) or list(supported_modes(tokenizer))
    budgets = run.eval.thinking_budgets
    name = "eval.thinking_budgets" if budgets else "rollout.thinking_budget"
    for budget in budgets or [run.rollout.thinking_budget]:
        if budget is not None:
            check_thinking_budget(budget, name, run.rollout, tokenizer)
    if budgets and "think" not in modes:
        raise ConfigError("eval.thinking_budgets needs think mode, which is not in eval.modes")
    settings: list[tuple[Mode, int | None]] = []
    for mode in dict.fromkeys(modes):
        own = dict.fromkeys(budgets or [run.rollout.thinking_budget]) if mode == "think" else [None]
        settings += [(mode, budget) for budget in own]
    return settings


def _check_resources(config: RolloutConfig, device: str, resources: dict[str, float]) -> None:
    """Raises ConfigError if the cluster is too small."""
    needs = {"CPU": config.engines * config.cpus}
    if device == "cuda":
        needs["GPU"] = config.engines * config.tensor_parallel * config.pipeline_parallel
    for resource, amount in needs.items():
        if amount > (there := resources.get(resource, 0)):
            raise ConfigError(
                f"rollout.engines={config.engines} reserve {amount:g} {resource}s, but the cluster has {there:g}"
            )


async def _sample(
    run: EvalRun, checkpoint: Checkpoint, device: str, length: int, requests: list[Request]
) -> list[Rollout]:
    """The responses, in the order of ``requests``."""
    config = run.rollout
    pool = RolloutPool(
        config,
        model=ModelReference.of(run.model, run.revision),
        device=device,
        dtype=resolve_dtype(config.dtype, device),
        max_model_len=length,
        vocab_size=token_count(checkpoint.tokenizer),
        candidates=0,
        stop_token_ids=checkpoint.eos_token_ids,
    )
    done = 0

    def count(request: Request, rollout: Rollout) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\r{done}/{len(requests)} responses", end="\n" if done == len(requests) else "", file=sys.stderr)

    try:
        await pool.start(0, run.cluster.start_timeout_s)
        return await each(
            requests, pool.generate, at_once=QUEUE_DEPTH * config.engines * config.max_sequences, done=count
        )
    finally:
        await pool.shutdown()
