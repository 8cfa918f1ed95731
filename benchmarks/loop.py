"""Step time of the whole loop against the sum of its bare parts doing the same work.

    python benchmarks/loop.py --json loop.json

The loop runs first, synchronous (loop.max_staleness=0), and its batches are kept. Then each part does the same batches
alone, in a fresh process, with nothing of s2w around it but the environment variables of its actors:

- generate: vLLM's offline ``LLM.generate`` with the arguments of the rollout engine, the same prompts and seeds,
  log-probs of the sampled tokens, every response forced to the length that it had in the loop;
- score: vLLM's offline ``LLM.encode`` with the teacher's arguments and the scoring plugin, a whole batch at once;
- learn: plain PyTorch on the same micro-batches: forward, KL of the response rows by autograd, backward, clip, AdamW.
  The teacher's hidden rows are those that "score" gave. Its loss must be the loop's.

Times are seconds, medians over the steps after the warm-up steps, which are left out on both sides. ``ratio`` is the
loop's step over ``parts_sum``. A ratio of 1 is no limit: what is scored while others are still being written costs
the loop nothing, and its fused loss is faster than the plain one.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2w.actors.hardware import core_count, resolve_dtype
from s2w.actors.vllm import actor_options, prepare_process
from s2w.config.compose import compose
from s2w.config.schema import Config
from s2w.errors import ConfigError
from s2w.launch.check import check
from s2w.models.student import materialise_student
from s2w.observe.timeline import merge, seconds
from s2w.records import Rollout, Scored

LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest relative difference of the first step's loss, which both sides compute with the same weights."""


@dataclass(frozen=True)
class Sample:
    """Token ids of one rollout, and the seed that it was sampled with."""

    prompt: list[int]
    response: list[int]
    seed: int


@dataclass(frozen=True)
class Work:
    """What the parts are to do again."""

    config: Config
    device: str
    student: Path
    max_model_len: int
    vocab_size: int
    steps: list[list[Sample]]

    def dtype(self, part: str) -> str:
        return resolve_dtype(getattr(self.config, part).dtype, self.device)


@dataclass(frozen=True)
class LoopRun:
    """A run of ``s2w train``."""

    batches: list[list[Rollout]]
    """Training batches, without the held-out ones."""
    metrics: list[dict[str, Any]]
    """metrics.jsonl."""
    summary: dict[str, Any]
    """summary.json."""
    timeline: list[dict[str, Any]]
    """timeline.jsonl."""


def run_loop(config: Config) -> LoopRun:
    """Trains with ``config``, in this process and its Ray actors.

    Raises:
        RuntimeError: the run was interrupted.
    """
    from s2w.launch.train import train

    batches: list[list[Rollout]] = []

    def keep(batch: list[Scored]) -> None:
        batches.append([sample.rollout for sample in batch])  # Not the signals: they would fill the object store.

    if code := train(config, keep):
        raise RuntimeError(f"the run ended early, with exit code {code}")
    run = Path(config.run.dir)

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / name).read_text().splitlines()]

    summary = json.loads((run / "summary.json").read_text())
    # The first and the last batch are the held-out evaluations.
    return LoopRun(batches[1:-1], lines("metrics.jsonl"), summary, lines("timeline.jsonl"))


def stages(run: LoopRun) -> dict[str, list[float]]:
    """Where each step of the loop spent its wall-clock time; the stages of a step add up to ``step``.

    score: after the last token of the step was sampled; ``score_at_work`` is all of it. probe: from the end of the
    swap to the end of the step. other: dispatch and bookkeeping.
    """
    found: dict[str, list[float]] = {
        name: []
        for name in ("generate", "score", "learn", "swap", "probe", "other", "step", "score_at_work")
    }  # fmt: skip
    for line in run.metrics:
        work = {
            stage: merge(
                (entry["start"], entry["stop"])
                for entry in run.timeline
                if entry["step"] == line["step"] and entry["stage"] == stage
            )
            for stage in ("generate", "score", "learn", "swap")
        }
        times = {stage: seconds(intervals) for stage, intervals in work.items()}
        found["score_at_work"].append(times["score"])
        times["score"] = seconds(merge([*work["generate"], *work["score"]])) - times["generate"]
        # A step begins when its first request is sent, and ends with the probe.
        times["probe"] = max(0.0, work["generate"][0][0] + line["seconds"] - work["swap"][-1][1])
        times["other"] = line["seconds"] - sum(times.values())
        times["step"] = line["seconds"]
        for name, value in times.items():
            found[name].append(value)
    return found


