"""Bad input ends with one sentence and exit code 2, before a model loads or Ray starts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from tiny_models import make_checkpoint
from transformers import Qwen3MoeConfig

from s2w import cli
from s2w.config.bounds import check_bounds, ranges, type_hints
from s2w.config.compose import compose
from s2w.config.schema import Config, EvalRun
from s2w.errors import ConfigError
from s2w.launch.check import check, check_resources
from s2w.models.parallel import check_parallel

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense`` and ``moe``; the others are damaged copies of the first."""
    directory = tmp_path_factory.mktemp("models")
    dense = make_checkpoint(directory / "dense", "tied", 0)
    make_checkpoint(directory / "moe", "moe", 0)
    for name in ("cut", "bare", "missing", "mixed"):
        shutil.copytree(dense, directory / name)
    weights = directory / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (directory / "bare" / "model.safetensors").unlink()
    for name, file in (("missing", "model-00002-of-00002.safetensors"), ("mixed", "model.safetensors")):
        (directory / name / INDEX).write_text(json.dumps({"weight_map": {"another.weight": file}}))
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    (directory / "file").touch()
    (directory / "binary.jsonl").write_bytes(b'{"prompt": "a"}\n\xff\xfe\x00\x01\n')
    (directory / "binary.parquet").write_bytes(bytes(range(256)) * 10)
    (directory / "latin.csv").write_bytes("prompt,answer\nWas hei\xdft das?,x\n".encode("latin-1"))
    (directory / "none.csv").write_text("prompt,answer\n")
    (directory / "empty.jsonl").write_text('{"prompt": "a", "answer": "1"}\n{"prompt": " ", "answer": "2"}\n')
    (directory / "empty_response.jsonl").write_text('{"prompt": "", "response": "b"}\n')
    return directory


