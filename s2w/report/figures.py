"""The figures of a report, as PNG. Colours are Okabe and Ito's, which colour-blind people can tell apart."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from s2w.observe.timeline import STAGES, Stage
from s2w.records import Mode
from s2w.report.comparison import KL, SHARES, Metric, estimate, estimate_at
from s2w.report.lanes import Lanes
from s2w.report.run import Run, series

BLUE, ORANGE, GREEN, PURPLE, VERMILION, BLACK = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#222222"
MODE_COLOURS: dict[Mode, str] = {"think": BLUE, "no_think": VERMILION}
RUN_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, BLACK)
STAGE_COLOURS: dict[Stage, str] = dict(zip(STAGES, (BLUE, ORANGE, GREEN, PURPLE), strict=True))
IDLE = "#f0f0f0"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
}
WIDTH = 10.5
"""Inches."""
DPI = 110
SMOOTHED = 60
"""From this many steps on, a line is also drawn as a running median."""
LOGARITHMIC = 20
"""Ratio of largest to smallest gradient norm above which their axis is logarithmic."""
STRETCH = 4
"""Steps whose lanes are shown in detail."""
ACTORS = 16
"""Actors of a stage that get a lane in the figures; the table has them all."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure."""

    name: str
    """Name of its file, without ``.png``."""
    title: str
    caption: str
    png: bytes
    hover: dict[str, Any] | None = None
    """What is where on a figure of lanes, see :func:`lanes_picture`."""


def draw(run: Run, lanes: Lanes | None) -> list[Picture]:
    """All figures for which the run has data."""
    with rc_context(STYLE):
        pictures = [
            kl_picture(run),
            quality_picture(run),
            lanes_picture(lanes) if lanes else None,
            speed_picture(run),
            off_policy_picture(run),
            training_picture(run),
            further_picture(run),
        ]
    return [picture for picture in pictures if picture is not None]


def kl_picture(run: Run) -> Picture | None:
    """Held-out KL over policy versions, all together and by mode; None without a held-out evaluation."""
    known = [metric for metric in KL if any(np.isfinite(getattr(one, metric)) for one in run.heldout)]
    if not known:
        return None
    titles = {"forward_kl": "forward, KL(teacher‖student)", "reverse_kl": "reverse, KL(student‖teacher)"}
    figure, axes = _panels(1, len(known), 3.3)
    versions = _versions(run)
    for axis, metric in zip(axes, known, strict=True):
        modes: list[Mode | None] = [None, *(run.modes if len(run.modes) > 1 else [])]
        for mode in modes:
            points = [estimate(run.responses_at(version, mode), metric) for version in versions]
            values = [point.value if point else np.nan for point in points]
            if mode is None:
                values = [getattr(one, metric) for one in run.heldout]
            colour, label = (MODE_COLOURS[mode], mode) if mode else (BLACK, "all")
            axis.plot(versions, values, "o-", color=colour, label=label, markersize=4)
            low, high = ([getattr(point, end) if point else np.nan for point in points] for end in ("low", "high"))
            axis.fill_between(versions, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=titles[metric], ylabel="nats/token", xlabel="policy version (updates)")
        axis.set_ylim(bottom=0)
        _legend(axis)
    caption = "Fresh responses of the student to held-out prompts, averaged over sampled tokens."
    if run.responses:
        caption += " Bands are 95 % bootstrap intervals over responses."
    return _picture("kl", "Held-out KL", caption, figure)


def quality_picture(run: Run) -> Picture | None:
    """Accuracy, mode adherence and truncation by mode over policy versions; None if no mode was ever graded."""
    graded = run.heldout_by_mode
    labels: dict[Metric, str] = {
        "accuracy": "accuracy (pass@1)",
        "mode_adherence": "mode adherence",
        "truncated": "cut off at the token limit",
        "repetitive": "repetitive",
    }
    known = [
        metric for metric in SHARES if any(metric in scores for line in graded for scores in line["by_mode"].values())
    ]
    if not known:
        return None
    figure, axes = _panels(1, len(known), 3.1)
    versions = series(graded, "version")
    for axis, metric in zip(axes, known, strict=True):
        for mode in run.modes:
            own = [one for one in run.teacher_responses if one.mode == mode]
            if (ceiling := estimate(own, metric)) is not None:
                axis.axhline(ceiling.value, color=MODE_COLOURS[mode], linestyle=":", linewidth=1.2)
            training = series(run.steps, "by_mode", mode, metric)
            if np.isfinite(training).any():
                axis.plot(series(run.steps, "step"), training, color=MODE_COLOURS[mode], alpha=0.3, linewidth=1)
            values = series(graded, "by_mode", mode, metric)
            if not np.isfinite(values).any():
                continue
            points = [estimate(run.responses_at(int(version), mode), metric) for version in versions]
            reach = np.array([(p.value - p.low, p.high - p.value) if p else (np.nan, np.nan) for p in points]).T
            colour = MODE_COLOURS[mode]
            axis.errorbar(
                versions, values, np.maximum(reach, 0), fmt="o-", color=colour, label=mode, markersize=4, capsize=3
            )
        axis.set(title=labels[metric], ylabel="share of responses", xlabel="policy version (updates)")
        axis.set_ylim(-0.03, 1.03)
        _legend(axis)
    caption = "Held-out prompts; faint lines are the training batches."
    if run.teacher_responses:
        caption += " Dotted: the teacher's own responses."
    if run.responses:
        caption += " Bars are 95 % Wilson intervals over prompts."
    return _picture("quality", "Accuracy and mode adherence", caption, figure)


