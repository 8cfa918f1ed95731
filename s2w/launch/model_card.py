"""The model card of a checkpoint: what it was made from and how, how good it is, how to use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCardData, metadata_load

import s2w
from s2w.config.schema import Config
from s2w.models.checkpoint import CARD_FILE, Checkpoint
from s2w.models.modes import has_thinking_switch
from s2w.records import Heldout, OffPolicyHeldout
from s2w.teacher.routing import DEFAULT, routes, teacher_settings

Phase = Literal["off_policy", "on_policy"]
LICENSE = ("license", "license_name", "license_link")
FIGURES = {
    "accuracy": "accuracy",
    "mode_adherence": "mode adherence",
    "truncated": "truncated",
    "response_length": "response length, tokens",
}
"""What the card says of each mode, by the names of :attr:`s2w.records.Heldout.by_mode`."""


def model_card(
    config: Config,
    base: Checkpoint,
    phase: Phase,
    step: int,
    directory: Path,
    heldout: Sequence[Heldout],
    off_policy_heldout: Sequence[OffPolicyHeldout],
) -> str:
    """The card in the format of the Hugging Face hub: YAML front matter, then Markdown.

    Args:
        base: ``student.model``, with the chat template of the checkpoint.
        step: updates of the phase that the checkpoint has had.
        directory: the checkpoint's.
        heldout, off_policy_heldout: the evaluations of each phase so far.
    """
    lines = [
        "---",
        _metadata(config, base, phase).to_yaml(),
        "---",
        "",
        f"# {config.run.name}: {_phase_name(phase)} step {step}",
        "",
        f"Made by strong-to-weak distillation with s2w {s2w.__version__}.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {_cell(text)} |" for name, text in _facts(config, phase, step)),
        "",
        *_heldout(heldout, off_policy_heldout),
        "## How to load it",
        "",
        *_usage(config, base, directory),
    ]
    return "\n".join(lines) + "\n"


def _metadata(config: Config, base: Checkpoint, phase: Phase) -> ModelCardData:
    known = _known(base)
    local = Path(base.reference).expanduser().is_dir()
    # The hub takes ids of its models alone; a checkpoint on disk may say what it was itself made from.
    origin = known.get("base_model") if local else base.reference
    return ModelCardData(
        base_model=None if config.student.init == "fresh" else origin,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["s2w", "distillation", f"{_phase_name(phase)}-distillation", "conversational"],
        **{name: known[name] for name in LICENSE if name in known},
    )


def _known(base: Checkpoint) -> dict[str, Any]:
    """Metadata of the base's own card; empty where it has none that can be read."""
    try:
        return metadata_load(base.path / CARD_FILE) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _facts(config: Config, phase: Phase, step: int) -> Iterator[tuple[str, str]]:
    student, data, off, loop = config.student, config.data, config.off_policy, config.loop
    made = {
        "checkpoint": "",
        "pruned": f", of which {student.keep_layers} layers were kept",
        "fresh": ": its configuration, with random weights",
    }
    yield "base", f"{_model(student.model, student.revision)}{made[student.init]}"
    takes = {route.name: route for route in routes(config)}
    for name, teacher in teacher_settings(config).items():
        route = takes.get(name)
        what = [", ".join(part) for part in (route.modes, route.tasks) if part] if route else []
        yield (
            "teacher" if name == DEFAULT else f"teacher `{name}`",
            _model(teacher.model, teacher.revision) + (f", for {' and '.join(what)}" if what else ""),
        )
    yield "prompts", f"`{data.path}`" if data.path else f"generated: {', '.join(data.tasks)}"
    if off.steps:
        done = step if phase == "off_policy" else off.steps
        source = f"in `{off.path}`" if off.path else "to the prompts"
        yield (
            "off-policy phase",
            f"{done:,} of {off.steps:,} steps of {off.responses_per_step} responses of the teacher's {source}; "
            f"loss {off.loss}, learning rate {off.learning_rate:g}",
        )
    if phase == "on_policy":
        rollout, loss = config.rollout, config.loss
        yield (
            "on-policy phase",
            f"{step:,} of {loop.steps:,} steps of {loop.prompts_per_step} prompts x {loop.samples_per_prompt} "
            f"responses of the student's, up to {rollout.max_tokens:,} tokens, at temperature "
            f"{rollout.temperature:g}; objective {loss.objective}, divergence {loss.divergence}, signal "
            f"{config.signal.kind}, learning rate {config.learner.learning_rate:g}",
        )
    yield "seed", str(config.run.seed)


def _heldout(results: Sequence[Heldout], off_policy: Sequence[OffPolicyHeldout]) -> Iterator[str]:
    """A table of the figures that exist, before and after; nothing where none do."""
    rows: list[tuple[str, ...]] = []
    if off_policy:
        first, last = off_policy[0], off_policy[-1]
        rows.append(
            (f"off-policy loss, nats/token, after {last.step:,} steps", f"{first.loss:.4f}", f"{last.loss:.4f}")
        )
    if results:
        before, after = results[0], results[-1]
        when = f", after {after.version:,} on-policy steps"
        rows += [
            (f"KL(teacher‖student), nats/token{when}", f"{before.forward_kl:.4f}", f"{after.forward_kl:.4f}"),
            (f"KL(student‖teacher), nats/token{when}", f"{before.reverse_kl:.4f}", f"{after.reverse_kl:.4f}"),
        ]
        for mode, scores in after.by_mode.items():
            earlier = before.by_mode.get(mode, {})
            for name, words in FIGURES.items():
                if name in scores:
                    cells = [f"{one[name]:.4g}" if name in one else "" for one in (earlier, scores)]
                    rows.append((f"{mode}: {words}, {scores['prompts']:.0f} prompts", *cells))
    if rows:
        yield from ("## Held-out figures", "", "| | before | after |", "| --- | ---: | ---: |")
        yield from (f"| {' | '.join(row)} |" for row in rows)
        yield ""


def _usage(config: Config, base: Checkpoint, directory: Path) -> Iterator[str]:
    switch = has_thinking_switch(base.tokenizer)
    thinking = "enable_thinking=True, " if switch else ""
    yield from (
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"path = {str(directory)!r}  # or wherever it is now",
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)",
        'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "..."}], add_generation_prompt=True, '
        f'{thinking}return_tensors="pt", return_dict=True)',
        f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens={config.rollout.max_tokens})[0]))",
        "```",
        "",
        f"or `vllm serve {directory}`. generation_config.json says where responses end and how they are sampled.",
    )
    if switch:
        yield (
            "The chat template thinks unless it is told `enable_thinking=False`; in a request to vLLM: "
            '`"chat_template_kwargs": {"enable_thinking": false}`.'
        )


def _phase_name(phase: Phase) -> str:
    return phase.replace("_", "-")


def _model(reference: str, revision: str | None) -> str:
    return f"`{reference}`" + (f" at `{revision}`" if revision else "")


def _cell(text: str) -> str:
    """Text that does not end its cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
