"""A run directory as a run of both phases leaves it, written by what a run itself writes with; no engine is started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from s2w.config.compose import compose, to_yaml
from s2w.eval.heldout import make_heldout
from s2w.observe.recorder import SEGMENTS, Recorder
from s2w.observe.timeline import Timeline
from s2w.records import Fault, HeldoutResponse, HeldoutSample, Mode, OffPolicyHeldout, Prompt
from s2w.teacher_data.filters import Filtered
from s2w.teacher_data.response import Response

MODES: tuple[Mode, ...] = ("think", "no_think")
PROMPTS, SAMPLES = 64, 3
"""Held-out prompts, and those with kept responses, of each mode."""
MARKUP = "<script>throw new Error('a response ran')</script>"
"""Stands in a response: a page must show it, not run it."""


def write_run(directory: Path, steps: int = 12, finished: bool = True, seed: int = 0) -> None:
    """The student learns: KL falls from 4 to 1, accuracy in think rises, in no_think it does not; the teacher is at 1
    and 0.2. It took 200 s.

    Two rollout engines, one teacher; evaluations every 4 steps.

    Args:
        seed: of what is drawn.
    """
    directory.mkdir()
    config = compose(["experiment=smollm2", "off_policy.steps=6", f"loop.steps={steps}", f"run.dir={directory}"])
    (directory / "config.yaml").write_text(to_yaml(config))
    recorder = Recorder(
        directory, step=0, off_policy_step=0, config={}, tensorboard=False, wandb=None, name="example", began=990.0
    )
    timeline = Timeline(directory / "timeline.jsonl")
    draw = np.random.default_rng(seed)
    off_policy(recorder, directory)
    evaluate(recorder, None, steps, draw)
    evaluate(recorder, 0, steps, draw)
    for step in range(1, steps + 1):
        recorder.step(step_line(step, steps, draw))
        begin = 1_000.0 + 10.0 * step
        for engine in (0, 1):
            timeline.add("generate", engine, [(begin, begin + 4 + engine)], step)
        timeline.add("score", 0, [(begin + 2, begin + 6)], step)
        timeline.add("learn", 0, [(begin + 6, begin + 8.5)], step)
        timeline.add("swap", 0, [(begin + 8.5, begin + 9)], step)
        if step % 4 == 0 or step == steps:
            evaluate(recorder, step, steps, draw)
    recorder.fault(Fault(1_050.0, "rollout engine", "rollout engine 1", "it was killed", "rollout engine 2", 31.0))
    if finished:
        recorder.summary({"wall_seconds": 200.0})
    recorder.close()
    (directory / SEGMENTS).write_text(json.dumps([{"began": 990.0, "until": 1190.0}]))


def off_policy(recorder: Recorder, directory: Path) -> None:
    for step in range(7):
        if step in (0, 3, 6):
            recorder.off_policy_heldout(OffPolicyHeldout(step, 5.0 - step / 3, 900))
        if step:
            recorder.step(
                {
                    "step": step,
                    "epoch": step / 6,
                    "loss": 5.1 - step / 3,
                    "divergence": 5.1 - step / 3,
                    "student_entropy": 3.0 - step / 10,
                    "teacher_entropy": 0.0,
                    "agreement": 0.3 + step / 20,
                    "grad_norm": 2.0,
                    "learning_rate": 1e-3,
                    "skipped": 0,
                    "responses": 8,
                    "response_tokens": 400,
                    "tokens_per_second": {"learn": 300.0},
                    "seconds": 2.0,
                    "phase": "off_policy",
                }
            )
    prompts = {mode: Prompt("a", (), np.zeros(1, np.int32), mode, 0) for mode in MODES}
    answers = [Response(prompts[MODES[i % 2]], i, np.arange(5), "", "stop") for i in range(50)]
    dropped = [
        (answer, reason) for answer, reason in zip(answers[40:], [*["truncated"] * 7, *["wrong"] * 3], strict=True)
    ]
    (directory / "off_policy" / "filters.json").write_text(json.dumps(Filtered(answers[:40], dropped).table()))


def step_line(step: int, steps: int, draw: np.random.Generator) -> dict[str, Any]:
    kl = 4.0 - 3.0 * step / steps
    by_mode: dict[str, dict[str, float]] = {
        mode: {
            "responses": 8,
            "divergence": kl + (0.2 if mode == "think" else -0.2),
            "student_entropy": 3.0 - step / steps,
            "teacher_entropy": 1.5,
            "response_length": 60.0 if mode == "think" else 20.0,
            "truncated": 0.1,
            "mode_adherence": 0.9,
            "accuracy": 0.2 + (0.6 * step / steps if mode == "think" else 0.0),
        }
        for mode in MODES
    }
    return {
        "step": step,
        "loss": kl,
        "divergence": kl,
        "student_entropy": 3.0 - step / steps,
        "teacher_entropy": 1.5,
        "agreement": 0.4 + 0.3 * step / steps,
        "grad_norm": float(draw.uniform(1, 3)),
        "learning_rate": 1e-3 * (1 - step / (steps + 1)),
        "skipped": 0,
        "left_out": 0.0,
        "prompts": 16,
        "response_tokens": 640,
        "response_length": 40.0,
        "length_limit": 80,
        "finish": {"length": 0.1, "stop": 0.9},
        "staleness_mean": 0.0,
        "staleness_max": 0,
        "tokens_per_second": {"generate": float(draw.uniform(240, 270)), "score": 540.0, "learn": 320.0},
        "busy": {"generate": 0.5, "score": 0.4, "learn": 0.25, "swap": 0.05},
        "signal_bytes_per_token": 1152.0,
        "signal_seconds": {"put": 0.1, "fetch": 0.1, "wait": 0.0},
        "signal_bias": {},
        "swap_ms": float(draw.uniform(340, 390)),
        "probe_error": float(draw.uniform(5e-6, 1e-5)),
        "seconds": 9.0,
        "by_mode": by_mode,
        "phase": "on_policy",
    }


def evaluate(recorder: Recorder, version: int | None, steps: int, draw: np.random.Generator) -> None:
    """Of the student at a version, or of the teacher."""
    responses = list(heldout_responses(version, steps, draw))
    samples = []
    for one in responses:
        if int(one.uid.rpartition("/")[2]) < SAMPLES:
            thought = f"<think>\nversion {version} adds\n</think>\n\n" if one.mode == "think" else ""
            text = f"{thought}The answer is {version}. {MARKUP}"
            finish = "length" if one.truncated else "stop"
            samples.append(
                HeldoutSample(
                    version, one.uid, one.mode, f"What is {one.uid}?", text, one.correct, one.adherent, finish
                )
            )
    recorder.heldout(make_heldout(responses), responses, samples)


def heldout_responses(version: int | None, steps: int, draw: np.random.Generator) -> Iterator[HeldoutResponse]:
    for mode in MODES:
        done = 1.0 if version is None else version / steps
        chance = 0.2 + (0.6 * done if mode == "think" else 0.0)
        for i in range(PROMPTS):
            kl = 0.0 if version is None else 4.0 - 3.0 * done + float(draw.normal(0, 0.5))
            length = int(draw.integers(10, 80))
            yield HeldoutResponse(
                version=version,
                uid=f"sum/heldout/{i}",
                mode=mode,
                tokens=length,
                forward_kl=kl,
                reverse_kl=1.1 * kl,
                correct=True if version is None and mode == "think" else bool(draw.random() < chance),
                adherent=bool(draw.random() < 0.95),
                truncated=bool(draw.random() < 0.05),
                repetitive=False,
                length=length,
                teacher="teacher",
                task="sum",
            )
