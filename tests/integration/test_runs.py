"""One `s2w train` of each kind on tiny models, and its first step again by transformers in float64.

Teacher and student have heads that are padded past the tokenizer's 512 ids, by 64 and by 32 rows as likely as any
other: whatever lets one of them in shows in the tokens, the log-probs and the divergence. All parts compute in float32.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from tiny_models import VOCAB_SIZE, make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2w.config.compose import compose
from s2w.launch.check import check
from s2w.launch.train import train
from s2w.observe.progress import Progress
from s2w.records import Prompt, Rollout, Scored
from s2w.teacher_data.batches import ResponseStream, split
from s2w.teacher_data.collect import collect

TEACHER_ROWS, STUDENT_ROWS = VOCAB_SIZE + 64, VOCAB_SIZE + 32
EOS, THINK_END = VOCAB_SIZE - 4, VOCAB_SIZE - 2
ANSWER = "7"
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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    teacher = make_checkpoint(root / "teacher", "untied", 1, vocab_size=TEACHER_ROWS)
    dense = make_checkpoint(root / "dense", "tied", 2, vocab_size=STUDENT_ROWS)
    moe = make_checkpoint(root / "moe", "moe", 3, vocab_size=STUDENT_ROWS)
    tokenizer = AutoTokenizer.from_pretrained(moe)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- endif %}\n{%- endif %}", "{%- else %}\n{{- '<think>\\n' }}\n{%- endif %}\n{%- endif %}"
    )
    tokenizer.save_pretrained(moe)
    [answer] = AutoTokenizer.from_pretrained(teacher)(ANSWER)["input_ids"]
    likely = {answer: 8.5, EOS: 8.5} | dict.fromkeys(range(VOCAB_SIZE, STUDENT_ROWS), 4.8)
    knowing = make_checkpoint(
        root / "knowing", "untied", 4, likely=likely, num_hidden_layers=1, vocab_size=STUDENT_ROWS
    )
    return Models(root, teacher, dense, moe, knowing)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """One Ray cluster for all runs, which join it and leave it: of a process that does nothing else. (`ray start` and
    ray.cluster_utils write their address where every ray.init on the machine looks for one.)"""
    enable_token_auth_by_default()  # ray.init does so where it starts a cluster; here it joins one.
    program = "print(ray.init(num_cpus=2, include_dashboard=False).address_info['gcs_address'], flush=True)"
    command = [sys.executable, "-c", f"import ray, sys; {program}; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as head:
        assert head.stdin is not None and head.stdout is not None
        yield head.stdout.readline().strip()
        head.stdin.close()


@pytest.fixture
def job(models: Models, address: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Trains to the end and keeps what the controller held, with the arrays behind its references."""

    def run(name: str, student: Path, *overrides: str) -> Run:
        batches: list[list[Seen]] = []

        def keep(samples: list[Scored]) -> None:
            batches.append(
                [
                    Seen(
                        sample,
                        dict(ray.get(sample.signal.payload)) if sample.signal else {},
                        ray.get(sample.rollout.candidates) if sample.rollout.candidates else None,
                    )
                    for sample in samples
                ]
            )

        directory = models.root / "runs" / name
        sides = [f"teacher.model={models.teacher}", f"student.model={student}", f"run.dir={directory}"]
        config = compose([*COMMON, *sides, f"cluster.address={address}", *overrides])
        assert train(config, keep) == 0
        return Run(directory, load(models.teacher), batches, capsys.readouterr().out)

    return run


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
    run: Run, student: torch.nn.Module, divergence: Value | None, reward: float = 0.0, rows: str = "sampled"
) -> Reference:
    """The first step's loss, divergence and gradient norm: means over the sampled tokens.

    Args:
        reward: weight of the policy gradient, whose value at a token is -advantage * q / q_sampling.
        rows: ``all`` counts the forced tokens too, as a run must not.
    """
    values, losses, tokens = 0.0, torch.zeros((), dtype=torch.float64), 0
    for seen in run.first:
        rollout = seen.rollout
        counted = rollout.sampled_rows if rows == "sampled" else np.arange(len(rollout.token_ids))
        with torch.no_grad():
            log_p = log_probs(run.teacher, rollout.prompt, rollout.token_ids)
        log_q = log_probs(student, rollout.prompt, rollout.token_ids)
        tokens += len(counted)
        if divergence is not None:
            value = divergence(seen, log_p, log_q)[counted]
            values += float(value.detach().sum())
            losses = losses + seen.sample.weight * value.sum()
        ratio = (at(log_q, rollout.token_ids) - torch.tensor(rollout.log_probs)).exp()[counted]
        losses = losses - reward * seen.sample.advantage * ratio.sum()
    (losses / tokens).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
    return Reference(losses.item() / tokens, values / tokens, norm.item(), tokens)