def runs_picture(runs: Sequence[Run], labels: Sequence[str]) -> Picture | None:
    """Held-out KL and accuracy of several runs over their versions, in one figure; None if none was evaluated."""
    metrics: dict[Metric, str] = {
        "accuracy": "accuracy (pass@1), all modes",
        "forward_kl": "forward KL, nats/token",
        "reverse_kl": "reverse KL, nats/token",
    }
    points = {metric: [[estimate_at(run, one, metric) for one in run.heldout] for run in runs] for metric in metrics}
    known = [metric for metric in metrics if any(one is not None for own in points[metric] for one in own)]
    if not known:
        return None
    with rc_context(STYLE):
        figure, axes = _panels(1, len(known), 3.6)
        for axis, metric in zip(axes, known, strict=True):
            for run, label, own, colour in zip(runs, labels, points[metric], cycle(RUN_COLOURS), strict=False):
                versions = _versions(run)
                values, low, high = (
                    [getattr(one, name) if one else np.nan for one in own] for name in ("value", "low", "high")
                )
                axis.plot(versions, values, "o-", color=colour, label=label, markersize=4)
                axis.fill_between(versions, low, high, color=colour, alpha=0.12, linewidth=0)
                if metric == "accuracy" and (ceiling := estimate(run.teacher_responses, metric)) is not None:
                    axis.axhline(ceiling.value, color=colour, linestyle=":", linewidth=1.2)
            axis.set(title=metrics[metric], xlabel="policy version (updates)")
            axis.set_ylim(bottom=-0.03 if metric == "accuracy" else 0)
        axes[0].legend()
        caption = "Held-out prompts of each run, with 95 % intervals."
        if any(run.teacher_responses for run in runs):
            caption += " Dotted: the accuracy of the run's teacher."
        return _picture("runs", "Held-out evaluations of all runs", caption, figure)


def training_picture(run: Run) -> Picture | None:
    """Metrics of each on-policy update; None without one."""
    if not run.steps:
        return None
    figure, axes = _panels(2, 3, 5.4)
    _trace_by_mode(axes[0], run, "divergence")
    axes[0].set(title=f"divergence ({run.config['loss']['divergence']})", ylabel="nats/token")
    _trace_by_mode(axes[1], run, "student_entropy")
    _trace_by_mode(axes[1], run, "teacher_entropy", linestyle="--")
    axes[1].set(title="entropy: student —, teacher - -", ylabel="nats/token")
    steps = series(run.steps, "step")
    _trace(axes[2], steps, series(run.steps, "agreement"), BLACK, "")
    axes[2].set(title="same most likely token", ylabel="share of tokens")
    _trace_by_mode(axes[3], run, "response_length")
    axes[3].set(title="response length", ylabel="tokens")
    axes[3].set_ylim(bottom=0)
    norms = series(run.steps, "grad_norm")
    _trace(axes[4], steps, norms, BLACK, "")
    spread = norms.max() > LOGARITHMIC * norms.min() > 0
    axes[4].set(title="gradient norm, before clipping", yscale="log" if spread else "linear")
    _trace(axes[5], steps, series(run.steps, "learning_rate"), BLACK, "")
    axes[5].set(title="learning rate")
    axes[5].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axis in axes:
        axis.set_xlabel("step")
        _legend(axis)
    return _picture("on_policy", "On-policy phase", "Means over the response tokens of each step's batch.", figure)


SHOWN = frozenset(
    [
        "loss",
        "divergence",
        "student_entropy",
        "teacher_entropy",
        "agreement",
        "grad_norm",
        "learning_rate",
        "response_length",
        "truncated",
        "accuracy",
        "mode_adherence",
        "tokens_per_second",
        "seconds",
        "swap_ms",
        "probe_error",
        "busy",
        "signal_bias",
    ]
)
"""Metrics that other figures show."""


