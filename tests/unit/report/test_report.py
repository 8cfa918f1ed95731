"""What a report says about a run, without a browser."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from example_run import PROMPTS, SAMPLES, write_run

from s2w.cli import main
from s2w.errors import ConfigError
from s2w.eval.grading import Graded
from s2w.eval.heldout import heldout_responses, heldout_samples
from s2w.eval.statistics import wilson
from s2w.records import Mode, Prompt, Rollout, VersionSpan
from s2w.report.comparison import compare
from s2w.report.lanes import make_lanes
from s2w.report.page import sample_pairs, write_report
from s2w.report.run import read_run, series
from s2w.report.verdict import duration, headline, remarks


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of both phases."""
    directory = tmp_path_factory.mktemp("report") / "run"
    write_run(directory)
    return directory


def copy(example: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(example, tmp_path / "run"))


def test_before_and_after(example: Path) -> None:
    run = read_run(example)
    lines = {(line.metric, line.mode): line for line in compare(run)}
    forward = lines["forward_kl", None]
    assert forward.after is not None and forward.change is not None
    assert forward.before.value == pytest.approx(run.heldout[0].forward_kl, rel=1e-12)
    assert forward.after.value == pytest.approx(run.heldout[-1].forward_kl, rel=1e-12)
    assert forward.change.value == pytest.approx(forward.after.value - forward.before.value, rel=1e-12)
    assert forward.before.low < forward.before.value < forward.before.high
    accuracy = lines["accuracy", "think"]
    right = sum(one.correct is True for one in run.responses_at(0, "think"))
    assert accuracy.before == wilson(right, PROMPTS)
    verdicts = {key: line.verdict for key, line in lines.items()}
    assert (
        verdicts["forward_kl", None] == verdicts["reverse_kl", "no_think"] == verdicts["accuracy", "think"] == "better"
    )
    assert verdicts["accuracy", "no_think"] == verdicts["response_length", None] == "unclear"


def test_a_student_that_got_worse_is_called_that(example: Path, tmp_path: Path) -> None:
    directory = copy(example, tmp_path)
    for name in ("heldout.jsonl", "heldout_responses.jsonl"):
        lines = [json.loads(line) for line in (directory / name).read_text().splitlines()]
        versions = sorted({line["version"] for line in lines})
        turned = dict(zip(versions, reversed(versions), strict=True))
        lines = sorted(
            ({**line, "version": turned[line["version"]]} for line in lines), key=lambda line: line["version"]
        )
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(directory)
    said = {remark.text.split(" from ")[0]: remark.grade for remark in remarks(run, compare(run))}
    assert said["Forward KL rose"] == said["Reverse KL rose"] == said["Accuracy in think fell"] == "worse"


