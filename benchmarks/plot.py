"""A report as a picture: every contestant's time over ours, case by case."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import PEERS
from benchmarks.race import OURS
from benchmarks.results import Report

#: Colour-blind safe (Okabe-Ito); one colour per peer in every plot.
_COLOURS = ("#000000", "#56B4E9", "#009E73", "#7CCBB0", "#E69F00", "#0072B2", "#D55E00", "#9FC3DF", "#E8B79B")


def plot_ratios(report: Report, path: Path) -> None:
    """Write a PNG: one panel per case, one bar per peer, p50 of the ratio with p20 and p80 as whiskers.

    Raises:
        ValueError: the report holds no races.
    """
    if not report.races:
        raise ValueError("the report holds no races, so there is nothing to draw: run the benchmarks first")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(report.races))
    rows = -(-len(report.races) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.2 * rows), squeeze=False)
    colours = dict(zip(PEERS, _COLOURS, strict=True))
    for ax in axes.flat[len(report.races) :]:
        ax.axis("off")
    for ax, result in zip(axes.flat, report.races, strict=False):
        peers = [s for s in result.standings if s.name != OURS]
        peers.sort(key=lambda s: s.ratio.p50)
        for at, s in enumerate(peers):
            low, high = s.ratio.p50 - s.ratio.p20, s.ratio.p80 - s.ratio.p50
            ax.barh(
                at, s.ratio.p50, xerr=[[max(low, 0)], [max(high, 0)]], color=colours[s.name],
                alpha=0.45 if s.lent else 1, ecolor="#777777",
            )  # fmt: skip
            ax.text(s.ratio.p80 * 1.05, at, f"{s.ratio.p50:.1f}x", va="center", fontsize=8)
        ax.axvline(1, color="#CC0000", lw=1)
        ax.set_xscale("log")
        ax.set_xlim(min(0.8, *(s.ratio.p20 * 0.9 for s in peers)), max(s.ratio.p80 for s in peers) * 1.8)
        ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50) if ax.get_xlim()[0] <= t <= ax.get_xlim()[1]]
        ax.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        ax.minorticks_off()
        ax.set_yticks(range(len(peers)), [s.name for s in peers], fontsize=8)
        ax.set_title(f"{result.case}: ours {result.standing(OURS).ms.p50:.1f} ms", fontsize=9)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    d = report.device
    figure.suptitle(
        f"Time over {OURS}'s (log scale; right of the red line is slower). {d.cpu}, "
        f"{report.threads} threads, torch {report.versions['torch']}, {report.date[:10]}",
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
