"""A training step again, by transformers in float64, from what a run's controller saw.

Teacher and student have heads that are padded past the tokenizer's 512 ids, by 64 and by 32 rows as likely as any
other: whatever lets one of them in shows in the tokens, the log-probs and the divergence. All parts compute in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE
from transformers import AutoModelForCausalLM

from s2w.records import Prompt, Rollout, Scored

TEACHER_ROWS, STUDENT_ROWS = VOCAB_SIZE + 64, VOCAB_SIZE + 32
EOS, THINK_END = VOCAB_SIZE - 4, VOCAB_SIZE - 2
ANSWER = "7"
"""What the student `knowing` often answers."""
NATS = 1e-5
"""float32 against float64: log-probs of the engines, and means of divergences."""
GRADIENT = 1e-4
"""The same for norms of gradients, relative."""

FRESH = ["student.init=fresh", "student.overrides={num_hidden_layers: 1}"]
COMMON = [
    "data.tasks=[chain_sum]", "data.train_prompts=4", "data.heldout_prompts=2", "data.max_prompt_tokens=128",
    "rollout.max_tokens=12", "rollout.enforce_eager=true", "teacher.enforce_eager=true",
    "rollout.cpus=0.2", "teacher.cpus=0.2", "learner.cpus=0.2", "learner.tokens_per_micro_batch=512",
    "learner.learning_rate=3e-3", "loop.steps=1", "loop.prompts_per_step=4", "loop.samples_per_prompt=2",
    "cluster.device=cpu", "run.tensorboard=false", "run.deterministic=true",
    "teacher.dtype=float32", "rollout.dtype=float32", "learner.dtype=float32",
]  # fmt: skip


@dataclass
class Seen:
    """A sample, with what its references held."""

    sample: Scored
    payload: dict[str, Any]
    """Empty without a signal."""
    candidates: np.ndarray | None

    @property
    def rollout(self) -> Rollout:
        return self.sample.rollout


@dataclass
class Run:
    """A finished run and what its controller saw: the held-out batch, the training batches, the held-out batch."""

    directory: Path
    teacher: torch.nn.Module
    """float64."""
    batches: list[list[Seen]]
    said: str

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["phase"] == "on_policy"]

    @property
    def first(self) -> list[Seen]:
        """The batch of the first step."""
        return self.batches[1]


@dataclass
class Reference:
    """A step by transformers: what `metrics.jsonl` must say of it."""

    loss: float
    divergence: float
    grad_norm: float
    tokens: int


@dataclass
class Models:
    """Checkpoints."""

    root: Path
    teacher: Path
    dense: Path
    moe: Path
    """Its chat template opens the think block, so that responses are in it until they close it."""
    knowing: Path
    """A student of one layer, half of whose responses are the answer."""


def load(path: Path) -> Any:
    """In float64, so that its rounding is none of the tolerance."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")


def log_probs(model: torch.nn.Module, prompt: Prompt, token_ids: np.ndarray) -> torch.Tensor:
    """float64 [n, 512]: at each response token, over the ids that both models have; differentiable."""
    ids = torch.from_numpy(np.concatenate([prompt.token_ids, token_ids])).long()
    return model(ids[None]).logits[0, len(prompt.token_ids) - 1 : -1, :VOCAB_SIZE].log_softmax(-1)