def check_step(run: Run, reference: Reference) -> None:
    line = run.metrics[0]
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


def test_hidden_states_a_moe_student_a_thinking_budget_and_cross_entropy_first(
    job: Callable[..., Run], models: Models
) -> None:
    """Both phases. The teacher's responses are generated, and none has an id of the padding either."""
    settings = [
        *FRESH, "rollout.thinking_budget=4", "rollout.stop_thinking='\n</think>\n\n'", "off_policy.steps=2",
        "off_policy.max_tokens=16", "off_policy.temperature=1", "off_policy.top_p=1", "off_policy.top_k=-1",
        "off_policy.responses_per_step=4", "off_policy.heldout_responses=2", "off_policy.learning_rate=1e-2",
        "off_policy.filters={truncated: false, format: false, loop_ngram: 0, cjk_share: 1.0, verified: false}",
    ]  # fmt: skip
    run = job("hidden", models.moe, *settings)
    phase = run.directory / "off_policy"

    sides = [f"teacher.model={models.teacher}", f"student.model={models.moe}", f"run.dir={run.directory}"]
    config = compose([*COMMON, *sides, *settings, "run.resume=true"])
    responses = asyncio.run(collect(config, check(config), "cpu", phase, Progress(1, ""))).kept
    assert len(responses) == 8 and max(response.token_ids.max() for response in responses) < VOCAB_SIZE
    start = load(run.directory / "student")
    loss, tokens = 0.0, 0
    for response in ResponseStream(split(responses, 2, seed=0).train, 4, seed=0).batch(0):
        with torch.no_grad():
            loss -= at(log_probs(start, response.prompt, response.token_ids), response.token_ids).sum().item()
        tokens += len(response.token_ids)
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [("off_policy", 1), ("off_policy", 2), ("on_policy", 1)]
    assert lines[0]["loss"] == pytest.approx(loss / tokens, abs=NATS)

    student = load(phase / "checkpoints" / "latest")
    assert student.config.num_experts == 8 and student.config.num_hidden_layers == 1
    check_ids(run, student)
    tokenizer = AutoTokenizer.from_pretrained(models.moe)
    closing = tokenizer("\n</think>\n\n", add_special_tokens=False)["input_ids"]
    for seen in run.first:
        rollout = seen.rollout
        thought = rollout.token_ids[:4]
        cut = rollout.prompt.mode == "think" and len(thought) == 4 and not {THINK_END, EOS} & {*thought}
        assert rollout.forced == (((4, 4 + len(closing)),) if cut else ())
        assert rollout.token_ids[4 : 4 + len(closing)].tolist() == closing or not cut
    assert sum(bool(seen.rollout.forced) for seen in run.first) >= 2
    check_step(run, step(run, student, lambda seen, log_p, log_q: forward_kl(log_p, log_q)))
    # Trained on, the forced tokens would have moved the mean by far more than the tolerance.
    everything = step(run, student, lambda seen, log_p, log_q: forward_kl(log_p, log_q), rows="all")
    assert abs(everything.divergence - run.metrics[0]["divergence"]) > 100 * NATS


