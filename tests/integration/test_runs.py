"""One `s2w train` of each kind on tiny models, and its first step again by transformers in float64."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from huggingface_hub import ModelCard
from ray.exceptions import RayError
from reference_step import (
    ANSWER,
    COMMON,
    EOS,
    FRESH,
    GRADIENT,
    NATS,
    THINK_END,
    Models,
    Run,
    Seen,
    at,
    check_ids,
    check_step,
    forward_kl,
    load,
    log_probs,
    prompt_files,
    questions,
    step,
    tail,
)
from tiny_models import VOCAB_SIZE
from transformers import AutoTokenizer

from s2w.config.compose import compose
from s2w.errors import RunError
from s2w.launch.check import check
from s2w.launch.train import train
from s2w.observe.progress import Progress
from s2w.records import Scored
from s2w.teacher_data.batches import ResponseStream, split
from s2w.teacher_data.collect import collect


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
    # Twice a teacher and a learner, one rollout engine; and lines alone, since the output is no terminal.
    up = re.findall(r"^(teacher|rollout engine|learner rank) 0 is up after [\d: s]+$", run.said, re.MULTILINE)
    assert Counter(up) == {"teacher": 2, "rollout engine": 1, "learner rank": 2}
    loading = re.findall(r"^(teacher|rollout engine) 0: (?:importing|starting) vLLM, [\d: s]+$", run.said, re.MULTILINE)
    assert set(loading) == {"teacher", "rollout engine"}
    assert re.search(r"^8 of 8 responses written, [\d,]+ tokens/s$", run.said, re.MULTILINE)
    assert not {"\r", "\x1b"} & set(run.said)

    sides = [f"teacher.model={models.teacher}", f"student.model={models.moe}", f"run.dir={run.directory}"]
    config = compose([*COMMON, *sides, *settings, "run.resume=true"])
    responses = asyncio.run(collect(config, check(config), "cpu", phase, Progress({}))).kept
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
    # The teacher's engines, up for the responses, gave its own to the held-out prompts, of the student's length.
    ceiling = [json.loads(line) for line in (run.directory / "teacher_heldout/heldout_responses.jsonl").open()]
    assert [(one["mode"], one["uid"]) for one in ceiling] == [
        (seen.rollout.prompt.mode, seen.rollout.prompt.uid) for seen in run.batches[0]
    ]
    assert all(one["length"] == 12 if one["truncated"] else one["length"] <= 12 for one in ceiling)
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
    responses = tmp_path / "responses.jsonl"
    responses.write_text("".join(json.dumps(rows[i] | {"response": response}) + "\n" for i, response in given))
    run = job(
        "ids", models.dense, *FRESH, *prompt_files(tmp_path / "prompts.jsonl", rows, heldout=2),
        f"off_policy.path={responses}", "loop.unreliable_weight=0.2", "signal.kind=ids", "signal.top_k=16",
    )  # fmt: skip
    student = load(run.directory / "student")
    check_ids(run, student)
    weights = {seen.rollout.prompt.messages[0]["content"]: seen.sample.weight for seen in run.first}
    assert weights == pytest.approx(dict(zip(questions, (1.0, 0.6, 0.2, 1.0), strict=False)))

    def coarse(seen: Seen, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        assert seen.candidates is not None
        # The student's own likeliest ids, as its engine knew them: of two that are as likely, either.
        own = at(log_q, seen.candidates).sort(descending=True).values
        torch.testing.assert_close(own, log_q.topk(16).values, rtol=0, atol=NATS)
        assert all(len({*row}) == 16 for row in seen.candidates.tolist())
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


def check_checkpoint(run: Run) -> None:
    """The lines of its card load it, and what it samples ends by itself, as the rollouts did."""
    path = (run.directory / "checkpoints" / "latest").resolve()
    card = ModelCard.load(path / "README.md")
    assert card.data.get("library_name") == "transformers" and "distillation" in card.data.get("tags")
    [code] = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    said: list[str] = []
    names: dict[str, Any] = {"print": said.append}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(code, names)
        assert said[0].startswith("<|im_start|>user")
        model, tokenizer = names["model"], names["tokenizer"]
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": "What is 3 plus 4?"}]] * 64,
            add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=24)
    responses = output[:, inputs["input_ids"].shape[1] :].tolist()
    ended = [
        (response[: response.index(EOS)], response[response.index(EOS) + 1 :])
        for response in responses
        if EOS in response
    ]
    assert len(ended) > 60 and len({len(before) for before, _ in ended}) > 2  # sampled, not greedy
    assert all(set(after) <= {tokenizer.pad_token_id} for _, after in ended)
    rollouts = [seen.rollout for batch in run.batches for seen in batch if seen.rollout.finish_reason == "stop"]
    assert rollouts and all(rollout.token_ids.tolist().index(EOS) == len(rollout.token_ids) - 1 for rollout in rollouts)


def test_grpo(job: Callable[..., Run], models: Models, tmp_path: Path) -> None:
    """Rewards alone: no teacher is asked about a training batch, only about the held-out ones."""
    run = job(
        "grpo", models.knowing, *questions(tmp_path / "prompts.jsonl"), "loop.steps=2", "loss.objective=grpo",
        "loop.samples_per_prompt=4", "data.think_ratio=0.25", "data.think_ratio_end=0.75",
    )  # fmt: skip
    assert "4 prompts: all verified by" in run.said and "; held-out 2: all verified by" in run.said
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
    """KDRL: the loss is the sum of both, and so is its gradient. Before the batch is trained on, the teacher dies and
    its signals are gone."""

    def kill_teacher(batch: int, samples: list[Scored]) -> None:
        if batch == 1:
            [teacher] = [one for one in psutil.process_iter() if one.name().startswith("ray::TeacherEng")]
            teacher.kill()
            for sample in samples:
                assert sample.signal
                with suppress(RayError):
                    while True:  # Ray keeps them for a moment.
                        ray.get(sample.signal.payload, timeout=30)
                        time.sleep(0.1)

    run = job(
        "kdrl", models.knowing, *questions(tmp_path / "prompts.jsonl"), "loss.objective=kdrl", "reward.weight=0.3",
        "loop.samples_per_prompt=4", "learner.learning_rate=1e-5",  # as it ended its responses, so its checkpoint does
        meanwhile=kill_teacher,
    )  # fmt: skip
    student = load(models.knowing)
    check_ids(run, student)
    check_advantages(run, models)
    reference = step(run, student, lambda seen, log_p, log_q: forward_kl(log_p, log_q), reward=0.3)
    check_step(run, reference)
    assert "teacher 0 is lost: " in run.said and "16 of 16 responses are scored again: " in run.said
    [fault] = json.loads((run.directory / "summary.json").read_text())["faults"]
    assert (fault["what"], fault["replacement"]) == ("teacher 0", "teacher 1")
    check_checkpoint(run)
    alone = step(run, load(models.knowing), lambda seen, log_p, log_q: forward_kl(log_p, log_q))
    assert abs(alone.grad_norm / run.metrics[0]["grad_norm"] - 1) > 100 * GRADIENT


def test_an_engine_that_does_not_start_says_why(models: Models, address: str) -> None:
    """The reason is raised in vLLM's engine core, which logs it; and vLLM gets the arguments of ``engine_args``."""
    sides = [f"teacher.model={models.teacher}", f"student.model={models.dense}", f"cluster.address={address}"]
    directory = models.root / "runs" / "unstarted"
    config = compose([*COMMON, *sides, f"run.dir={directory}", "rollout.engine_args={num_gpu_blocks_override: 1}"])
    with pytest.raises(
        RunError, match=r"^rollout engine 0 did not start: ValueError: No available memory for the cache"
    ):
        train(config)
    assert not directory.exists()
