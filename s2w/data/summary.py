"""What a run's prompts are: counts, lengths, repetitions, and how they are rendered; as text and for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from s2w.data.heldout import plain_text, question_key
from s2w.data.questions import Question
from s2w.data.verifiers import VERIFIERS, is_custom
from s2w.records import Prompt

TASK_SCORER = "the task's scorer"
"""Verifier of the tasks that generate their questions."""
QUANTILES = {"shortest": 0.0, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}
SHOWN = 2_000
"""Characters of a rendered prompt that are printed."""


@dataclass(frozen=True, slots=True)
class Part:
    """The training prompts, or the held-out ones."""

    prompts: int
    modes: dict[str, int]
    """Prompts by mode; ``any`` where a row names none and there is no chat template to ask."""
    tasks: dict[str, int]
    """By task; without those that have none."""
    verifiers: dict[str, int]
    """By what checks the answers; without those that nothing checks."""
    lengths: dict[str, int]
    """Quantiles of prompt lengths, by the names of :data:`QUANTILES`."""
    too_long: int
    """Longer than the limit; 0 if lengths are characters."""
    same_prompt: int
    """Rendered as an earlier one is (without a tokenizer: with the same messages)."""
    same_question: int
    """With the last user message of an earlier one, white space and soft switches aside."""

    @property
    def verified(self) -> int:
        return sum(self.verifiers.values())


@dataclass(frozen=True, slots=True)
class Example:
    """A rendered prompt."""

    uid: str
    text: str
    """With its special tokens."""
    tokens: int
    special_tokens: dict[str, int]
    """How often each token occurs that the tokenizer knows as one of its own, such as ``<|im_start|>``."""


@dataclass(frozen=True, slots=True)
class DataSummary:
    """Both parts of a run's prompts."""

    unit: str
    """Of the lengths: ``tokens``, or ``characters`` (of the messages) without a tokenizer."""
    limit: int | None
    """Longest prompt that a run takes, in tokens; None without a tokenizer."""
    limit_name: str
    """What sets it."""
    train: Part
    heldout: Part
    heldout_questions_in_train: int
    """Held-out prompts with the last user message of a training prompt."""
    examples: dict[str, Example]
    """The first prompt of each mode; empty without a tokenizer."""

    def lines(self) -> list[str]:
        """The summary in two lines, and a third if no held-out answer can be checked though training ones can."""
        train, heldout = self.train, self.heldout
        modes = ", ".join(f"{count:,} {mode}" for mode, count in train.modes.items())
        lengths = f"median {train.lengths['median']:,}, longest {train.lengths['longest']:,}"
        limit = f" of at most {self.limit:,}" if self.limit is not None else ""
        count = train.same_prompt
        repeated = f"; {count:,} {'is a repetition' if count == 1 else 'are repetitions'}" if count else ""
        lines = [
            f"{train.prompts:,} prompts: {_verified(train)}; held-out {heldout.prompts:,}: {_verified(heldout)}",
            f"{modes}; {self.unit} of a prompt: {lengths}{limit}{repeated}",
        ]
        return [*lines, *self.warnings()]

    def table(self) -> str:
        """All counts, the training prompts' and the held-out ones' side by side."""
        train, heldout = self.train, self.heldout
        rows = [("prompts", train.prompts, heldout.prompts)]

        def counted(label: str, one: dict[str, int], other: dict[str, int]) -> None:
            rows.extend((label.format(name), one.get(name, 0), other.get(name, 0)) for name in {**one, **other})

        counted("mode {}", train.modes, heldout.modes)
        counted("verified by {}", train.verifiers, heldout.verifiers)
        # Other tasks are named as their verifiers are.
        scored = [
            {name: count for name, count in part.tasks.items() if name not in part.verifiers}
            for part in (train, heldout)
        ]
        counted("  task {}", *scored)
        rows.append(("not verified", train.prompts - train.verified, heldout.prompts - heldout.verified))
        counted(f"{self.unit}, {{}}", train.lengths, heldout.lengths)
        if self.limit is not None:
            rows.append((f"longer than {self.limit:,} ({self.limit_name})", train.too_long, heldout.too_long))
        what = "rendered prompt" if self.unit == "tokens" else "messages"
        rows.append((f"same {what} as an earlier one", train.same_prompt, heldout.same_prompt))
        rows.append(("same last user message as an earlier one", train.same_question, heldout.same_question))
        width = max(len(label) for label, _, _ in rows)
        table = [f"{'':<{width}}{'train':>12}{'held-out':>12}"]
        table += [f"{label:<{width}}{one:>12,}{other:>12,}" for label, one, other in rows]
        table.append(
            f"{'last user message of a training prompt':<{width}}{'':>12}{self.heldout_questions_in_train:>12,}"
        )
        return "\n".join(table)

    def shown_examples(self) -> list[str]:
        """The examples as text, each under a line that says which prompt it is."""
        return [_shown(mode, one) for mode, one in self.examples.items()]

    def warnings(self) -> list[str]:
        """Sentences about what is likely not meant."""
        if not self.train.verified or self.heldout.verified or not self.heldout.prompts:
            return []
        return [
            "none of the held-out prompts has a verifier, so their accuracy is not measured: hold out more "
            "(data.heldout_prompts), or give a file of verified ones (data.heldout_path)"
        ]


