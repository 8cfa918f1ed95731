"""Runs of the objectives that weigh, leave out or add to the divergence; a step of each again in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_step import (
    GRADIENT,
    NATS,
    Models,
    Run,
    Seen,
    at,
    check_ids,
    check_step,
    forward_kl,
    load,
    log_probs,
    questions,
    step,
)
from transformers import AutoTokenizer

GAMMA, PART_NATS, QUANTILE, SHORTEST = 0.7, 2.0, 0.5, 3


def test_a_teacher_that_sees_the_answer_up_to_where_it_and_the_student_part(
    job: Callable[..., Run], models: Models, tmp_path: Path
) -> None:
    """The objective prefix, under a privileged context: weights, the point of parting, and the next batch's lengths."""
    run = job(
        "prefix", models.dense, *questions(tmp_path / "prompts.jsonl"), "rollout.max_tokens=12", "loop.steps=2",
        "teacher.context='{question}\n\nThe answer is {answer}.'", "loss.objective=prefix",
        f"loss.options={{gamma: {GAMMA}, part_nats: {PART_NATS}, length_quantile: {QUANTILE}, shortest: {SHORTEST}}}",
    )  # fmt: skip
    student = load(models.dense)
    check_ids(run, student)
    tokenizer = AutoTokenizer.from_pretrained(models.dense)
    trained: list[float] = []

    def shown(seen: Seen) -> torch.Tensor:
        """log p [n, V] of the teacher that sees the answer."""
        prompt = seen.rollout.prompt
        [question] = prompt.messages
        content = f"{question['content']}\n\nThe answer is {prompt.answer}."
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            enable_thinking=prompt.mode == "think",
            return_dict=False,
        )
        with torch.no_grad():
            return log_probs(run.teacher, replace(prompt, token_ids=np.asarray(ids)), seen.rollout.token_ids)

    def weights(seen: Seen, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        log_p = at(shown(seen), seen.rollout.token_ids)
        result = torch.zeros(len(log_p), dtype=torch.float64)
        advantages = [float(p) - float(q) for p, q in zip(log_p, seen.rollout.log_probs, strict=True)]
        whole = sum(abs(advantage) for advantage in advantages)
        for t in range(len(advantages)):
            if -sum(advantages[:t]) > PART_NATS:
                break
            result[t] = 1 + GAMMA * (1 - sum(abs(advantage) for advantage in advantages[:t]) / whole)
        trained.append(float((result > 0).sum()))
        return result

    reference = step(run, student, lambda seen, log_p, log_q: forward_kl(shown(seen), log_q), factor=weights)
    check_step(run, reference)
    assert run.metrics[0]["trained_share"] == pytest.approx(sum(trained) / reference.tokens)
    assert 0 < run.metrics[0]["trained_share"] < 1
    # Without the answer the teacher's distribution is another.
    plain = step(run, load(models.dense), lambda seen, log_p, log_q: forward_kl(log_p, log_q))
    assert abs(plain.divergence - reference.divergence) > 100 * NATS

    limit = max(SHORTEST, int(np.ceil(1.5 * np.quantile(trained, QUANTILE))))
    assert run.metrics[0]["length_limit"] == limit < 12
    assert max(len(seen.rollout.token_ids) for seen in run.batches[2]) == limit
    # The held-out evaluation is of the student as it will be used.
    assert max(len(seen.rollout.token_ids) for seen in run.batches[-1]) == 12


def test_truncated_responses_are_left_out_and_the_first_weights_hold_the_student_back(
    job: Callable[..., Run], models: Models, tmp_path: Path
) -> None:
    """The objective stable: at the first step the student is its own reference, at the second it has moved."""
    run = job(
        "stable", models.knowing, *questions(tmp_path / "prompts.jsonl"), "loop.samples_per_prompt=4", "loop.steps=2",
        "learner.learning_rate=5e-4", "loop.checkpoint_every=1", "loss.objective=stable",
        "loss.options={reference_weight: 2.0}",
        "reference={cpus: 0.2, enforce_eager: true, dtype: float32}",
    )  # fmt: skip
    check_ids(run, load(models.knowing))
    first = load(models.knowing)
    for number, student in enumerate((first, load(run.directory / "checkpoints" / "step_000001")), start=1):
        batch = run.batches[number]
        kept = [seen.rollout.finish_reason == "stop" for seen in batch]
        assert [seen.sample.counts for seen in batch] == kept
        line = run.metrics[number - 1]
        assert line["left_out"] == pytest.approx(1 - np.mean(kept)) and 0 < line["left_out"] < 1
        away: list[torch.Tensor] = []

        def reverse_kl(seen: Seen, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                log_r = log_probs(load(models.knowing), seen.rollout.prompt, seen.rollout.token_ids)
            away.append((log_q.exp() * (log_q - log_r)).sum(-1))  # noqa: B023
            return 2.0 * away[-1]  # noqa: B023

        reference = step(
            run, student, lambda seen, log_p, log_q: forward_kl(log_p, log_q), batch=number, further=reverse_kl
        )
        check_step(run, reference, number)
        assert line["reference_kl"] == pytest.approx(float(torch.cat(away).mean()), abs=NATS)
    assert run.metrics[0]["reference_kl"] < NATS and run.metrics[1]["reference_kl"] > 100 * NATS


def test_a_fixed_negative_advantage_without_a_teacher(job: Callable[..., Run], models: Models) -> None:
    """The objective negative: the fifth of a batch's tokens that was least likely when it was sampled."""
    run = job("negative", models.dense, "loss.objective=negative", "loss.options={share: 0.2, advantage: 0.5}")
    assert all(seen.sample.signal is None for seen in run.first)
    drawn = np.concatenate([seen.rollout.log_probs for seen in run.first])
    limit = sorted(drawn)[int(0.2 * len(drawn)) - 1]
    loss, tokens, student = torch.zeros((), dtype=torch.float64), 0, load(models.dense)
    for seen in run.first:
        rollout = seen.rollout
        ratio = (
            at(log_probs(student, rollout.prompt, rollout.token_ids), rollout.token_ids)
            - torch.tensor(rollout.log_probs)
        ).exp()
        chosen = torch.from_numpy(rollout.log_probs <= limit)
        loss, tokens = loss + 0.5 * ratio[chosen].sum(), tokens + int(chosen.sum())
    (loss / tokens).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
    assert run.metrics[0]["loss"] == pytest.approx(loss.item() / tokens, abs=NATS)
    assert run.metrics[0]["grad_norm"] == pytest.approx(norm.item(), rel=GRADIENT)
