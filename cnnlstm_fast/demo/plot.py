"""The demo at a glance: per system, the two loss curves over each other and what the fast one saves."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cnnlstm_fast.demo.report import Report, SystemReport

REFERENCE, FAST = "#b8bcc4", "#d1495b"
TIME, MEMORY = "#2e6f95", "#7aa95c"
#: Steps over which the plotted losses are averaged: single batches of 32 are noisy.
SMOOTH = 9


def draw(report: Report, path: Path) -> None:
    """Write the figure as a PNG."""
    figure = Figure(figsize=(12.5, 7.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    curves, bars = figure.subplots(2, len(report.systems), sharex="row", sharey="row", squeeze=False)
    figure.suptitle(
        "CNN-LSTM on handwritten digits: the same training in PyTorch and cnnlstm_fast\n",
        fontsize=15,
        weight="bold",
    )
    where = (
        f"{report.device}, {report.threads} threads, PyTorch {report.versions['torch']}, measured at batch "
        f"{report.settings['batch']}, "
        + "denormal numbers flushed, " * report.denormals_flushed
        + report.date[:10]
    )
    figure.text(0.5, 0.945, where, ha="center", color="0.4", fontsize=9.5)
    for system, axes in zip(report.systems, curves, strict=True):
        _draw_curves(system, axes)
    curves[0].set_ylabel("training loss")
    curves[0].set_ylim(0, 1.05 * curves[0].get_ylim()[1])
    for system, axes in zip(report.systems, bars, strict=True):
        _draw_ratios(system, axes)
    bars[0].invert_yaxis()
    bars[0].set_xlim(0, 1.15 * max(c.ratio for s in report.systems for _, c in s.measures))
    figure.savefig(path, metadata={"Source": report.date})


def _draw_curves(system: SystemReport, axes: Axes) -> None:
    steps = range(1, len(system.curves["reference"]) + 1)
    axes.plot(steps, _smooth(system.curves["reference"]), color=REFERENCE, lw=5, label="PyTorch")
    axes.plot(steps, _smooth(system.curves["fast"]), color=FAST, lw=1.3, label="cnnlstm_fast")
    axes.set_title(system.name, fontsize=12, weight="bold")
    axes.set_xlabel("training step")
    axes.legend(frameon=False, loc="upper right", ncols=2)
    accuracy = "test accuracy {reference:.1%} and {fast:.1%}".format(**system.accuracy)
    apart, nudged = (system.loss_difference(side) for side in ("fast", "nudged"))
    drift = (
        f"single losses differ by up to {apart:.2g},\n"
        f"those of PyTorch with weights\none bit off by {nudged:.2g}"
    )
    if system.compared_steps < len(system.curves["reference"]):
        drift += f" ({system.compared_steps} steps)"
    if system.epoch_s:
        drift += (
            "\nan epoch takes {reference:.4g} and {fast:.4g} s, in PyTorch\n"
            "{as it comes:.4g} s if denormals are not flushed"
        ).format(**system.epoch_s)
    axes.text(0.97, 0.84, accuracy, transform=axes.transAxes, ha="right", va="top", color="0.25")
    axes.text(0.97, 0.75, drift, transform=axes.transAxes, ha="right", va="top", color="0.5", fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_ratios(system: SystemReport, axes: Axes) -> None:
    names = [name.rsplit(", ", 1)[0].replace(", ", ",\n") for name, _ in system.measures]
    colors = [MEMORY if name.endswith("MiB") else TIME for name, _ in system.measures]
    ratios = [c.ratio for _, c in system.measures]
    for bar, ratio in zip(axes.barh(names, ratios, color=colors, height=0.62), ratios, strict=True):
        end = ratio, bar.get_y() + bar.get_height() / 2
        axes.annotate(f"{ratio:.1f}x", end, (4, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="0.3", lw=1, ls=":")
    axes.set_xlabel("x less time, x less memory than PyTorch")
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(curve: list[float]) -> list[float]:
    """The mean of each loss and its neighbours."""
    half = SMOOTH // 2
    return [mean(curve[max(0, i - half) : i + half + 1]) for i in range(len(curve))]