def generate(work: Work, directory: Path) -> dict[str, Any]:
    """The rollouts, by vLLM alone; arguments as in s2w/rollout/engine.py."""
    rollout = work.config.rollout
    options = prepare_process(work.device, rollout.tensor_parallel, rollout.threads, rollout.kv_cache_gib)
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    batched = rollout.max_batched_tokens
    if work.device == "cpu":
        batched = max(batched or 2048, work.max_model_len)
        options["enable_chunked_prefill"] = False
    llm = LLM(
        model=str(work.student),
        dtype=work.dtype("rollout"),  # type: ignore[arg-type]  # a Literal of vLLM's
        tensor_parallel_size=rollout.tensor_parallel,
        enable_expert_parallel=rollout.expert_parallel,
        max_model_len=work.max_model_len,
        max_num_seqs=rollout.max_sequences,
        max_num_batched_tokens=batched,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enforce_eager=rollout.enforce_eager,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        **options,
    )
    times = []
    for step in work.steps:
        llm.reset_prefix_cache()  # as a swap does
        # The length needs no min_tokens, which would cost a pass over the logits: only max_tokens can end a response.
        parameters = [
            SamplingParams(
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
                max_tokens=len(sample.response),
                ignore_eos=True,
                seed=sample.seed,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for sample in step
        ]
        prompts: Any = [{"prompt_token_ids": sample.prompt} for sample in step]
        began = time.perf_counter()
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        times.append(time.perf_counter() - began)
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        if lengths != [len(sample.response) for sample in step]:
            raise AssertionError(f"responses of {lengths} tokens are not as long as the loop's")
    return {"seconds": times}


def score(work: Work, directory: Path) -> dict[str, Any]:
    """The teacher's hidden rows, by vLLM alone; arguments as in s2w/teacher/engine.py."""
    from s2w.teacher.scoring import as_teacher

    teacher = work.config.teacher
    world = teacher.tensor_parallel * teacher.pipeline_parallel
    options = prepare_process(work.device, world, teacher.threads, teacher.kv_cache_gib)
    import torch
    from vllm import LLM, PoolingParams
    from vllm.config import PoolerConfig

    llm = LLM(
        model=teacher.model,
        revision=teacher.revision,
        dtype=work.dtype("teacher"),  # type: ignore[arg-type]  # a Literal of vLLM's
        max_model_len=teacher.max_model_len or work.max_model_len,
        runner="pooling",
        pooler_config=PoolerConfig(task="token_embed"),
        hf_overrides=as_teacher,
        tensor_parallel_size=teacher.tensor_parallel,
        pipeline_parallel_size=teacher.pipeline_parallel,
        enable_expert_parallel=teacher.expert_parallel,
        max_num_batched_tokens=teacher.max_batched_tokens,
        max_num_seqs=teacher.max_sequences,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=32 if work.device == "cpu" else None,
        gpu_memory_utilization=teacher.gpu_memory_utilization,
        enforce_eager=teacher.enforce_eager,
        **options,
    )
    times, hidden = [], []
    for step in work.steps:
        parameters = [
            PoolingParams(
                task="token_embed",
                skip_reading_prefix_cache=False,
                extra_kwargs={"kind": "hidden", "start": len(sample.prompt) - 1, "top_k": 0, "temperature": 1.0},
            )
            for sample in step
        ]
        prompts: Any = [{"prompt_token_ids": [*sample.prompt, *sample.response][:-1]} for sample in step]
        began = time.perf_counter()
        outputs = llm.encode(prompts, parameters, pooling_task="token_embed", use_tqdm=False)
        times.append(time.perf_counter() - began)
        hidden.append([output.outputs.data for output in outputs])
    torch.save(hidden, directory / "hidden.pt")
    return {"seconds": times}


def learn(work: Work, directory: Path) -> dict[str, Any]:
    """The updates, by plain PyTorch."""
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    from s2w.learner.batching import plan_micro_batches
    from s2w.learner.schedule import learning_rate
    from s2w.models.head import load_head

    learner, device = work.config.learner, torch.device(work.device)
    torch.set_num_threads(learner.threads or core_count())
    dtype = getattr(torch, work.dtype("learner"))
    model: Any = AutoModelForCausalLM.from_pretrained(work.student, dtype=dtype, attn_implementation=learner.attention)
    model.to(device).train()
    if learner.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    head = model.get_output_embeddings().weight
    teacher_head = load_head(work.config.teacher.model, work.config.teacher.revision).weight.to(device, dtype)
    weights = list(model.parameters())
    # In lower precision the optimizer works on a float32 copy, as DeepSpeed's does.
    masters = weights if dtype == torch.float32 else [w.detach().float().requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in masters if w.ndim > 1], "weight_decay": learner.weight_decay},
            {"params": [w for w in masters if w.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(learner.beta1, learner.beta2),
        eps=learner.eps,
        fused=True,
    )
    vocab = work.vocab_size
    times, losses = [], []
    for index, (step, hidden) in enumerate(zip(work.steps, torch.load(directory / "hidden.pt"), strict=True)):
        lengths = [len(sample.prompt) + len(sample.response) - 1 for sample in step]
        tokens = sum(len(sample.response) for sample in step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(learner, index, work.config.loop.steps)
        loss_sum = 0.0
        began = time.perf_counter()
        for batch in plan_micro_batches(lengths, learner.tokens_per_micro_batch, 1)[0]:
            longest = max(lengths[i] for i in batch.samples)
            ids = torch.zeros(len(batch.samples), longest, dtype=torch.int64)
            rows = []
            for row, i in enumerate(batch.samples):
                ids[row, : lengths[i]] = torch.tensor([*step[i].prompt, *step[i].response][:-1])
                rows.append(torch.arange(len(step[i].prompt) - 1, lengths[i]) + row * longest)
            student = model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state.flatten(0, 1)
            student = student[torch.cat(rows).to(device)]
            with torch.no_grad():
                teacher = torch.cat([hidden[i] for i in batch.samples]).to(device, dtype)
                log_p = (teacher @ teacher_head[:vocab].T).float().log_softmax(-1)
            log_q = (student @ head[:vocab].T).float().log_softmax(-1)
            loss = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / tokens
            loss.backward()
            loss_sum += loss.item()
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, learner.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        if masters is not weights:
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        losses.append(loss_sum)
    return {"seconds": times, "losses": losses}


PARTS: dict[str, Callable[[Work, Path], dict[str, Any]]] = {"generate": generate, "score": score, "learn": learn}


def run_part(part: str, device: str, directory: Path) -> dict[str, Any]:
    """Runs a part in a fresh process, with the environment of the loop's actors.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    command = [sys.executable, __file__, "--part", part, "--directory", str(directory)]
    environment = os.environ | actor_options(device, cpus=0, world=1)["runtime_env"]["env_vars"]
    log = directory / f"{part}.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            output, _ = process.communicate()
        finally:
            # vLLM's workers are of the part's process group: whatever happens to the part, they end with it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError(f"the bare part {part} failed:\n{log.read_text()[-4000:]}")
    return json.loads(output.splitlines()[-1])


def check_comparable(config: Config) -> None:
    """Raises ConfigError unless the bare parts can do what ``config`` describes."""
    wanted = {
        "rollout.engines": (config.rollout.engines, 1),
        "teacher.replicas": (config.teacher.replicas, 1),
        "learner.ranks": (config.learner.ranks, 1),
        "loop.max_staleness": (config.loop.max_staleness, 0),
        "loop.eval_every": (config.loop.eval_every, 0),
        "loop.checkpoint_every": (config.loop.checkpoint_every, 0),
        "signal.kind": (config.signal.kind, "hidden"),
        "loss.divergence": (config.loss.divergence, "forward_kl"),
        "loss.temperature": (config.loss.temperature, 1.0),
    }
    for name, (given, needed) in wanted.items():
        if given != needed:
            raise ConfigError(f"{name}={given}: the bare parts are for {name}={needed}")


def measure(config: Config, warmup: int) -> dict[str, Any]:
    """Runs the loop, then the parts."""
    check_comparable(config)
    facts = check(config)
    run = run_loop(config)
    import torch

    device = "cuda" if torch.cuda.is_available() and config.cluster.device != "cpu" else "cpu"
    steps = [
        [
            Sample(rollout.prompt.token_ids.tolist(), rollout.token_ids.tolist(), rollout.prompt.seed + rollout.sample)
            for rollout in batch
        ]
        for batch in run.batches
    ]
    work = Work(
        config=config,
        device=device,
        student=materialise_student(config.student, Path(config.run.dir) / "student", config.run.seed),
        max_model_len=facts.max_model_len,
        vocab_size=facts.vocabulary.vocab_size,
        steps=steps,
    )
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "work.pickle").write_bytes(pickle.dumps(work))
        for part in PARTS:
            print(f"bare part: {part}", flush=True)
            results[part] = run_part(part, device, Path(directory))

    divergences = {"loop": [line["divergence"] for line in run.metrics], "bare": results["learn"]["losses"]}
    first = {side: values[0] for side, values in divergences.items()}
    if abs(first["bare"] / first["loop"] - 1) > LOSS_TOLERANCE[work.dtype("learner")]:
        raise AssertionError(f"the bare part learns from another loss than the loop: {first}")

    def median(values: Iterable[float]) -> float:
        return statistics.median(list(values)[warmup:])

    loop = {name: median(values) for name, values in stages(run).items()}
    step_seconds = loop.pop("step")
    parts = {part: median(result["seconds"]) for part, result in results.items()}
    response = [sum(len(sample.response) for sample in step) for step in steps]
    prompt = [sum(len(sample.prompt) for sample in step) for step in steps]
    return {
        "step_seconds": step_seconds,
        "parts": parts,
        "parts_sum": sum(parts.values()),
        "ratio": step_seconds / sum(parts.values()),
        "loop": loop,
        "tokens": {
            "samples": len(steps[0]),
            "response": median(response),
            "prompt": median(prompt),
            "response_per_second": median(
                tokens / line["seconds"] for tokens, line in zip(response, run.metrics, strict=True)
            ),
        },
        "machine": {
            "device": device,
            "cores": core_count(),
            "dtype": {part: work.dtype(part) for part in ("rollout", "teacher", "learner")},
        },
        "steps": len(steps),
        "warmup": warmup,
        "all": {
            "step_seconds": [line["seconds"] for line in run.metrics],
            "parts": {part: result["seconds"] for part, result in results.items()},
            "response_tokens": response,
            "divergence": divergences,
        },
    }


def show(report: dict[str, Any]) -> None:
    tokens, machine, loop, parts = (report[name] for name in ("tokens", "machine", "loop", "parts"))
    dtypes = sorted(set(machine["dtype"].values()))
    print(
        f"\n{tokens['samples']} samples a step, {tokens['response']:,.0f} response and {tokens['prompt']:,.0f} prompt "
        f"tokens; {machine['device']}, {machine['cores']} cores, {'/'.join(dtypes)}\n"
        f"seconds, medians of {report['steps'] - report['warmup']} steps (the first {report['warmup']} left out)\n"
    )
    print(f"{'':12}{'loop':>8}{'bare':>8}{'more':>8}")
    notes = {"score": f"   at work {loop['score_at_work']:.2f}, the rest of it while others were being written"}
    for stage in ("generate", "score", "learn", "swap", "probe", "other"):
        bare = f"{parts[stage]:8.2f}" if stage in parts else f"{'':8}"
        more = loop[stage] - parts.get(stage, 0.0)
        print(f"{stage:12}{loop[stage]:8.2f}{bare}{more:+8.2f}{notes.get(stage, '')}")
    print(f"{'step':12}{report['step_seconds']:8.2f}{report['parts_sum']:8.2f}{'':8}   ratio {report['ratio']:.2f}")
    print(f"\n{tokens['response_per_second']:,.0f} response tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="smollm2", help="of configs/experiment")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="first steps that are left out")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra's, after all options")
    arguments = parser.parse_args()
    if arguments.part:
        work = pickle.loads((arguments.directory / "work.pickle").read_bytes())
        print(json.dumps(PARTS[arguments.part](work, arguments.directory)))
        return
    if not 0 <= arguments.warmup < arguments.steps:
        parser.error("--warmup must leave at least one of --steps")
    with tempfile.TemporaryDirectory(prefix="s2w-loop-") as run:
        settings = [f"experiment={arguments.experiment}", f"loop.steps={arguments.steps}", f"run.dir={run}/run"]
        report = measure(compose([*settings, "run.tensorboard=false", *arguments.overrides]), arguments.warmup)
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"loop: {error}")
