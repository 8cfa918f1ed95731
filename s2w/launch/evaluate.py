"""The program behind ``s2w eval``: a checkpoint, problems, samples from the rollout pool, a report."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from s2w.actors.calls import each
from s2w.actors.failures import reported
from s2w.actors.stopping import run_stoppable
from s2w.config.bounds import check_bounds
from s2w.config.schema import EvalRun
from s2w.data.trial import try_verifiers
from s2w.errors import ConfigError
from s2w.eval.grading import Grader
from s2w.eval.problems import make_prompts, read_problems
from s2w.eval.scores import EvalReport, make_report
from s2w.launch.check import check_batches, check_engine, check_output, check_pool
from s2w.launch.cluster import connected
from s2w.launch.kept_responses import KeptResponses
from s2w.launch.run_directory import trained_model
from s2w.models.checkpoint import Checkpoint, ModelReference, read_checkpoint
from s2w.models.modes import supported_modes
from s2w.models.shards import check_weights
from s2w.models.tokenizers import token_count
from s2w.observe.progress import Progress
from s2w.records import Mode, Request, Rollout
from s2w.rollout.serving import serving
from s2w.rollout.thinking import check_thinking_budget

DECIDING = ("max_tokens", "temperature", "top_p", "top_k", "stop_thinking", "dtype")
"""Settings of the engines that responses depend on."""


def evaluate(run: EvalRun, *, quiet: bool = False) -> EvalReport:
    """Measures a checkpoint, prints the table and writes ``eval.output`` where that is set.

    Args:
        quiet: shows only warnings besides the table; how far it has come goes to standard error otherwise.

    Raises:
        ConfigError: bad input; nothing was started.
        RunError: an engine failed.
        KeyboardInterrupt: SIGINT or SIGTERM came.
    """
    check_bounds(run)
    _check_samples(run)
    output = Path(run.eval.output) if run.eval.output else None
    if output is not None:
        check_output("eval.output", output)
    checkpoint = read_checkpoint(trained_model(run.model), run.revision)
    check_weights(checkpoint)
    check_engine("rollout", run.rollout, checkpoint.config)
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
    try_verifiers(request.prompt for request in requests)
    kept = _kept(run, checkpoint, output, requests)
    log = output.with_suffix(".error.log") if output else Path(tempfile.gettempdir(), f"s2w-eval-{os.getpid()}.log")
    with (
        reported(lambda: log, lambda: _saved(kept)),
        Progress({}, quiet=quiet, verbose=run.cluster.log_to_driver, stream=sys.stderr) as progress,
    ):
        if kept:
            progress.say(f"{len(kept):,} of {len(requests):,} responses are in {kept.path}")
        if kept.missing:
            with connected(run.cluster) as (device, resources):
                check_pool("rollout", run.rollout, device, resources)
                try:
                    run_stoppable(_sample(run, checkpoint, device, length, requests, kept, progress))
                except KeyboardInterrupt:
                    progress.warn(_saved(kept))
                    raise
        with Grader(checkpoint.tokenizer) as grader:
            graded = grader.grade(kept.rollouts())
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
    kept.delete()
    return report


def _kept(run: EvalRun, checkpoint: Checkpoint, output: Path | None, requests: list[Request]) -> KeptResponses:
    """What is there of an earlier start of the same evaluation."""
    weights = sorted(file.stat() for file in checkpoint.path.glob("*.safetensors"))
    settings = {
        "model": [checkpoint.reference, run.revision, [[file.st_size, file.st_mtime_ns] for file in weights]],
        "rollout": {name: getattr(run.rollout, name) for name in DECIDING},
    }
    if output is not None:
        return KeptResponses(output.with_suffix(".responses.jsonl"), requests, settings)
    name = hashlib.sha256(json.dumps([settings, asdict(run.eval)], sort_keys=True).encode()).hexdigest()[:16]
    return KeptResponses(Path(tempfile.gettempdir(), f"s2w-eval-{name}.responses.jsonl"), requests, settings)


def _saved(kept: KeptResponses) -> str:
    if not kept:
        return "no response was finished: run it again"
    return f"{len(kept):,} responses are kept in {kept.path}, and the same command goes on from there"


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


async def _sample(
    run: EvalRun,
    checkpoint: Checkpoint,
    device: str,
    length: int,
    requests: list[Request],
    kept: KeptResponses,
    progress: Progress,
) -> None:
    """Samples the responses that are missing."""
    async with serving(
        run.rollout,
        ModelReference.of(checkpoint.reference, run.revision),
        name="rollout engine",
        device=device,
        max_model_len=length,
        vocab_size=token_count(checkpoint.tokenizer),
        stop_token_ids=checkpoint.eos_token_ids,
        cluster=run.cluster,
    ) as pool:
        await pool.start(0, run.cluster.start_timeout_s, progress)
        missing = kept.missing
        with progress.countdown("sampling", len(missing)) as count:

            def done(request: int, rollout: Rollout) -> None:
                kept.add(request, rollout)
                count.add(len(rollout.token_ids))

            await each(missing, lambda request: pool.generate(requests[request]), at_once=pool.at_once, done=done)
