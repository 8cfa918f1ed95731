"""Models and a Ray cluster that the runs of several files share."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from reference_step import ANSWER, COMMON, EOS, STUDENT_ROWS, TEACHER_ROWS, Models, Run, Seen, load
from tiny_models import VOCAB_SIZE, make_checkpoint
from transformers import AutoTokenizer

from s2w.config.compose import compose
from s2w.launch.train import train
from s2w.records import Scored


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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

    def run(
        name: str,
        student: Path,
        *overrides: str,
        meanwhile: Callable[[int, list[Scored]], None] = lambda number, samples: None,
    ) -> Run:
        """``meanwhile`` is called with each batch when it is scored, and its number."""
        batches: list[list[Seen]] = []

        def keep(samples: list[Scored]) -> None:
            batches.append(
                [
                    Seen(
                        sample,
                        copy.deepcopy(dict(ray.get(sample.signal.payload))) if sample.signal else {},
                        ray.get(sample.rollout.candidates) if sample.rollout.candidates else None,
                    )
                    for sample in samples
                ]
            )
            meanwhile(len(batches) - 1, samples)

        directory = models.root / "runs" / name
        sides = [f"teacher.model={models.teacher}", f"student.model={student}", f"run.dir={directory}"]
        config = compose([*COMMON, *sides, f"cluster.address={address}", *overrides])
        assert train(config, keep) == 0
        return Run(directory, load(models.teacher), batches, capsys.readouterr().out)

    return run