def summarise_prompts(
    train: Sequence[Question | Prompt],
    heldout: Sequence[Question | Prompt],
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: tuple[int, str] | None = None,
) -> DataSummary:
    """The summary of a run's prompts.

    Args:
        train, heldout: prompts, or questions where there is no tokenizer.
        tokenizer: that of the prompts; needed for examples.
        limit: longest prompt in tokens and what sets it (:func:`s2w.data.prompts.prompt_limit`).
    """
    examples: dict[str, Example] = {}
    for prompt in (*train, *heldout):
        if isinstance(prompt, Prompt) and tokenizer is not None and prompt.mode not in examples:
            examples[prompt.mode] = _example(prompt, tokenizer)
    longest, name = limit or (None, "")
    known = {_last_question(prompt) for prompt in train}
    return DataSummary(
        unit="characters" if tokenizer is None else "tokens",
        limit=longest,
        limit_name=name,
        train=_part(train, longest),
        heldout=_part(heldout, longest),
        heldout_questions_in_train=sum(_last_question(prompt) in known for prompt in heldout),
        examples=examples,
    )


def _verifier(prompt: Question | Prompt) -> str:
    """What checks the answers to a prompt: a verifier's name or import path; empty if nothing does."""
    own = not prompt.task or prompt.task in VERIFIERS or is_custom(prompt.task)
    return prompt.task if own else TASK_SCORER


def _part(prompts: Sequence[Question | Prompt], limit: int | None) -> Part:
    lengths = np.array([_length(prompt) for prompt in prompts] or [0])
    # A length that occurs, not a mean of two.
    quantiles = np.quantile(lengths, list(QUANTILES.values()), method="inverted_cdf")
    return Part(
        prompts=len(prompts),
        modes=_counts(prompt.mode or "any" for prompt in prompts),
        tasks=_counts(prompt.task for prompt in prompts),
        verifiers=_counts(_verifier(prompt) for prompt in prompts),
        lengths={name: int(value) for name, value in zip(QUANTILES, quantiles, strict=True)},
        too_long=0 if limit is None else int((lengths > limit).sum()),
        same_prompt=_repeated(_identity(prompt) for prompt in prompts),
        same_question=_repeated(_last_question(prompt) for prompt in prompts),
    )


def _length(prompt: Question | Prompt) -> int:
    if isinstance(prompt, Prompt):
        return len(prompt.token_ids)
    return sum(len(message["content"]) for message in prompt.messages)


def _identity(prompt: Question | Prompt) -> Hashable:
    return prompt.token_ids.tobytes() if isinstance(prompt, Prompt) else (question_key(prompt.messages), prompt.mode)


def _last_question(prompt: Question | Prompt) -> str:
    return plain_text(next(message["content"] for message in reversed(prompt.messages) if message["role"] == "user"))


def _counts(names: Iterable[str]) -> dict[str, int]:
    """How often each name occurs, most frequent first; the empty one is left out."""
    return dict(Counter(filter(None, names)).most_common())


def _repeated(keys: Iterable[Hashable]) -> int:
    return sum(count - 1 for count in Counter(keys).values())


def _example(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Example:
    added = tokenizer.added_tokens_decoder
    special = Counter(str(added[token]) for token in prompt.token_ids.tolist() if token in added)
    return Example(prompt.uid, str(tokenizer.decode(prompt.token_ids)), len(prompt.token_ids), dict(special))


def _verified(part: Part) -> str:
    """What checks how many: ``10 verified by exact_match, 10 not``."""
    if not part.verified:
        return "0 verified"
    (first, count), *others = part.verifiers.items()
    if count == part.prompts:
        return f"all verified by {first}"
    named = [f"{count:,} verified by {first}", *(f"{count:,} by {name}" for name, count in others)]
    left = part.prompts - part.verified
    return ", ".join([*named, f"{left:,} not"] if left else named)


def _shown(mode: str, example: Example) -> str:
    special = ", ".join(f"{name} {count}x" for name, count in example.special_tokens.items()) or "none"
    text, over = example.text, len(example.text) - SHOWN
    if over > 0:
        half = SHOWN // 2
        text = f"{text[:half]}\n... {over:,} characters ...\n{text[-half:]}"
    quoted = "\n".join(f"| {line}" for line in text.split("\n"))
    return (
        f"first prompt in mode {mode}, {example.uid!r}, {example.tokens:,} tokens; special tokens: {special}\n{quoted}"
    )
