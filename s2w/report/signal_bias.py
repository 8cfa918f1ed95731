"""`s2w signals`: what cheaper teacher signals would have given in a run with signal.bias_every, as table and figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from s2w.errors import ConfigError
from s2w.report.figures import BLACK, BLUE, DPI, GREEN, ORANGE, STYLE, WIDTH
from s2w.report.run import Run, read_run

COLOURS = {"topk": BLUE, "ids": ORANGE, "sampled": BLACK, "hidden": GREEN}
"""By kind of signal."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One signal over the steps of a run that measured it; see :func:`s2w.learner.signal_bias.summarise`."""

    name: str
    bytes_per_token: float
    divergence: float
    """What it gives, mean over the steps, nats/token."""
    biases: np.ndarray
    """What it gives minus the exact divergence, float64 [steps], nats/token."""
    cosines: np.ndarray
    """Between its gradient and the exact one, float64 [steps]."""

    @property
    def kind(self) -> str:
        return self.name.partition("_")[0]

    @property
    def setting(self) -> str:
        """What to write for it."""
        _, _, detail = self.name.partition("_")
        match self.kind:
            case "topk" | "ids":
                return f"signal.kind={self.kind} signal.top_k={detail}"
            case "hidden":
                return f"signal.kind=hidden signal.dtype={detail}"
        return f"signal.kind={self.kind}"


def write_signals(directory: Path, output: Path | None) -> tuple[str, Path]:
    """Draws the figure into ``output``, by default ``signals.png`` in the run directory.

    Returns:
        The table in Markdown, and the file.

    Raises:
        ConfigError: it is not a run directory, or the run measured nothing.
    """
    run = read_run(directory)
    signals = compare_signals(run)
    path = output or directory / "signals.png"
    draw(run, signals, path)
    return table(signals), path


def compare_signals(run: Run) -> list[Comparison]:
    """Every signal that a step measured, smallest first.

    Raises:
        ConfigError: no step did.
    """
    measured = [bias for line in run.steps if (bias := line.get("signal_bias"))]
    if not measured:
        raise ConfigError(
            f"{str(run.directory)!r} has not measured its signals: train with signal.kind=hidden signal.bias_every=1"
        )
    signals = []
    for name in {name: None for bias in measured for name in bias}:
        lines = [bias[name] for bias in measured if name in bias]
        values = {key: np.array([line[key] for line in lines], dtype=float) for key in lines[0]}
        size = float(values["bytes_per_token"].mean())
        signals.append(Comparison(name, size, float(values["divergence"].mean()), values["bias"], values["cosine"]))
    return sorted(signals, key=lambda signal: (signal.bytes_per_token, signal.name))


def table(signals: Sequence[Comparison]) -> str:
    """In Markdown, one row per signal, means over the steps."""
    rows = ["| signal | bytes/token | divergence | of the exact | cosine |", "| --- | ---: | ---: | ---: | ---: |"]
    for signal in signals:
        exact = signal.divergence - signal.biases.mean()
        rows.append(
            f"| `{signal.setting}` | {signal.bytes_per_token:,.0f} | {signal.divergence:.4f} | "
            f"{signal.divergence / exact:.1%} | {signal.cosines.mean():.4f} |"
        )
    return "\n".join(rows) + "\n"


def draw(run: Run, signals: Sequence[Comparison], path: Path) -> None:
    """Bias and cosine over bytes per token: one point per signal, with a bar from its lowest to its highest step."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        for kind, colour in COLOURS.items():
            own = [signal for signal in signals if signal.kind == kind]
            if not own:
                continue
            sizes = [signal.bytes_per_token for signal in own]
            for axis, values in ((left, [s.biases for s in own]), (right, [s.cosines for s in own])):
                means = np.array([value.mean() for value in values])
                bars = [means - [value.min() for value in values], [value.max() for value in values] - means]
                # Two dtypes of hidden states are not a curve.
                line = "o" if kind == "hidden" else "o-"
                axis.errorbar(sizes, means, np.abs(bars), fmt=line, color=colour, label=kind, markersize=4, capsize=2)
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axis.set_xlabel("bytes/token")
        left.axhline(0, color=BLACK, linewidth=0.8)
        left.set(title=f"bias of {run.config['loss']['divergence']}", ylabel="nats/token")
        right.set(title="cosine with the exact gradient")
        right.legend()
        figure.savefig(path, format="png", dpi=DPI)
