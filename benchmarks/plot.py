"""A report as pictures: every contestant's time over ours, growth curves, and the roofline."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.growth import Point, by_series, kept_line, time_stretches
from benchmarks.peers import PEERS
from benchmarks.race import OURS
from benchmarks.results import Report
from benchmarks.tables import MIB, peak

#: Colour-blind safe (Okabe-Ito); one colour per peer in every plot.
_COLOURS = ("#000000", "#56B4E9", "#009E73", "#7CCBB0", "#E69F00", "#0072B2", "#D55E00", "#9FC3DF", "#E8B79B")
OURS_COLOUR = "#CC0000"
_SIDES = (("eager", "#000000"), ("ours", OURS_COLOUR))


def plot_all(report: Report, stem: Path) -> list[Path]:
    """Write ``<stem>-ratios.png``, ``-growth.png`` and ``-roofline.png``, each if the report has any."""
    wanted = (
        ("ratios", plot_ratios, report.races),
        ("growth", plot_growth, report.growth),
        ("roofline", plot_roofline, [r for r in report.races if r.gflops and r.bytes]),
    )
    paths = []
    for name, draw, has in wanted:
        if has:
            paths.append(stem.with_name(f"{stem.name}-{name}.png"))
            draw(report, paths[-1])
    return paths


def plot_ratios(report: Report, path: Path) -> None:
    """Write a PNG: one panel per case, one bar per peer, p50 of the ratio with p20 and p80 as whiskers.

    Raises:
        ValueError: the report holds no races.
    """
    if not report.races:
        raise ValueError("the report holds no races, so there is nothing to draw: run the benchmarks first")
    figure, axes = _panels(len(report.races), 3)
    colours = dict(zip(PEERS, _COLOURS, strict=True))
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
    _finish(figure, report, f"Time over {OURS}'s (log scale; right of the red line is slower)", path)


def plot_growth(report: Report, path: Path) -> None:
    """Write a PNG: time against arithmetic and memory kept for backward against data, with our lines.

    A dotted line stands where our time bends.

    Raises:
        ValueError: the report holds no growth.
    """
    series = by_series(report.growth)
    if not series:
        raise ValueError("the report holds no growth, so there is nothing to draw: run the benchmarks first")
    columns = min(4, len(series))
    figure, axes = _panels(2 * columns * -(-len(series) // columns), columns, size=(3.4, 2.6))
    for at, (name, points) in enumerate(series.items()):
        time, memory = (axes[2 * (at // columns) + row][at % columns] for row in (0, 1))
        _draw_time(time, points)
        _draw_memory(memory, points)
        time.set_title(f"{name}, {points[0].value} to {points[-1].value}", fontsize=9)
        for ax in (time, memory):
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.tick_params(labelsize=7)
            ax.tick_params(which="minor", labelbottom=False, labelleft=False)
        if at % columns == 0:
            time.set_ylabel("ms per call", fontsize=8)
            memory.set_ylabel("MiB kept for backward", fontsize=8)
    for ax in axes.flat:
        ax.set_visible(ax.has_data())
    axes[0][0].legend(fontsize=8, frameon=False)
    _finish(
        figure,
        report,
        "Growth; lines: a fixed cost plus a rate, fitted to ours; dotted: where it bends",
        path,
    )


def _draw_time(ax, points: list[Point]) -> None:
    work = [p.flops / 1e9 for p in points]
    for side, colour in _SIDES:
        spreads = [getattr(p, f"{side}_ms") for p in points]
        ax.plot(work, [s.p50 for s in spreads], "o", ms=3, color=colour, label=side)
        ax.vlines(work, [s.p20 for s in spreads], [s.p80 for s in spreads], color=colour, lw=0.8)
    for stretch in time_stretches(points):
        first, last = work[stretch.begin], work[stretch.end - 1]
        if stretch.line:
            at = np.geomspace(first, last)
            ax.plot(at, stretch.line.fixed + stretch.line.per_unit * at * 1e9, color=OURS_COLOUR, lw=0.8)
        if stretch.begin:
            ax.axvline(first, color="#777777", lw=0.8, ls=":")
            ax.text(first, 1, f"{points[stretch.begin].value} ", fontsize=7, ha="right", va="top",
                    transform=ax.get_xaxis_transform())  # fmt: skip
    ax.set_xlabel("GFLOP per call", fontsize=8)


def _draw_memory(ax, points: list[Point]) -> None:
    data = [p.data / MIB for p in points]
    for side, colour in _SIDES:
        ax.plot(data, [getattr(p, f"{side}_bytes") / MIB for p in points], "o", ms=3, color=colour)
    if len(points) > 1:
        line, at = kept_line(points), np.geomspace(data[0], data[-1])
        ax.plot(at, line.fixed / MIB + line.per_unit * at, color=OURS_COLOUR, lw=0.8)
    ax.set_xlabel("MiB of input and result", fontsize=8)


def plot_roofline(report: Report, path: Path) -> None:
    """Write a PNG: our arithmetic rate against arithmetic per byte, under the machine's measured roofs.

    Raises:
        ValueError: no race of the report gives its arithmetic and its bytes.
    """
    races = [r for r in report.races if r.gflops and r.bytes]
    top = peak(report)
    if not races or top is None:
        raise ValueError("the report holds no races with a rate, so there is nothing to draw")
    copy = max(r.copy_gbs for r in report.roofline)
    figure, axes = _panels(1, 1, size=(7.5, 4.6))
    ax = axes[0][0]
    points = []
    for r in races:
        flops = r.gflops * r.standing(OURS).ms.p50 * 1e6
        points.append((flops / r.bytes, r))
    low, high = min(*(p[0] for p in points), top / copy) / 16, max(*(p[0] for p in points), top / copy) * 4
    ax.plot([low, top / copy, high], [low * copy, top, top], color="#777777", lw=1.5)
    ax.text(high, top * 1.05, f"{top:.0f} GFLOP/s", ha="right", fontsize=8, color="#555555")
    ax.text(low * 1.3, low * copy * 1.1, f"{copy:.0f} GB/s", fontsize=8, color="#555555")
    for (intensity, r), marker in zip(points, _MARKERS * len(points), strict=False):
        roof = min(top, intensity * copy)
        label = f"{r.case}: {r.gflops:.0f}, {r.gflops / roof:.0%} of its roof"
        ax.plot(intensity, r.gflops, marker, color=OURS_COLOUR, ms=7, mfc="none", label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(min(low * copy, *(r.gflops for r in races)) / 1.2, top * 1.4)
    ax.set_xlabel("FLOP per byte that a call must move (input, parameters and result, once)", fontsize=8)
    ax.set_ylabel("GFLOP/s", fontsize=8)
    ax.legend(fontsize=7, frameon=False, loc="lower right")
    _finish(figure, report, f"{OURS} under the roofs measured in the same run", path)


_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def _panels(count: int, columns: int, size: tuple[float, float] = (5.2, 3.2)):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
    for ax in axes.flat[count:]:
        ax.axis("off")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure, report: Report, title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    d = report.device
    figure.suptitle(
        f"{title}\n{d.cpu}, {report.threads} threads, torch {report.versions['torch']}, {report.date[:10]}",
        fontsize=9,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Source": report.date})
    plt.close(figure)