def test_all_ids_as_topk_behind_a_preflight_of_log_probs_with_two_workers_an_engine(
    job: Callable[..., Run], models: Models
) -> None:
    """With k = V the signal is the whole distribution: nothing is left for the tail, and the divergence is exact."""
    run = job(
        "topk", models.dense, *FRESH, "signal.kind=topk", f"signal.top_k={VOCAB_SIZE}", "run.preflight=log_probs",
        "rollout.tensor_parallel=2", "teacher.tensor_parallel=2",
    )  # fmt: skip
    [off] = re.findall(r"preflight: the learner's log-probs of the teacher are off by (\S+) nats on average", run.said)
    assert float(off) < NATS
    student = load(run.directory / "student")
    check_ids(run, student)
    for seen in run.first:
        ids = seen.payload["ids"]
        assert (np.sort(ids, -1) == np.arange(VOCAB_SIZE)).all()
        assert (seen.payload["log_tail"] == -np.inf).all()
        with torch.no_grad():
            expected = at(log_probs(run.teacher, seen.rollout.prompt, seen.rollout.token_ids), ids)
        np.testing.assert_allclose(seen.payload["log_probs"], expected.numpy(), rtol=0, atol=NATS)
    check_step(run, step(run, student, lambda seen, log_p, log_q: forward_kl(log_p, log_q)))


