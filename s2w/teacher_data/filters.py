"""Which of the teacher's responses are worth training on, and the table of those that are not.

The filters run in a fixed order, cheapest first, and a response is counted by the first one that drops it:

1. ``truncated``: cut off, at the token limit or by an engine that aborted it;
2. ``format``: think block left open, or a response that does not keep to its mode;
3. ``length``: response too short or too long, or prompt too long;
4. ``loop``: the same n-gram over and over;
5. ``language``: Chinese, Japanese or Korean characters that the prompt gave no reason for;
6. ``duplicate``: an earlier response to the same prompt in the same mode, token for token;
7. ``wrong``: an answer that the verifier of the prompt's task does not score 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from s2w.config.schema import FilterConfig
from s2w.data.repetition import has_loop
from s2w.data.verifier_process import VerifierProcess
from s2w.models.modes import adheres
from s2w.teacher_data.response import Response

FILTERS = ("truncated", "format", "length", "loop", "language", "duplicate", "wrong")
# Kana, CJK ideographs (extension A, the main block, compatibility, the supplementary planes), Hangul.
CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")


@dataclass(frozen=True, slots=True)
class Filtered:
    """What the filters made of a set of responses."""

    kept: list[Response]
    dropped: list[tuple[Response, str]]
    """Each with the name of the filter."""

    def table(self) -> dict[str, Any]:
        """``filters.json``: number of responses; by filter, number and share dropped; by mode, number kept."""
        counts = Counter(reason for _, reason in self.dropped)
        total = len(self.kept) + len(self.dropped)
        return {
            "responses": total,
            "dropped": {name: counts[name] for name in FILTERS},
            "share": {name: counts[name] / total if total else 0.0 for name in FILTERS},
            "kept": len(self.kept),
            "kept_by_mode": dict(sorted(Counter(response.prompt.mode for response in self.kept).items())),
        }

    def text(self) -> str:
        """The table for people."""
        table = self.table()
        lines = [f"{'responses':<12}{table['responses']:>9,}"]
        lines += [f"- {name:<10}{table['dropped'][name]:>9,}  {table['share'][name]:>6.1%}" for name in FILTERS]
        by_mode = ", ".join(f"{count:,} {mode}" for mode, count in table["kept_by_mode"].items())
        return "\n".join([*lines, f"{'kept':<12}{table['kept']:>9,}" + (f"  ({by_mode})" if by_mode else "")])


def apply_filters(
    responses: Sequence[Response],
    config: FilterConfig,
    *,
    max_tokens: int,
    max_prompt_tokens: int,
    opened: bool,
    verifier: VerifierProcess | None,
) -> Filtered:
    """Runs the filters that ``config`` turns on.

    Args:
        max_tokens: longest response, whatever ``config`` says.
        max_prompt_tokens: longest prompt.
        opened: thinking prompts end inside the think block (:func:`s2w.models.modes.opens_thinking`).
        verifier: needed if ``config.verified`` and a prompt has a task.
    """
    seen: set[tuple[Any, ...]] = set()
    drops: dict[str, Callable[[Response], bool]] = {
        "truncated": lambda response: config.truncated and is_truncated(response),
        "format": lambda response: config.format and breaks_format(response, opened),
        "length": lambda response: (
            not config.min_tokens <= len(response.token_ids) <= min(config.max_tokens or max_tokens, max_tokens)
            or len(response.prompt.token_ids) > max_prompt_tokens
        ),
        "loop": lambda response: has_loop(response.token_ids, config.loop_ngram, config.loop_tokens),
        "language": lambda response: mixes_languages(response, config.cjk_share),
        "duplicate": lambda response: config.duplicates and is_duplicate(response, seen),
        "wrong": lambda response: config.verified and is_wrong(response, opened, verifier),
    }
    kept: list[Response] = []
    dropped: list[tuple[Response, str]] = []
    for response in responses:
        reason = next((name for name in FILTERS if drops[name](response)), None)
        if reason is None:
            kept.append(response)
        else:
            dropped.append((response, reason))
    return Filtered(kept, dropped)


def is_truncated(response: Response) -> bool:
    """Whether the response is incomplete: it ran into the token limit, or its request was aborted."""
    return response.finish_reason != "stop"


def breaks_format(response: Response, opened: bool) -> bool:
    """Whether the think block is open, or empty in think mode, or not empty in no_think mode."""
    return not adheres(response.parse(opened=opened), response.prompt.mode)


def mixes_languages(response: Response, cjk_share: float) -> bool:
    """Whether more than ``cjk_share`` of the response's non-space characters is CJK, and none of the prompt's."""
    characters = "".join(response.text.split())
    if not characters or len(CJK.findall(characters)) <= cjk_share * len(characters):
        return False
    return not any(CJK.search(message["content"]) for message in response.prompt.messages)


def is_duplicate(response: Response, seen: set[tuple[Any, ...]]) -> bool:
    """Whether an earlier call with the same ``seen`` had the same prompt, mode and response tokens."""
    identity = (response.prompt.token_ids.tobytes(), response.prompt.mode, response.token_ids.tobytes())
    if identity in seen:
        return True
    seen.add(identity)
    return False


def is_wrong(response: Response, opened: bool, verifier: VerifierProcess | None) -> bool:
    """Whether the prompt has a task whose verifier does not score the answer 1."""
    if not response.prompt.task:
        return False
    assert verifier is not None
    return verifier.verify(response.prompt, response.parse(opened=opened).answer) < 1.0
