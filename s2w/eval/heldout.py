"""A held-out evaluation, response by response: all as numbers, the first of each mode in full, and their means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from s2w.data.repetition import has_loop
from s2w.eval.grading import ACCURACY, ADHERENCE, RESPONSE_LENGTH, TRUNCATED, Graded
from s2w.records import Heldout, HeldoutResponse, HeldoutSample, Rollout

SAMPLES = 8
"""Responses of each mode that are kept in full at each version."""
LOOP_NGRAM, LOOP_TOKENS, LOOP_FEWEST = 128, 64, 16
"""Longest n-gram of a loop; tokens that a loop covers, and those of a loop in a short response; as the filters of the
off-policy phase have them (``off_policy.filters``)."""


def is_repetitive(token_ids: np.ndarray) -> bool:
    """Whether a response says the same four or more times in a row, over 64 tokens or half of a shorter response.

    Args:
        token_ids: int32 [n].
    """
    return has_loop(token_ids, LOOP_NGRAM, min(LOOP_TOKENS, max(LOOP_FEWEST, len(token_ids) // 2)))


def heldout_responses(
    version: int | None,
    rollouts: Sequence[Rollout],
    graded: Sequence[Graded],
    teachers: Sequence[str],
    kl_sums: np.ndarray,
) -> list[HeldoutResponse]:
    """The numbers of every response.

    Args:
        version: that all rollouts are of; None for the teacher's.
        rollouts: fresh ones, one to each held-out prompt.
        graded: the same, in order.
        teachers: names of those that score them, in order.
        kl_sums: [rollouts, 2], forward and reverse KL summed over the sampled tokens of each, nats.
    """
    responses = []
    for rollout, grade, teacher, (forward, reverse) in zip(rollouts, graded, teachers, kl_sums.tolist(), strict=True):
        tokens = len(rollout.sampled_rows)
        responses.append(
            HeldoutResponse(
                version=version,
                uid=grade.uid,
                mode=grade.mode,
                tokens=tokens,
                forward_kl=forward / tokens,
                reverse_kl=reverse / tokens,
                correct=grade.correct,
                adherent=grade.adherent,
                truncated=grade.truncated,
                repetitive=is_repetitive(rollout.token_ids),
                length=grade.tokens,
                teacher=teacher,
                task=grade.task,
            )
        )
    return responses


def make_heldout(responses: Sequence[HeldoutResponse]) -> Heldout:
    """The means over the responses of one evaluation, and by mode; by teacher and task where there are several."""
    means = mean_scores(responses)
    groups = {key: _by(responses, key) for key in ("mode", "teacher", "task")}
    return Heldout(
        version=responses[0].version,
        forward_kl=means["forward_kl"],
        reverse_kl=means["reverse_kl"],
        tokens=sum(one.tokens for one in responses),
        response_length=means[RESPONSE_LENGTH.name],
        by_mode=groups["mode"],
        **{f"by_{key}": groups[key] for key in ("teacher", "task") if len(groups[key]) > 1},
    )


def mean_scores(responses: Sequence[HeldoutResponse]) -> dict[str, float]:
    """By name: ``prompts``; ``forward_kl`` and ``reverse_kl`` over tokens; the shares and the length over responses;
    where some have a verifier, ``verified``, how many, and ``accuracy`` over those.

    One response to each prompt, so accuracy is pass@1.
    """
    count, tokens = len(responses), sum(one.tokens for one in responses)
    scores = {
        "prompts": count,
        "forward_kl": sum(one.forward_kl * one.tokens for one in responses) / tokens,
        "reverse_kl": sum(one.reverse_kl * one.tokens for one in responses) / tokens,
        ADHERENCE.name: sum(one.adherent for one in responses) / count,
        TRUNCATED.name: sum(one.truncated for one in responses) / count,
        "repetitive": sum(bool(one.repetitive) for one in responses) / count,
        RESPONSE_LENGTH.name: sum(one.length or 0 for one in responses) / count,
    }
    outcomes = [one.correct for one in responses if one.correct is not None]
    if outcomes:
        scores |= {"verified": len(outcomes), ACCURACY.name: sum(outcomes) / len(outcomes)}
    return scores


def _by(responses: Sequence[HeldoutResponse], key: str) -> dict[str, dict[str, float]]:
    """:func:`mean_scores` of the responses with each value of a field."""
    return {
        value: mean_scores([one for one in responses if getattr(one, key) == value])
        for value in sorted({getattr(one, key) for one in responses})
    }


def heldout_samples(
    version: int | None, rollouts: Sequence[Rollout], graded: Sequence[Graded], text: Callable[[Rollout], str]
) -> list[HeldoutSample]:
    """The first :data:`SAMPLES` responses of each mode: those to the same prompts at every version.

    Args:
        version, rollouts, graded: as in :func:`heldout_responses`.
        text: gives the text of a response, such as :meth:`s2w.eval.grading.Grader.text`.
    """
    samples: list[HeldoutSample] = []
    seen: Counter[str] = Counter()
    for rollout, grade in zip(rollouts, graded, strict=True):
        seen[grade.mode] += 1
        if seen[grade.mode] <= SAMPLES:
            asked = [message["content"] for message in rollout.prompt.messages if message["role"] == "user"]
            samples.append(
                HeldoutSample(
                    version=version,
                    uid=grade.uid,
                    mode=grade.mode,
                    prompt=asked[-1] if asked else "",
                    response=text(rollout),
                    correct=grade.correct,
                    adherent=grade.adherent,
                    finish_reason=rollout.finish_reason,
                )
            )
    return samples