def test_candidates_and_less_weight_where_the_teacher_is_wrong(
    job: Callable[..., Run], models: Models, tmp_path: Path
) -> None:
    """u + (1 - u) r with u = 0.2: the teacher was right always, once of two times, never, and was not asked."""
    questions = [f"What is {i} plus {i + 1}?" for i in range(6)]
    answers = [str(2 * i + 1) for i in range(6)]
    given = [
        (0, answers[0]), (0, f"The answer is {answers[0]}."), (1, answers[1]), (1, "100"), (2, "200"), (2, "300"),
    ]  # fmt: skip
    rows = [{"prompt": q, "answer": a, "mode": "no_think"} for q, a in zip(questions, answers, strict=True)]
    prompts, responses = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    responses.write_text("".join(json.dumps(rows[i] | {"response": response}) + "\n" for i, response in given))
    run = job(
        "ids", models.dense, *FRESH, "data.tasks=[]", f"data.path={prompts}", f"off_policy.path={responses}",
        "loop.unreliable_weight=0.2", "signal.kind=ids", "signal.top_k=16",
    )  # fmt: skip
    student = load(run.directory / "student")
    check_ids(run, student)
    weights = {seen.rollout.prompt.messages[0]["content"]: seen.sample.weight for seen in run.first}
    assert weights == pytest.approx(dict(zip(questions, (1.0, 0.6, 0.2, 1.0), strict=False)))

    def coarse(seen: Seen, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        assert seen.candidates is not None
        # The student's own likeliest ids, as its engine knew them.
        likeliest = log_q.topk(16).indices.sort().values
        assert torch.equal(torch.from_numpy(np.sort(seen.candidates, -1)).long(), likeliest)
        both = [
            torch.cat([at(values, seen.candidates), tail(values, seen.candidates)], -1) for values in (log_p, log_q)
        ]
        np.testing.assert_allclose(seen.payload["log_probs"], both[0][:, :-1].numpy(), rtol=0, atol=NATS)
        np.testing.assert_allclose(seen.payload["log_tail"], both[0][:, -1].numpy(), rtol=0, atol=NATS)
        return forward_kl(*both)

    reference = step(run, student, coarse)
    check_step(run, reference)
    assert abs(reference.loss - reference.divergence) > 100 * NATS  # The weights count.


def test_sampled_tokens_behind_a_preflight_of_divergence(job: Callable[..., Run], models: Models) -> None:
    """The estimate q / q_sampling (log q - log p) at each token, and its score-function gradient."""
    run = job("sampled", models.dense, "signal.kind=sampled", "loss.divergence=reverse_kl", "run.preflight=divergence")
    assert "preflight: a student equal to teacher has a divergence of" in run.said
    student = load(models.dense)
    check_ids(run, student)

    def estimate(seen: Seen, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        expected, own = at(log_p, seen.rollout.token_ids), at(log_q, seen.rollout.token_ids)
        np.testing.assert_allclose(seen.payload["log_probs"], expected.numpy(), rtol=0, atol=NATS)
        # Of the value (log q - log p); its gradient is (log q - log p) d log q, so the factor is held constant.
        constant = (own - expected).detach()
        return constant + constant * (own - own.detach())

    check_step(run, step(run, student, estimate))


def questions(path: Path) -> list[str]:
    """Prompts whose answer the student `knowing` often gives, and the overrides that take them."""
    rows = [{"prompt": f"What is {i} minus {i - 7}?", "answer": ANSWER} for i in range(8, 14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data.tasks=[]", f"data.path={path}", "rollout.max_tokens=3"]


def check_advantages(run: Run, models: Models) -> None:
    """Rewards of the first batch from its texts, and their advantages within each prompt; not all are alike."""
    tokenizer = AutoTokenizer.from_pretrained(models.knowing)
    texts = [str(tokenizer.decode(seen.rollout.token_ids, skip_special_tokens=True)) for seen in run.first]
    rewards = np.array([float(text.strip() == ANSWER) for text in texts])
    uids = [seen.rollout.prompt.uid for seen in run.first]
    for uid in set(uids):
        own = np.array([other == uid for other in uids])
        expected = rewards[own] - rewards[own].mean()
        if rewards[own].std():
            expected /= rewards[own].std()
        np.testing.assert_allclose([s.sample.advantage for s in np.array(run.first)[own]], expected, rtol=1e-12)
    assert sum(seen.sample.advantage > 0 for seen in run.first) >= 2


def test_grpo(job: Callable[..., Run], models: Models, tmp_path: Path) -> None:
    """Rewards alone: no teacher is asked about a training batch, only about the held-out ones."""
    run = job(
        "grpo", models.knowing, *questions(tmp_path / "prompts.jsonl"), "loop.steps=2", "loss.objective=grpo",
        "loop.samples_per_prompt=4", "data.think_ratio=0.25", "data.think_ratio_end=0.75",
    )  # fmt: skip
    for number, batch in enumerate(run.batches[1:-1]):
        assert all(seen.sample.signal is None for seen in batch)
        modes = Counter(seen.rollout.prompt.mode for seen in batch)
        assert modes["think"] == 4 * (1, 3)[number]
    assert all(seen.sample.signal for batch in (run.batches[0], run.batches[-1]) for seen in batch)
    assert all(set(line["by_mode"]) == {"think", "no_think"} for line in run.metrics)
    assert all(line["tokens_per_second"]["score"] == 0 for line in run.metrics)
    check_ids(run, load(models.knowing))
    check_advantages(run, models)
    reference = step(run, load(models.knowing), None, reward=1.0)
    line = run.metrics[0]
    # Without a teacher the divergence is the policy gradient's value.
    assert [line["loss"], line["divergence"]] == pytest.approx([reference.loss] * 2, abs=NATS)
    assert line["grad_norm"] == pytest.approx(reference.grad_norm, rel=GRADIENT)
    assert line["teacher_entropy"] is None or np.isnan(line["teacher_entropy"])


def test_rewards_beside_the_divergence(job: Callable[..., Run], models: Models, tmp_path: Path) -> None:
    """KDRL: the loss is the sum of both, and so is its gradient."""
    run = job(
        "kdrl", models.knowing, *questions(tmp_path / "prompts.jsonl"), "reward.weight=0.3", "loop.samples_per_prompt=4"
    )
    student = load(models.knowing)
    check_ids(run, student)
    check_advantages(run, models)
    reference = step(run, student, lambda seen, log_p, log_q: forward_kl(log_p, log_q), reward=0.3)
    check_step(run, reference)
    alone = step(run, load(models.knowing), lambda seen, log_p, log_q: forward_kl(log_p, log_q))
    assert abs(alone.grad_norm / run.metrics[0]["grad_norm"] - 1) > 100 * GRADIENT
