"""What a run's prompts are, before anything starts: the program behind ``s2w data``, and the lines of every run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from s2w.config.bounds import check_bounds
from s2w.config.schema import Config
from s2w.data.placeholders import context_columns
from s2w.data.prompts import (
    TooFewPromptsError,
    build_prompts,
    check_lengths,
    prompt_limit,
    read_questions,
    render_questions,
)
from s2w.data.summary import DataSummary, summarise_prompts
from s2w.errors import ConfigError
from s2w.launch.check import check_output
from s2w.models.checkpoint import read_checkpoint
from s2w.models.modes import add_thinking_switch
from s2w.models.pair import ModelPair
from s2w.records import Prompt


def run_prompts(config: Config, models: ModelPair) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of a run; errors as of :func:`s2w.data.prompts.build_prompts`."""
    return build_prompts(
        config.data,
        models.student.tokenizer,
        config.run.seed,
        config.data.modes,
        models.max_model_len,
        context_columns(config),
    )


def lines_about(config: Config, models: ModelPair, prompts: Sequence[Prompt], heldout: Sequence[Prompt]) -> list[str]:
    """What a run says of its prompts when it starts."""
    limit = prompt_limit(config.data, models.max_model_len)
    return summarise_prompts(prompts, heldout, models.student.tokenizer, limit).lines()


def describe(config: Config, output: Path | None = None) -> DataSummary:
    """Prints what the prompts of ``config`` are: counts, lengths, repetitions, an example of each mode.

    Args:
        config: of a run; only its data, its seed and its student count. Without a student's model (it is empty) there
            is no chat template and no tokenizer: nothing is rendered, and lengths are in characters.
        output: a file for the same as JSON.

    Raises:
        ConfigError: the prompts cannot be read; or, once all is printed, that a run would refuse them, and why.
    """
    check_bounds(config)
    if output is not None:
        check_output("--json", output)
    data, seed, columns = config.data, config.run.seed, context_columns(config)
    refusal: ConfigError | None = None
    try:
        splits = read_questions(data, seed, columns)
    except TooFewPromptsError as error:
        refusal, splits = error, read_questions(replace(data, heldout_prompts=0), seed, columns)
    notes = []
    if data.path and data.heldout_path is None and splits[1]:
        notes.append(f"the held-out prompts are drawn by run.seed={seed}; data.heldout_path=FILE gives your own")
    if config.student.model:
        student = read_checkpoint(config.student.model, config.student.revision)
        if config.student.thinking_switch:
            add_thinking_switch(student.tokenizer)
        train, heldout = render_questions(data, splits, student.tokenizer, seed, data.modes)
        summary = summarise_prompts(train, heldout, student.tokenizer, prompt_limit(data, student.max_model_len))
        try:
            check_lengths(data, [*train, *heldout], student.max_model_len)
        except ConfigError as error:
            refusal = refusal or error
        if (context := student.max_model_len) is not None:
            longest = data.max_prompt_tokens + config.rollout.max_tokens
            over = ", which a run refuses: write smaller ones" if longest > context else ""
            notes.append(
                f"data.max_prompt_tokens + rollout.max_tokens = {longest:,} of the student's context of {context:,} "
                f"tokens{over}"
            )
        if data.think_ratio is not None:
            notes.append("modes of prompts that name none are drawn anew for every batch (data.think_ratio)")
    else:
        summary = summarise_prompts(*splits)
        notes.append(
            "student.model is not set, so nothing is rendered and lengths are characters of the messages: give it for "
            "tokens, limits and examples"
        )
    print(summary.table())
    for text in (*summary.warnings(), *notes, *summary.shown_examples()):
        print(f"\n{text}")
    if output is not None:
        output.write_text(
            json.dumps({**asdict(summary), "refused": str(refusal) if refusal else None}, indent=2) + "\n"
        )
    if refusal is not None:
        raise refusal
    return summary
