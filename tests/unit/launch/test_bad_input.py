"""Bad input ends with one sentence and exit code 2, before a model loads or Ray starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import make_checkpoint

from s2w import cli

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
    ("rollout.top_p=1.5", "rollout.top_p=1.5: must be > 0 and <= 1"),
    ("rollout.top_p=0", "rollout.top_p=0.0: must be > 0 and <= 1"),
    ("rollout.top_k=0", "rollout.top_k=0: must be >= 1, or -1"),
    ("off_policy.top_p=0", "off_policy.top_p=0.0: must be > 0 and <= 1"),
    ("rollout.temperature=0.001", "rollout.temperature=0.001: must be between 0.01 and 2, or 0"),
    ("learner.learning_rate=nan", "learner.learning_rate=nan is not a finite number: must be > 0"),
    ("loss.temperature=inf", "loss.temperature=inf is not a finite number"),
    ("student.overrides={initializer_range: nan}", "is not a finite number"),
    ("run.seed=-1", "run.seed=-1: must be >= 0 and < 4294967296"),
    ("data.train_prompts=-5", "data.train_prompts=-5: must be >= 1"),
    ("learner.attention=quick", "learner.attention=quick: must be one of sdpa, eager, flash_attention_2"),
    ("teacher.max_batched_tokens=32", "teacher.max_batched_tokens=32 is less than teacher.max_sequences=64"),
    ("teachers.math={model: m, gpu_memory_utilization: 2}", "teachers.math.gpu_memory_utilization=2.0: must be > 0"),
    ("teachers.math={model: m, max_model_len: x}", "teachers.math.max_model_len: Value 'x'"),
    (
        "teacher.max_model_len=64",
        "is less than data.max_prompt_tokens + rollout.max_tokens = 2048, which it has to score",
    ),
    ("teacher.max_model_len=5000", "teacher.max_model_len=5000 is more than the model's context of 4096 tokens"),
    ("teacher.expert_parallel=true", "teacher.expert_parallel=true, but the model has no experts"),
    ("teacher.pipeline_parallel=3", "teacher.pipeline_parallel=3 is more than the 2 layers"),
    ("rollout.tensor_parallel=3", "rollout.tensor_parallel=3 does not divide the 4 attention heads"),
    ("student={init: pruned, keep_layers: 3}", "student.keep_layers must be between 2 and the model's 2 layers, not 3"),
    ("teacher.model=MODELS/cut", "cut/model.safetensors' is cut off or no safetensors file"),
    ("student.model=MODELS/cut", "cut/model.safetensors' is cut off or no safetensors file"),
    ("teachers.math={model: MODELS/cut}", "cut/model.safetensors' is cut off or no safetensors file"),
    ("teacher.model=MODELS/bare", "has no weights: the directory contains no .safetensors file"),
    ("teacher.model=MODELS/missing", "names 'model-00002-of-00002.safetensors', but there is no such file"),
    ("student.model=MODELS/mixed", "names 'model.safetensors', but the tensor 'another.weight' is not in it"),
    ("data={tasks: [], path: FILES/binary.jsonl}", "binary.jsonl' is not UTF-8 text: invalid start byte, 0xff"),
    ("data={tasks: [], path: FILES/binary.parquet}", "binary.parquet' is not a complete Parquet file"),
    ("data={tasks: [], path: FILES/empty.jsonl, heldout_prompts: 1}", "empty.jsonl', line 2: the prompt is empty"),
    ("off_policy={steps: 1, path: FILES/binary.jsonl}", "binary.jsonl' is not UTF-8 text"),
    ("off_policy={steps: 1, path: FILES/binary.parquet}", "binary.parquet' is not a complete Parquet file"),
    ("off_policy={steps: 1, path: FILES/file}", "file' must end in .jsonl, .parquet or .csv"),
    ("run.dir=FILES/file/run", "file is a file, not a directory: choose another one"),
    ("run.dir=FILES/file", "file is a file, not a directory: choose another one"),
    ("cluster.address=127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 (Connection refused): check that"),
    ("cluster.address=ray://127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1 (Connection refused): check that"),
    ("cluster.address=127.0.0.1", "cluster.address=127.0.0.1: write HOST:PORT, ray://HOST:PORT or auto"),
]
EVAL = [
    ("rollout.top_p=0", "rollout.top_p=0.0: must be > 0 and <= 1"),
    ("eval.k=[4,0]", "eval.k=[4, 0]: must be >= 1"),
    ("eval.k=[]", "eval.k=[]: give at least one k"),
    ("eval.thinking_budgets=[null,0]", "eval.thinking_budgets=[None, 0]: must be >= 1, or null"),
    ("eval.seed=-1", "eval.seed=-1: must be >= 0"),
    ("eval.verifier=guess", "eval.verifier: There is no verifier and no reasoning-gym task 'guess'"),
    ("rollout.max_batched_tokens=8", "rollout.max_batched_tokens=8 is less than rollout.max_sequences=64"),
    ("model=MODELS/cut", "cut/model.safetensors' is cut off or no safetensors file"),
    ("rollout.tensor_parallel=3", "rollout.tensor_parallel=3 does not divide the 4 attention heads"),
    ("eval={tasks: [], path: FILES/latin.csv}", "latin.csv' is not UTF-8 text"),
    ("eval={tasks: [], path: FILES/none.csv}", "none.csv' contains no prompts"),
    ("eval={tasks: [], path: FILES/empty.jsonl}", "empty.jsonl', line 2: the prompt is empty"),
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