TRAIN = [
    ("rollout.top_p=1.5", "rollout.top_p=1.5: write a number above 0, up to 1"),
    ("rollout.top_p=0", "rollout.top_p=0.0: write a number above 0, up to 1"),
    ("rollout.top_k=0", "rollout.top_k=0: write at least 1, or -1"),
    ("off_policy.top_p=0", "off_policy.top_p=0.0: write a number above 0, up to 1"),
    ("rollout.temperature=0.001", "rollout.temperature=0.001: write a number from 0.01 to 2, or 0"),
    ("learner.learning_rate=nan", "learner.learning_rate=nan is not a finite number: write a number above 0"),
    ("loss.temperature=inf", "loss.temperature=inf is not a finite number"),
    ("student.overrides={initializer_range: nan}", "is not a finite number"),
    ("run.seed=-1", "run.seed=-1: write 0 or more, below 4294967296"),
    ("data.train_prompts=-5", "data.train_prompts=-5: write at least 1"),
    ("learner.attention=quick", "learner.attention=quick: write one of sdpa, eager, flash_attention_2"),
    ("teacher.max_batched_tokens=32", "teacher.max_batched_tokens=32 is less than teacher.max_sequences=64"),
    ("teachers.math={model: m, gpu_memory_utilization: 2}", "teachers.math.gpu_memory_utilization=2.0: write a number"),
    ("teachers.math={model: m, max_model_len: x}", "teachers.math.max_model_len: Value 'x'"),
    ("teacher.max_model_len=64", "is less than data.max_prompt_tokens + rollout.max_tokens = 2048, which it scores"),
    ("teacher.max_model_len=5000", "teacher.max_model_len=5000 is more than the model's context of 4096 tokens"),
    ("teacher.expert_parallel=true", "teacher.expert_parallel=true, but the model has no experts"),
    ("teacher.pipeline_parallel=3", "teacher.pipeline_parallel=3 is more than the 2 layers"),
    ("rollout.tensor_parallel=3", "rollout.tensor_parallel=3 does not divide the 4 attention heads"),
    ("student={init: pruned, keep_layers: 3}", "student.keep_layers must be between 2 and the model's 2 layers, not 3"),
    ("teacher.model=MODELS/cut", "cut/model.safetensors' is cut off or no safetensors file"),
    ("student.model=MODELS/cut", "cut/model.safetensors' is cut off or no safetensors file"),
    ("teachers.math={model: MODELS/cut}", "cut/model.safetensors' is cut off or no safetensors file"),
    ("teacher.model=MODELS/bare", "has no weights: the directory holds no .safetensors file"),
    ("teacher.model=MODELS/missing", "names 'model-00002-of-00002.safetensors', but there is no such file"),
    ("student.model=MODELS/mixed", "names 'model.safetensors', but the tensor 'another.weight' is not in it"),
    ("data={tasks: [], path: FILES/binary.jsonl}", "binary.jsonl' is not UTF-8 text: invalid start byte, 0xff"),
    ("data={tasks: [], path: FILES/binary.parquet}", "binary.parquet' is not a whole Parquet file"),
    ("data={tasks: [], path: FILES/empty.jsonl, heldout_prompts: 1}", "heldout row 0: the prompt is empty"),
    ("off_policy={steps: 1, path: FILES/binary.jsonl}", "binary.jsonl' is not UTF-8 text"),
    ("off_policy={steps: 1, path: FILES/binary.parquet}", "binary.parquet' is not a whole Parquet file"),
    ("off_policy={steps: 1, path: FILES/file}", "file' is none of .jsonl, .parquet, .csv"),
    ("run.dir=FILES/file/run", "file is a file, not a directory: choose another one"),
    ("run.dir=FILES/file", "file is a file, not a directory: choose another one"),
    ("cluster.address=127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 (Connection refused): check that"),
    ("cluster.address=ray://127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 (Connection refused): check that"),
    ("cluster.address=127.0.0.1", "cluster.address=127.0.0.1: write HOST:PORT, ray://HOST:PORT or auto"),
]
EVAL = [
    ("rollout.top_p=0", "rollout.top_p=0.0: write a number above 0, up to 1"),
    ("eval.k=[4,0]", "eval.k=[4, 0]: write at least 1"),
    ("eval.k=[]", "eval.k=[]: write at least one k"),
    ("eval.thinking_budgets=[null,0]", "eval.thinking_budgets=[None, 0]: write at least 1, or null"),
    ("eval.seed=-1", "eval.seed=-1: write 0 or more"),
    ("eval.verifier=guess", "eval.verifier=guess: write one of math_verify, exact_match"),
    ("rollout.max_batched_tokens=8", "rollout.max_batched_tokens=8 is less than rollout.max_sequences=64"),
    ("model=MODELS/cut", "cut/model.safetensors' is cut off or no safetensors file"),
    ("rollout.tensor_parallel=3", "rollout.tensor_parallel=3 does not divide the 4 attention heads"),
    ("eval={tasks: [], path: FILES/latin.csv}", "latin.csv' is not UTF-8 text"),
    ("eval={tasks: [], path: FILES/none.csv}", "none.csv' holds no prompts"),
    ("eval={tasks: [], path: FILES/empty.jsonl}", "row 1: its 'prompt' (eval.prompt_column) is empty"),
    ("eval.output=FILES", "is a directory: write the name of a file"),
    ("cluster.address=127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
]


@pytest.mark.parametrize(
    ("command", "extra", "sentence"), [*(("train", *case) for case in TRAIN), *(("eval", *case) for case in EVAL)]
)
def test_one_sentence_and_exit_code_2(
    models: Path,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    extra: str,
    sentence: str,
) -> None:
    dense = models / "dense"
    arguments = {
        "train": [
            f"teacher.model={dense}",
            f"student.model={dense}",
            "data.tasks=[chain_sum]",
            f"run.dir={tmp_path}/r",
        ],
        "eval": [f"model={dense}", "eval.tasks=[chain_sum]", "eval.problems=2"],
    }[command]
    extra = extra.replace("MODELS", str(models)).replace("FILES", str(files)).replace("model: m,", f"model: {dense},")
    capsys.readouterr()
    assert cli.main([command, *arguments, "cluster.device=cpu", extra]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("s2w: ") and sentence in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_the_environment_is_an_address_too(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    dense = models / "dense"
    required = [f"teacher.model={dense}", f"student.model={dense}", "data.tasks=[chain_sum]", f"run.dir={tmp_path}/r"]
    assert cli.main(["train", *required]) == 2
    assert "RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers" in capsys.readouterr().err
    # What a cluster of `ray start` that died leaves behind.
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    assert cli.main(["train", *required]) == 2
    said = capsys.readouterr().err
    assert "cluster.address=null: no Ray cluster answers at" in said and "run `ray stop`, or write" in said


def numbers(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and types of the settings that are numbers, or lists of them."""
    for name, hint in type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from numbers(hint, f"{prefix}{name}.")
        elif kinds(hint) & {int, float}:
            yield prefix + name, hint


def kinds(hint: Any) -> set[Any]:
    """The plain types in a type; a mapping's are free."""
    parts = get_args(hint)
    return set().union(*map(kinds, parts)) if parts else {hint}


@pytest.mark.parametrize("kind", [Config, EvalRun])
def test_every_number_has_a_range_and_is_finite(kind: type) -> None:
    found = dict(numbers(kind))
    assert {"rollout.top_p", "rollout.threads"} <= found.keys()
    assert [name for name, hint in found.items() if not ranges(hint)] == []
    check_bounds(kind())
    for name, hint in found.items():
        if float in kinds(hint):
            for value in (math.nan, math.inf, -math.inf):
                with pytest.raises(ConfigError, match=re.escape(f"{name}={value} is not a finite number")):
                    check_bounds(with_setting(kind(), name, value))
        if list not in kinds(hint) and not name.endswith(("temperature", "top_k")):
            with pytest.raises(ConfigError, match=re.escape(f"{name}=-1")):
                check_bounds(with_setting(kind(), name, -1))


def with_setting(config: Any, name: str, value: Any) -> Any:
    *sections, field = name.split(".")
    section = config
    for part in sections:
        section = getattr(section, part)
    setattr(section, field, value)
    return config


SAMPLED = ["signal.kind=sampled", "loss.divergence=reverse_kl"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ([*SAMPLED, "rollout.top_p=0.9"], "write rollout.top_p=1, rollout.top_k=-1 and a rollout.temperature above 0"),
        ([*SAMPLED, "rollout.top_k=20"], "write rollout.top_p=1, rollout.top_k=-1 and a rollout.temperature above 0"),
        ([*SAMPLED, "rollout.temperature=0"], "tokens that are never sampled bias it"),
        ([*SAMPLED, "rollout.temperature=0.7"], None),
        ([*SAMPLED, "rollout.temperature=0.7", "loss.discount=1"], "write rollout.temperature=1.0"),
        ([*SAMPLED, "rollout.temperature=0.7", "loss.importance_limit=2"], "write rollout.temperature=1.0"),
        ([*SAMPLED, "rollout.temperature=0.7", "loss={temperature: 0.7, discount: 1}"], None),
        (["signal.kind=ids", "rollout.top_k=20"], "signal.kind=ids needs signal.top_k=64 candidates"),
        (["signal.kind=ids", "rollout.top_p=0.95"], "signal.kind=ids needs signal.top_k=64 candidates"),
        (["signal.kind=ids", "rollout.top_k=64"], None),
        (["rollout.top_k=20", "rollout.top_p=0.95"], None),
    ],
)
def test_signals_need_what_they_are_about_sampled(
    models: Path, tmp_path: Path, settings: list[str], sentence: str | None
) -> None:
    dense = models / "dense"
    required = [f"teacher.model={dense}", f"student.model={dense}", "data.tasks=[chain_sum]", f"run.dir={tmp_path}/r"]
    config = compose([*required, *settings])
    if sentence is None:
        check(config)
    else:
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            check(config)


@pytest.mark.parametrize(("temperature", "top_p", "unbiased"), [(1.0, 1.0, True), (0.6, 1.0, True), (1.0, 0.9, False)])
def test_importance_weights_correct_a_temperature_but_no_nucleus(
    temperature: float, top_p: float, unbiased: bool
) -> None:
    """What the checks above rest on: the mean of rho (log q - log p), exact over all tokens that can be drawn."""
    draw = np.random.default_rng(0)
    logits, teacher = draw.normal(0, 2, 50), draw.normal(0, 2, 50)
    log_q = logits - np.logaddexp.reduce(logits)
    log_p = teacher - np.logaddexp.reduce(teacher)
    sampling = np.exp(logits / temperature - np.logaddexp.reduce(logits / temperature))
    order = np.argsort(-sampling)
    sampling[order[np.cumsum(sampling[order]) - sampling[order] >= top_p]] = 0
    sampling /= sampling.sum()
    there = sampling > 0
    rho = np.exp(log_q[there]) / sampling[there]
    estimate = (sampling[there] * rho * (log_q - log_p)[there]).sum()
    exact = (np.exp(log_q) * (log_q - log_p)).sum()
    assert (abs(estimate - exact) < 1e-9) == unbiased


def test_stage_0_in_bfloat16_is_refused_once_the_device_is_known(models: Path, tmp_path: Path) -> None:
    dense = models / "dense"
    required = [f"teacher.model={dense}", f"student.model={dense}", f"run.dir={tmp_path}/r", "learner.zero_stage=0"]
    config = compose(required)
    with pytest.raises(ConfigError, match=r"accumulate gradients in bfloat16: write learner\.zero_stage=1"):
        check_resources(config, "cuda", {"CPU": 8, "GPU": 8})
    check_resources(compose([*required, "learner.dtype=float32"]), "cuda", {"CPU": 8, "GPU": 8})


QWEN3_235B = {
    "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_attention_heads": 64,
    "num_key_value_heads": 4, "num_local_experts": 128, "num_hidden_layers": 94, "vocab_size": 151936,
}  # fmt: skip


def moe_config(block: list[int] | None = None, **sizes: Any) -> Qwen3MoeConfig:
    fp8: dict[str, Any] = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}} if block else {}
    return Qwen3MoeConfig(**{**QWEN3_235B, **sizes}, **fp8)


@pytest.mark.parametrize(
    ("sizes", "layout", "sentence"),
    [
        ({}, {"tensor_parallel": 8}, None),
        ({}, {"tensor_parallel": 64, "expert_parallel": True}, None),
        ({"num_key_value_heads": 6}, {"tensor_parallel": 4}, "does not divide the 6 key-value heads"),
        ({"num_key_value_heads": 6}, {"tensor_parallel": 8}, "does not divide the 6 key-value heads"),
        ({"moe_intermediate_size": 1540}, {"tensor_parallel": 8}, "does not divide the 1540 columns of an expert"),
        ({"moe_intermediate_size": 1540}, {"tensor_parallel": 8, "expert_parallel": True}, None),
        ({"mlp_only_layers": [0], "intermediate_size": 100}, {"tensor_parallel": 8}, "the 100 columns of an MLP"),
        (
            {"num_attention_heads": 48, "moe_intermediate_size": 1539, "num_key_value_heads": 3},
            {"tensor_parallel": 3},
            "the 151936 rows of the padded vocabulary",
        ),
        ({"num_local_experts": 4}, {"tensor_parallel": 8}, "is more than the 4 experts"),
    ],
)
def test_layouts_that_vllm_refuses(sizes: dict[str, Any], layout: dict[str, Any], sentence: str | None) -> None:
    if sentence is None:
        check_parallel("teacher", moe_config(**sizes), **layout)
    else:
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            check_parallel("teacher", moe_config(**sizes), **layout)


def test_quantized_experts_as_vllm_takes_them() -> None:
    """Block-quantized FP8 experts against vLLM's own functions, over widths, blocks and layouts."""
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import refine_fp8_moe_block_shape

    refused = []
    for width, block, workers in itertools.product((768, 1536, 1408, 640), ([128, 128], [64, 128]), (1, 2, 4, 8, 32)):
        if width % workers:
            continue
        share = width // workers
        sizes = SimpleNamespace(intermediate_size_per_partition=share, tp_size=workers, hidden_dim=4096)
        whole = share % block[0] == 0 and (workers == 1 or share % block[1] == 0)
        takes = whole or refine_fp8_moe_block_shape(sizes, block) is not None  # type: ignore[arg-type]
        config = moe_config(block, moe_intermediate_size=width, num_key_value_heads=64)
        try:
            check_parallel("teacher", config, tensor_parallel=workers)
        except ConfigError as error:
            assert not takes and "teacher.expert_parallel=true, or a smaller teacher.tensor_parallel" in str(error)
            refused.append((width, workers))
            check_parallel("teacher", config, tensor_parallel=workers, expert_parallel=True)
        else:
            assert takes, (width, block, workers)
    assert (768, 32) in refused and (1536, 8) not in refused
