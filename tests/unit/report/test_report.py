"""What a report says about a run, without a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_run import PROMPTS, SAMPLES, write_run

from s2w.cli import main
from s2w.errors import ConfigError
from s2w.eval.grading import Graded
from s2w.eval.heldout import heldout_responses, heldout_samples, is_repetitive, make_heldout
from s2w.eval.statistics import wilson
from s2w.records import HeldoutResponse, Mode, Prompt, Rollout, VersionSpan
from s2w.report.comparison import compare, compare_by, gap
from s2w.report.lanes import make_lanes
from s2w.report.page import render, sample_triples, write_report
from s2w.report.run import Run, read_run, series
from s2w.report.several import differing_settings, make_rows, side_by_side, write_comparison
from s2w.report.verdict import Verdict, duration, headline, judge, remarks


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
    lines = {(line.metric, line.name): line for line in compare(run)}
    forward = lines["forward_kl", ""]
    assert forward.teacher is None and forward.prompts == 2 * PROMPTS
    assert forward.after is not None and forward.change is not None
    assert forward.before.value == pytest.approx(run.heldout[0].forward_kl, rel=1e-12)
    assert forward.after.value == pytest.approx(run.heldout[-1].forward_kl, rel=1e-12)
    assert forward.change.value == pytest.approx(forward.after.value - forward.before.value, rel=1e-12)
    assert forward.before.low < forward.before.value < forward.before.high
    accuracy = lines["accuracy", "think"]
    right = sum(one.correct is True for one in run.responses_at(0, "think"))
    assert accuracy.before == wilson(right, PROMPTS)
    assert accuracy.teacher == wilson(PROMPTS, PROMPTS) and accuracy.prompts == PROMPTS
    verdicts = {key: line.verdict for key, line in lines.items()}
    assert verdicts["forward_kl", ""] == verdicts["reverse_kl", "no_think"] == "better"
    assert verdicts["accuracy", "think"] == verdicts["accuracy", ""] == "better"
    assert verdicts["accuracy", "no_think"] == verdicts["response_length", ""] == "unclear"


def test_how_much_of_the_gap_was_closed(example: Path) -> None:
    run = read_run(example)
    known = gap(run, "think")
    assert known is not None and known.closed is not None and known.prompts == PROMPTS
    before, after = (np.mean([one.correct is True for one in run.responses_at(v, "think")]) for v in (0, 12))
    assert known.size.value == pytest.approx(1 - before)
    assert known.closed.value == pytest.approx((after - before) / (1 - before))
    assert 0.3 < known.closed.low < known.closed.value < known.closed.high < 1
    # In no_think the teacher is no better than the student was: there is nothing to close.
    nothing = gap(run, "no_think")
    assert nothing is not None and nothing.closed is None and nothing.size.low < 0 < nothing.size.high


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
    verdict = judge(run, compare(run))
    assert verdict.answer == "no" and verdict.text.startswith("Accuracy fell from ")


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


def test_without_single_responses_there_are_no_intervals(example: Path, tmp_path: Path) -> None:
    directory = copy(example, tmp_path)
    (directory / "heldout_responses.jsonl").unlink()
    for line in compare(read_run(directory)):
        assert math.isnan(line.before.low) and line.verdict == "unclear"
    assert judge(read_run(directory), compare(read_run(directory))).answer == "unclear"
    assert write_report(directory, None).exists()


def test_verdict_and_headline(example: Path) -> None:
    run = read_run(example)
    comparisons = compare(run)
    verdict = judge(run, comparisons)
    assert verdict.answer == "yes"
    assert verdict.text.startswith("Accuracy rose from ") and "% to " in verdict.text
    grades = [remark.grade for remark in remarks(run, comparisons)]
    assert grades == ["better", "better", "better", "unclear", "better"]
    figures = {figure.name: figure.value for figure in headline(run)}
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


def test_samples_stand_side_by_side(example: Path) -> None:
    triples = sample_triples(read_run(example))
    assert {mode: len(own) for mode, own in triples.items()} == {"think": SAMPLES, "no_think": SAMPLES}
    for own in triples.values():
        for one in own:
            assert one.after is not None and one.teacher is not None
            assert (one.before.version, one.after.version, one.teacher.version) == (0, 12, None)
            assert len({(side.uid, side.mode) for side in (one.before, one.after, one.teacher)}) == 1


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
    for arguments in ([], ["a", "--out"], ["a", "--output"], ["a", "b"], [str(example), str(example)]):
        assert main(["report", *arguments]) == 2
        assert "s2w: " in capsys.readouterr().err
    assert main(["signals", "a", "b"]) == 2
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
        graded.append(
            Graded(prompt.uid, "sum" if i < 16 else "", mode, i < 4 if i < 16 else None, True, False, False, 5)
        )
    sums = np.arange(48.0).reshape(24, 2)
    teachers = ["a" if mode == "think" else "b" for mode in (one.mode for one in graded)]
    responses = heldout_responses(7, rollouts, graded, teachers, sums)
    assert [(one.tokens, one.forward_kl, one.reverse_kl) for one in responses[:2]] == [(4, 0.0, 0.25), (4, 0.5, 0.75)]
    result = make_heldout(responses)
    assert (result.version, result.tokens, result.response_length) == (7, 4 * 24, 5.0)
    assert [result.forward_kl, result.reverse_kl] == pytest.approx(sums.sum(0) / (4 * 24))
    assert result.by_mode == {"think": result.by_teacher["a"], "no_think": result.by_teacher["b"]}
    assert result.by_mode["think"] | {"prompts": 12, "verified": 8, "accuracy": 0.25} == result.by_mode["think"]
    assert result.by_mode["think"]["forward_kl"] == pytest.approx(sums[::2, 0].sum() / (4 * 12))
    assert {name: one["prompts"] for name, one in result.by_task.items()} == {"": 8, "sum": 16}
    assert "accuracy" not in result.by_task[""]
    assert make_heldout(responses[:1]).by_task == make_heldout(responses[:1]).by_teacher == {}
    samples = heldout_samples(7, rollouts, graded, lambda rollout: rollout.uid)
    assert [one.uid for one in samples] == [f"a/{i}" for i in range(16)]
    assert (samples[3].prompt, samples[3].response, samples[3].mode) == ("question 3", "a/3#0", "no_think")


def test_repetition() -> None:
    draw = np.random.default_rng(0)
    assert is_repetitive(np.tile(np.arange(4), 8)) and is_repetitive(np.r_[draw.integers(0, 99, 20), np.full(20, 7)])
    assert not is_repetitive(draw.integers(0, 9, 500)) and not is_repetitive(np.full(8, 7))
    # Of a long response a loop of 64 tokens is enough; of a short one it takes half.
    assert is_repetitive(np.r_[np.arange(900), np.full(64, 7)])
    assert not is_repetitive(np.r_[np.arange(60), np.full(20, 7)])


def changed(example: Path, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Run:
    """The example with other held-out responses; those of which ``change`` makes nothing are left out."""
    directory = copy(example, tmp_path)
    for place in (directory, directory / "teacher_heldout"):
        path = place / "heldout_responses.jsonl"
        lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
        records = [HeldoutResponse(**line) for line in lines if line is not None]
        path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in records))
        versions = dict.fromkeys(one.version for one in records)
        results = [make_heldout([one for one in records if one.version == version]) for version in versions]
        (place / "heldout.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in results))
    return read_run(directory)


def verdict_of(run: Run) -> Verdict:
    return judge(run, compare(run))


def test_garbage_is_no_good_run_whatever_kl_says(example: Path, tmp_path: Path) -> None:
    def garbage(line: dict[str, Any]) -> dict[str, Any]:
        return {**line, "correct": False, "repetitive": line["version"] == 12}

    verdict = verdict_of(changed(example, tmp_path, garbage))
    assert verdict.answer == "no"
    assert re.match(
        r"Forward KL fell .* \(-75%\), but 100% of .* repeat themselves \(\d% of the teacher's", verdict.text
    )


def test_what_the_teacher_does_too_is_not_garbage(example: Path, tmp_path: Path) -> None:
    verdict = verdict_of(changed(example, tmp_path, lambda line: {**line, "truncated": True}))
    assert verdict.answer == "partly" and "rollout.max_tokens=64, too short for this teacher" in verdict.text


def test_four_prompts_cannot_tell(example: Path, tmp_path: Path) -> None:
    def few(line: dict[str, Any]) -> dict[str, Any] | None:
        kept = line["uid"].endswith(("/1", "/2", "/3", "/4")) and line["mode"] == "think"
        return {**line, "correct": line["version"] != 0 and not line["uid"].endswith("/2")} if kept else None

    verdict = verdict_of(changed(example, tmp_path, few))
    assert verdict.answer == "unclear" and "4 verified held-out prompts cannot tell" in verdict.text


def test_without_a_verifier_nothing_is_known_of_the_answers(example: Path, tmp_path: Path) -> None:
    verdict = verdict_of(changed(example, tmp_path, lambda line: {**line, "correct": None}))
    assert verdict.answer == "unclear" and verdict.text.endswith(
        "but no held-out prompt has a verifier, so nothing is known about its answers."
    )


def test_a_narrow_interval_around_no_change_is_told_as_such(example: Path, tmp_path: Path) -> None:
    verdict = verdict_of(changed(example, tmp_path, lambda line: {**line, "correct": False}))
    assert (
        verdict.answer == "partly" and "accuracy stayed where it was: its change is from -0.03 to +0.03" in verdict.text
    )


def test_modes_that_are_not_kept_to_spoil_a_good_run(example: Path, tmp_path: Path) -> None:
    verdict = verdict_of(changed(example, tmp_path, lambda line: {**line, "adherent": line["mode"] == "think"}))
    assert verdict.answer == "partly" and "only 0% of the no_think responses keep to their mode" in verdict.text


def test_teachers_and_tasks_apart(example: Path, tmp_path: Path) -> None:
    def apart(line: dict[str, Any]) -> dict[str, Any]:
        line |= {"teacher": "solver" if line["mode"] == "think" else "teacher"}
        return line | ({"task": "", "correct": None} if line["uid"].endswith("7") else {})

    run = changed(example, tmp_path, apart)
    assert run.heldout[0].by_teacher["solver"] == run.heldout[0].by_mode["think"]
    by_teacher = {(line.name, line.metric): line for line in compare_by(run, "teacher")}
    by_mode = {(line.name, line.metric): line for line in compare(run) if line.kind == "mode"}
    assert by_teacher["solver", "forward_kl"].change == by_mode["think", "forward_kl"].change
    assert by_teacher["solver", "accuracy"].teacher == by_mode["think", "accuracy"].teacher
    by_task = {(line.name, line.metric): line for line in compare_by(run, "task")}
    assert by_task["", "forward_kl"].prompts == 12 and ("", "accuracy") not in by_task
    page = render(run, [], None)
    assert "By teacher" in page and "By task" in page and "<td>no verifier</td>" in page


def test_several_runs_on_one_page(example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "other"
    write_run(directory, steps=8, seed=1)
    assert main(["report", str(example), str(directory), "--output", str(tmp_path / "both")]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == tmp_path / "both" / "index.html" and (page.parent / "runs.png").stat().st_size > 0
    runs = [read_run(one) for one in (example, directory)]
    assert differing_settings(runs) == {"loop.steps": ["12", "8"]}
    first, second = make_rows(runs)
    assert [row.label for row in (first, second)] == ["run", "other"]
    assert (second.cost.wall_seconds, second.cost.off_policy_steps, second.cost.steps) == (200.0, 6, 8)
    assert (second.cost.rollouts, second.cost.tokens) == (8 * 16, 6 * 400 + 8 * 640)
    # Paired over the prompts: the change of the one run's last version to the other's.
    shares = [run.heldout[-1].by_mode[mode]["accuracy"] for run in runs for mode in ("think", "no_think")]
    assert second.against["accuracy"].value == pytest.approx(sum(shares[2:]) / 2 - sum(shares[:2]) / 2)
    assert not first.against
    samples = side_by_side(runs)
    assert {mode: len(own) for mode, own in samples.items()} == {"think": SAMPLES, "no_think": SAMPLES}
    assert [one.version for one in samples["think"][0]] == [12, 8, None]


def test_prompts_of_another_seed_are_not_compared(example: Path, tmp_path: Path) -> None:
    """They have the same uids."""
    directory = copy(example, tmp_path)
    for path in (directory / "samples.jsonl", directory / "teacher_heldout" / "samples.jsonl"):
        path.write_text(path.read_text().replace("What is", "How much is"))
    runs = [read_run(one) for one in (example, directory)]
    assert not make_rows(runs)[1].against and not side_by_side(runs)


def test_a_run_of_an_earlier_version_gets_a_report(example: Path, tmp_path: Path) -> None:
    """As 0.2 left it: no teacher's responses, segments or events, fewer figures a response."""
    directory = copy(example, tmp_path)
    assert "<td>rollout engine 1</td>" in render(read_run(directory), [], None)
    (directory / "events.jsonl").unlink()
    shutil.rmtree(directory / "teacher_heldout")
    (directory / "segments.json").unlink()
    later = {
        "heldout_responses.jsonl": ("repetitive", "length", "teacher", "task"),
        "heldout.jsonl": ("by_teacher", "by_task"),
    }
    for name, new in later.items():
        lines = [json.loads(line) for line in (directory / name).read_text().splitlines()]
        lines = [{key: value for key, value in line.items() if key not in new} for line in lines]
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(directory)
    assert judge(run, compare(run)).answer == "yes" and run.wall_seconds == 200.0
    known = {line.metric: line for line in compare(run) if line.kind is None}
    assert "repetitive" not in known and math.isnan(known["response_length"].before.low)
    assert "own held-out responses were not measured" in render(run, [], None)
    assert write_comparison([example, directory], tmp_path / "both").exists()
