"""The demo at a glance: per system, the two loss curves over each other and what the fast one saves."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cnnlstm_fast.demo.report import Report

REFERENCE, FAST = "#b8bcc4", "#d1495b"
BARS = ("#2e6f95", "#2e6f95", "#2e6f95", "#7aa95c", "#7aa95c")


def draw(report: Report, path: Path) -> None:
    """Write the figure as a PNG."""
    figure = Figure(figsize=(12.5, 7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    curves, bars = figure.subplots(2, len(report.systems), sharex="row", sharey="row", squeeze=False)
    figure.suptitle(
        "CNN-LSTM on handwritten digits: the same training, in less time and memory\n",
        fontsize=15,
        weight="bold",
    )
    figure.text(
        0.5, 0.945, f"{report.device}, {report.threads} threads, PyTorch {report.versions['torch']}, "
        f"measured at batch {report.settings['batch']}, {report.date[:10]}",
        ha="center", color="0.4", fontsize=9.5,
    )  # fmt: skip
    for system, axes in zip(report.systems, curves, strict=True):
        steps = range(1, len(system.curves["reference"]) + 1)
        axes.plot(steps, system.curves["reference"], color=REFERENCE, lw=5, label="PyTorch")
        axes.plot(steps, system.curves["fast"], color=FAST, lw=1.2, label="cnnlstm_fast")
        axes.set_title(system.name, fontsize=12, weight="bold")
        axes.set_xlabel("training step")
        accuracy = [f"{100 * system.accuracy[side]:.1f} %" for side in ("reference", "fast")]
        axes.text(
            0.97, 0.72, f"test accuracy {accuracy[0]} and {accuracy[1]}\n"
            f"curves differ by {system.loss_difference('fast'):.1g} at most",
            transform=axes.transAxes, ha="right", va="top", color="0.25", fontsize=9.5,
        )  # fmt: skip
        axes.legend(frameon=False, loc="upper right", ncols=2)
    curves[0].set_ylabel("training loss")
    curves[0].set_ylim(bottom=0)
    for system, axes in zip(report.systems, bars, strict=True):
        names = [name.rsplit(", ", 1)[0].replace(", ", ",\n") for name, _ in system.measures]
        ratios = [c.ratio for _, c in system.measures]
        for container, ratio in zip(axes.barh(names, ratios, color=BARS, height=0.62), ratios, strict=True):
            y = container.get_y() + container.get_height() / 2
            axes.annotate(f"{ratio:.1f}x", (ratio, y), (4, 0), textcoords="offset points", va="center")
        axes.axvline(1, color="0.3", lw=1, ls=":")
        axes.set_xlabel("times less than PyTorch")
    bars[0].invert_yaxis()
    bars[0].set_xlim(0, 1.15 * max(c.ratio for s in report.systems for _, c in s.measures))
    for axes in (*curves, *bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