def further_picture(run: Run) -> Picture | None:
    """Every other metric of the on-policy steps that is a number and moves; None if there is none."""
    found = [
        metric
        for metric in run.metrics.values()
        if metric.name not in SHOWN and any(isinstance(line.get(metric.name), int | float) for line in run.steps)
    ]
    moving = [metric for metric in found if np.ptp(np.nan_to_num(series(run.steps, metric.name))) > 0]
    if not moving:
        return None
    rows = -(-len(moving) // 4)
    figure, axes = _panels(rows, 4, 2.6 * rows)
    for axis, metric in zip(axes, moving, strict=False):
        if metric.over == "tokens":
            _trace_by_mode(axis, run, metric.name)
        else:
            _trace(axis, series(run.steps, "step"), series(run.steps, metric.name), BLACK, "")
        axis.set(title=metric.name.replace("_", " "), ylabel="" if metric.unit == "1" else metric.unit, xlabel="step")
        _legend(axis)
    for axis in axes[len(moving) :]:
        axis.set_axis_off()
    caption = " ".join(f"{metric.name.replace('_', ' ')}: {metric.text}" for metric in moving)
    return _picture("further", "Further metrics", caption, figure)


def off_policy_picture(run: Run) -> Picture | None:
    """The off-policy phase; None if the run has none."""
    if not run.off_policy_steps:
        return None
    figure, axes = _panels(1, 3, 3.0)
    steps = series(run.off_policy_steps, "step")
    _trace(axes[0], steps, series(run.off_policy_steps, "divergence"), BLUE, "training")
    if run.off_policy_heldout:
        heldout = run.off_policy_heldout
        axes[0].plot(
            [one.step for one in heldout], [one.loss for one in heldout], "o-", color=VERMILION, label="held-out"
        )
    axes[0].set(title=f"loss ({run.config['off_policy']['loss']})", ylabel="nats/token")
    _legend(axes[0])
    _trace(axes[1], steps, series(run.off_policy_steps, "agreement"), BLUE, "")
    axes[1].set(title="most likely token is right", ylabel="share of tokens")
    _trace(axes[2], steps, series(run.off_policy_steps, "student_entropy"), BLUE, "")
    axes[2].set(title="entropy of the student", ylabel="nats/token")
    for axis in axes:
        axis.set_xlabel("off-policy step")
    caption = "The student is trained on the teacher's responses; never on the held-out ones."
    return _picture("off_policy", "Off-policy phase", caption, figure)


def speed_picture(run: Run) -> Picture | None:
    """Throughput, step time, swap and probe over the on-policy steps; None without one."""
    if not run.steps:
        return None
    figure, axes = _panels(1, 4, 2.9)
    steps = series(run.steps, "step")
    stages: tuple[Stage, ...] = ("generate", "score", "learn")
    for stage in stages:
        _trace(axes[0], steps, series(run.steps, "tokens_per_second", stage), STAGE_COLOURS[stage], stage)
    axes[0].set(title="throughput at work", ylabel="tokens/s")
    _trace(axes[1], steps, series(run.steps, "seconds"), BLACK, "")
    axes[1].set(title="step", ylabel="seconds")
    _trace(axes[2], steps, series(run.steps, "swap_ms"), STAGE_COLOURS["swap"], "")
    axes[2].set(title="engines paused by a swap", ylabel="ms")
    _trace(axes[3], steps, series(run.steps, "probe_error"), BLACK, "")
    axes[3].set(title="probe error", ylabel="nats")
    axes[3].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axis in axes:
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
    _legend(axes[0])
    caption = (
        "Tokens per second of a stage's busy time. The probe error is the mean difference between the "
        "log-probs of engines and learner after the swap."
    )
    return _picture("speed", "Speed", caption, figure)


def lanes_picture(lanes: Lanes) -> Picture:
    """A lane for each actor: its busy share in every step, and its work in the last steps by the clock.

    ``hover`` places the lower panel's work on the picture, in shares of its width and height from the top left:
    ``{"left", "right", "seconds", "lanes": [{"name", "top", "bottom", "work": [[step, start, stop], ...]}, ...]}``,
    start and stop in seconds from the left.
    """
    by_stage = [[lane for lane in lanes.lanes if lane.stage == stage] for stage in STAGES]
    shown = [lane for actors in by_stage for lane in actors[:ACTORS]]
    height = 0.26 * len(shown) + 0.5
    figure, axes = _panels(2, 1, 2 * height + 1.1)
    whole, stretch = axes
    names, places = [lane.name for lane in shown], range(len(shown))
    durations = np.array([stop - start for start, stop in lanes.windows])
    white = np.array(to_rgb(IDLE))
    cells = [
        white + share[:, None] * (np.array(to_rgb(STAGE_COLOURS[lane.stage])) - white)
        for lane in shown
        for share in [np.clip(lanes.busy(lane) / durations, 0, 1)]
    ]
    whole.imshow(
        np.stack(cells), aspect="auto", interpolation="nearest",
        extent=(lanes.steps[0] - 0.5, lanes.steps[-1] + 0.5, len(shown) - 0.5, -0.5),
    )  # fmt: skip
    whole.set(title="busy share of each step: the darker, the busier", xlabel="step")
    whole.xaxis.set_major_locator(MaxNLocator(integer=True))

    begin, end = lanes.last_stretch(STRETCH)
    for place, lane in enumerate(shown):
        bars = [(one.start - begin, one.stop - one.start) for one in lane.work if one.stop > begin and one.start < end]
        stretch.broken_barh([(0, end - begin)], (place - 0.4, 0.8), color=IDLE)
        stretch.broken_barh(bars, (place - 0.4, 0.8), color=STAGE_COLOURS[lane.stage], edgecolor="white", linewidth=0.4)
    for step, (start, stop) in zip(lanes.steps, lanes.windows, strict=True):
        if begin <= start and stop <= end:
            stretch.axvline(stop - begin, color=BLACK, linewidth=0.8, linestyle=":")
            stretch.annotate(f"step {step}", (stop - begin, -0.55), ha="right", va="bottom", fontsize=7)
    stretch.set(title="the last steps by the clock", xlabel="seconds", xlim=(0, end - begin))
    stretch.set_ylim(len(shown) - 0.4, -1.1)
    for axis in axes:
        axis.set_yticks(list(places), names)
        axis.grid(False)
        axis.tick_params(axis="y", length=0)
    stages = [stage for stage in STAGES if any(lane.stage == stage for lane in shown)]
    handles = [Patch(color=STAGE_COLOURS[stage], label=stage) for stage in stages] + [Patch(color=IDLE, label="idle")]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    caption = "Each actor's work. Dotted lines end a step; between steps lie held-out evaluations and checkpoints."
    if len(shown) < len(lanes.lanes):
        caption += f" The first {ACTORS} actors of each stage; the table has all {len(lanes.lanes)}."
    figure.draw_without_rendering()
    box = stretch.get_position()
    edge = figure.transFigure.inverted()

    def top(place: float) -> float:
        """Share of the picture's height above ``place`` on the vertical axis."""
        return 1.0 - float(edge.transform(stretch.transData.transform((0, place)))[1])

    hover = {
        "left": box.x0,
        "right": box.x1,
        "seconds": end - begin,
        "lanes": [
            {
                "name": lane.name,
                "top": top(place - 0.5),
                "bottom": top(place + 0.5),
                "work": [
                    [one.step, round(one.start - begin, 3), round(one.stop - begin, 3)]
                    for one in lane.work
                    if one.stop > begin and one.start < end
                ],
            }
            for place, lane in enumerate(shown)
        ],
    }
    return _picture("lanes", "Where the time went", caption, figure, hover)


def _versions(run: Run) -> np.ndarray:
    """Of the held-out evaluations, float64 [evaluations]."""
    return np.asarray([one.version for one in run.heldout], np.float64)


def _panels(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return figure, axes


def _trace_by_mode(axis: Axes, run: Run, name: str, linestyle: str = "-") -> None:
    """A line for each mode, or one for all where the steps do not distinguish modes."""
    steps = series(run.steps, "step")
    by_mode: dict[Mode, np.ndarray] = {mode: series(run.steps, "by_mode", mode, name) for mode in run.modes}
    known = {mode: values for mode, values in by_mode.items() if np.isfinite(values).any()}
    if not known:
        _trace(axis, steps, series(run.steps, name), BLACK, "", linestyle)
    for mode, values in known.items():
        _trace(axis, steps, values, MODE_COLOURS[mode], mode if linestyle == "-" else "", linestyle)


def _trace(axis: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str, linestyle: str = "-") -> None:
    """A line over the steps; a long one is drawn faintly, under its running median."""
    marker = "." if len(steps) < 10 else ""
    if len(steps) < SMOOTHED:
        axis.plot(steps, values, color=colour, label=label, linestyle=linestyle, marker=marker)
        return
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8, linestyle=linestyle)
    half = len(steps) // 40
    padded = np.pad(values, half, mode="edge")
    medians = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
    axis.plot(steps, medians, color=colour, label=label, linestyle=linestyle)


def _legend(axis: Axes) -> None:
    if axis.get_legend_handles_labels()[1]:
        axis.legend()


def _picture(name: str, title: str, caption: str, figure: Figure, hover: dict[str, Any] | None = None) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return Picture(name, title, caption, buffer.getvalue(), hover)