def at(values: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
    """[n, k] of [n, V]: the columns ``ids`` [n, k] of each row, or [n] of ids [n]."""
    chosen = torch.from_numpy(ids.astype(np.int64))
    return values.gather(-1, chosen[:, None])[:, 0] if chosen.ndim == 1 else values.gather(-1, chosen)


def tail(values: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
    """[n, 1]: log mass outside of ``ids``."""
    return values.scatter(-1, torch.from_numpy(ids.astype(np.int64)), -torch.inf).logsumexp(-1, keepdim=True)


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


Value = Callable[[Seen, torch.Tensor, torch.Tensor], torch.Tensor]
"""From a response, log p and log q, float64 [n, 512], to a value of each of its tokens."""


def step(
    run: Run,
    student: torch.nn.Module,
    divergence: Value | None,
    *,
    reward: float = 0.0,
    rows: str = "sampled",
    batch: int = 1,
    factor: Value = lambda seen, log_p, log_q: torch.ones(len(log_p)),
    further: Value = lambda seen, log_p, log_q: torch.zeros(len(log_p)),
) -> Reference:
    """A step's loss, divergence and gradient norm: means over the sampled tokens of the samples that count.

    Args:
        reward: weight of the policy gradient, whose value at a token is -advantage * q / q_sampling.
        rows: ``all`` counts the forced tokens too, as a run must not.
        batch: of the run's batches.
        factor: on the divergence of a token in the loss.
        further: what the loss has beside it.
    """
    values, losses, tokens = 0.0, torch.zeros((), dtype=torch.float64), 0
    for seen in (seen for seen in run.batches[batch] if seen.sample.counts):
        rollout = seen.rollout
        counted = rollout.sampled_rows if rows == "sampled" else np.arange(len(rollout.token_ids))
        with torch.no_grad():
            log_p = log_probs(run.teacher, rollout.prompt, rollout.token_ids)
        log_q = log_probs(student, rollout.prompt, rollout.token_ids)
        tokens += len(counted)
        if divergence is not None:
            value = divergence(seen, log_p, log_q)
            values += float(value[counted].detach().sum())
            losses = losses + seen.sample.weight * (factor(seen, log_p, log_q) * value)[counted].sum()
        losses = losses + further(seen, log_p, log_q)[counted].sum()
        ratio = (at(log_q, rollout.token_ids) - torch.tensor(rollout.log_probs)).exp()[counted]
        advantages: Any = seen.sample.advantage
        if seen.sample.token_advantages is not None:
            advantages = torch.from_numpy(seen.sample.token_advantages)[counted]
        losses = losses - reward * (advantages * ratio).sum()
    (losses / tokens).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
    return Reference(losses.item() / tokens, values / tokens, norm.item(), tokens)


def check_step(run: Run, reference: Reference, number: int = 1) -> None:
    line = run.metrics[number - 1]
    assert line["loss"] == pytest.approx(reference.loss, abs=NATS)
    assert line["divergence"] == pytest.approx(reference.divergence, abs=NATS)
    assert line["grad_norm"] == pytest.approx(reference.grad_norm, rel=GRADIENT)


def check_ids(run: Run, student: torch.nn.Module) -> None:
    """Nothing of the padding is anywhere; the engine's log-probs are of all ids but the padding's."""
    for seen in (seen for batch in run.batches for seen in batch):
        for name, ids in (
            ("sampled", seen.rollout.token_ids), ("listed", seen.payload.get("ids")), ("candidates", seen.candidates),
        ):  # fmt: skip
            assert ids is None or ids.max() < VOCAB_SIZE, name
    for seen in (*run.batches[0], *run.first):
        rollout = seen.rollout
        with torch.no_grad():
            expected = at(log_probs(student, rollout.prompt, rollout.token_ids), rollout.token_ids)
        sampled = rollout.sampled_rows
        np.testing.assert_allclose(rollout.log_probs[sampled], expected.numpy()[sampled], rtol=0, atol=NATS)


def questions(path: Path) -> list[str]:
    """Prompts whose answer the student `knowing` often gives, and the overrides that take them."""
    rows = [{"prompt": f"What is {i} minus {i - 7}?", "answer": ANSWER} for i in range(8, 14)]
    return [*prompt_files(path, rows, heldout=2), "rollout.max_tokens=3"]


def prompt_files(path: Path, rows: Sequence[dict[str, str]], heldout: int) -> list[str]:
    """Writes all but the last rows to ``path`` and those to a file of held-out prompts; returns the overrides."""
    last = path.with_name("heldout.jsonl")
    for file, part in ((path, rows[:-heldout]), (last, rows[-heldout:])):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    return ["data.tasks=[]", f"data.path={path}", f"data.heldout_path={last}"]