def test_a_mode_that_lost_is_named_although_all_together_gained(example: Path, tmp_path: Path) -> None:
    directory = copy(example, tmp_path)
    path = directory / "heldout_responses.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["mode"] == "no_think":
            line |= {"correct": line["uid"].endswith("7"), "forward_kl": 0.1 + 0.01 * line["version"]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(directory)
    said = {remark.text.split(" from ")[0]: remark.grade for remark in remarks(run, compare(run))}
    assert said["Forward KL fell"] == "better" and said["Forward KL in no_think rose"] == "worse"
    # No prompt's outcome changed: there is no spread to make an interval of.
    assert said["Accuracy in no_think stayed at 0.094."] == "unclear"
    [accuracy] = [line for line in compare(run) if (line.metric, line.mode) == ("accuracy", "no_think")]
    assert accuracy.change is not None and accuracy.change.value == 0 and math.isnan(accuracy.change.low)


def test_without_single_responses_there_are_no_intervals(example: Path, tmp_path: Path) -> None:
    directory = copy(example, tmp_path)
    (directory / "heldout_responses.jsonl").unlink()
    for line in compare(read_run(directory)):
        assert math.isnan(line.before.low) and line.verdict == "unclear"
        assert line.mode is None or line.metric not in ("forward_kl", "reverse_kl")
    assert write_report(directory, None).exists()


def test_verdict_and_headline(example: Path) -> None:
    run = read_run(example)
    comparisons = compare(run)
    grades = [remark.grade for remark in remarks(run, comparisons)]
    assert grades == ["better", "better", "better", "unclear"]
    figures = {figure.name: figure.value for figure in headline(run, comparisons)}
    assert figures["wall time"] == "3 min 20 s"
    assert figures["largest probe error"] == f"{series(run.steps, 'probe_error').max():.1e} nats"
    assert figures["tokens/s, score"] == "540"
    assert [duration(value) for value in (8.24, 59.9, 61, 3_725)] == ["8.2 s", "59.9 s", "1 min 01 s", "1 h 02 min"]


def test_lanes(example: Path) -> None:
    lanes = make_lanes(read_run(example))
    assert lanes is not None
    assert [lane.name for lane in lanes.lanes] == [
        "rollout engine 0",
        "rollout engine 1",
        "teacher 0",
        "learner",
        "swap",
    ]
    assert lanes.windows[0] == (1010.0, 1019.0) and lanes.step_seconds == 12 * 9.0
    busy = [lanes.busy(lane) for lane in lanes.lanes]
    for seconds, expected in zip(busy, (4.0, 5.0, 4.0, 2.5, 0.5), strict=True):
        np.testing.assert_allclose(seconds, np.full(12, expected))
    assert lanes.last_stretch(4) == (1090.0, 1129.0)


def test_work_that_crosses_steps_counts_where_it_was_done(example: Path, tmp_path: Path) -> None:
    """Generation ahead of time; and a run that was resumed hours later."""
    directory = copy(example, tmp_path)
    with (directory / "timeline.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "generate", "actor": 2, "step": 3, "start": 1016.0, "stop": 1024.0}) + "\n")
    lines = [json.loads(line) for line in (directory / "timeline.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] > 11:
            line |= {"start": line["start"] + 1e4, "stop": line["stop"] + 1e4}
    (directory / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lanes = make_lanes(read_run(directory))
    assert lanes is not None
    [ahead] = [lane for lane in lanes.lanes if lane.name == "rollout engine 2"]
    np.testing.assert_allclose(lanes.busy(ahead), [3.0, 4.0] + [0.0] * 10)
    assert lanes.last_stretch(4) == (11120.0, 11129.0)


def test_samples_stand_in_pairs(example: Path) -> None:
    pairs = sample_pairs(read_run(example))
    assert {mode: len(own) for mode, own in pairs.items()} == {"think": SAMPLES, "no_think": SAMPLES}
    for own in pairs.values():
        for pair in own:
            assert pair.after is not None
            assert (pair.before.version, pair.after.version) == (0, 12)
            assert (pair.before.uid, pair.before.mode) == (pair.after.uid, pair.after.mode)


def test_an_interrupted_run_gets_a_report(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    write_run(directory, finished=False)
    # It died while it wrote.
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "los')
    run = read_run(directory)
    assert not run.finished and len(run.steps) == 12
    assert "12 of 12" in remarks(run, compare(run))[0].text
    assert "not finished" in write_report(directory, tmp_path / "elsewhere").read_text()
    assert not (directory / "report").exists()


def test_a_run_that_has_just_begun_gets_a_report(example: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    shutil.copy(example / "config.yaml", directory)
    (directory / "metrics.jsonl").touch()
    page = write_report(directory, None).read_text()
    assert "0 of 12 on-policy steps" in page and "<img" not in page


def test_bad_input(example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run directory: it has no config.yaml" in capsys.readouterr().err
    for arguments in ([], ["a", "b"], ["a", "--out"], ["a", "--output"]):
        assert main(["report", *arguments]) == 2
        assert "s2w: " in capsys.readouterr().err
    directory = copy(example, tmp_path)
    spoilt: list[tuple[str, str, str]] = [
        ("heldout.jsonl", '{"version": 0, "kl": 1}\n', "'.*heldout.jsonl', line 1, was written by another version"),
        ("metrics.jsonl", "[]\n", "line 1, is not what s2w writes there"),
        ("config.yaml", "a: [", "is not YAML"),
        ("config.yaml", "a: 1", "is not the configuration of a run"),
    ]
    for name, content, message in spoilt:
        (directory / name).write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_run(directory)
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(example, taken)


def test_what_an_evaluation_keeps() -> None:
    """Every response in figures, the first of each mode in full."""
    rollouts, graded = [], []
    modes: tuple[Mode, ...] = ("think", "no_think")
    for i in range(24):
        mode = modes[i % 2]
        messages = ({"role": "user", "content": "first"}, {"role": "user", "content": f"question {i}"})
        prompt = Prompt(f"a/{i}", messages, np.zeros(2, np.int32), mode, 0)
        ids, log_probs = np.arange(5, dtype=np.int32), np.zeros(5, np.float32)
        spans = (VersionSpan(0, 5, 7),)
        rollouts.append(Rollout(prompt, 0, ids, log_probs, spans, "stop", 0, 0.0, 1.0, forced=((1, 2),)))
        graded.append(Graded(prompt.uid, "", mode, None, True, False, False, 5))
    sums = np.arange(48.0).reshape(24, 2)
    responses = heldout_responses(7, rollouts, graded, sums)
    assert [(one.tokens, one.forward_kl, one.reverse_kl) for one in responses[:2]] == [(4, 0.0, 0.25), (4, 0.5, 0.75)]
    samples = heldout_samples(7, rollouts, graded, lambda rollout: rollout.uid)
    assert [one.uid for one in samples] == [f"a/{i}" for i in range(16)]
    assert (samples[3].prompt, samples[3].response, samples[3].mode) == ("question 3", "a/3#0", "no_think")
