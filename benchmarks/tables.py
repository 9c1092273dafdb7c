"""A report as tables for a terminal."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.blocks import FLOOR, BlockResult
from benchmarks.dispatch import BUDGET_US
from benchmarks.growth import STRAIGHT_BYTES, STRAIGHT_MS, Line, Point, by_series, fit
from benchmarks.race import OURS, Result, Spread
from benchmarks.results import Report

MIB = 2**20
#: Above this share of the machine in other hands, a race's figures are not worth quoting.
BUSY = 0.1


def show(report: Report, console: Console) -> None:
    """Print everything that a report holds."""
    d = report.device
    console.print(
        f"{d.cpu}, {d.cores} cores, {report.threads} threads, torch {d.torch_isa}, ours {d.our_isa}; "
        f"torch {report.versions['torch']}; commit {report.commit}; {report.date}"
    )
    for when, r in zip(("before", "after"), report.roofline, strict=False):
        console.print(f"{when}: {r.gflops:.0f} GFLOP/s ({r.source}), copies {r.copy_gbs:.1f} GB/s")
    for result in report.races:
        console.print(_race(result, peak(report)))
    for table in (
        _growth(report),
        _memory(report),
        _dispatch(report),
        _steps(report),
        _traces(report),
        _blocks(report),
    ):
        if table.row_count:
            console.print(table)
    for failure in report.failures:
        console.print(f"[bold red]wrong:[/] {failure}")


def peak(report: Report) -> float | None:
    """The higher of the measured arithmetic peaks, in GFLOP/s."""
    return max((r.gflops for r in report.roofline), default=None)


def _spread(s: Spread, digits: int = 2) -> tuple[str, str, str]:
    return tuple(f"{v:.{digits}f}" for v in (s.p20, s.p50, s.p80))


def _race(result: Result, peak_gflops: float | None) -> Table:
    title = result.case
    if result.gflops is not None and peak_gflops:
        share = result.gflops / peak_gflops
        title += f": {result.gflops:.0f} GFLOP/s, {share:.0%} of {peak_gflops:.0f}"
    others = f"others used {result.others_cpu:.0%} of the machine"
    if result.others_cpu > BUSY:
        others = f"[bold red]{others}: too busy to quote these figures[/]"
    notes = [f"{result.rounds} rounds, seed {result.seed}, {others}"]
    for who, aim in result.targets.items():
        ratio = result.standing(who).ratio.p50
        name = f"best peer, {result.best}" if who == "best" else who
        notes.append(f"over {name}: {ratio:.2f}x, aim {aim}x: {'reached' if ratio >= aim else 'NOT reached'}")
    notes += [escape(f"left out: {name}: {why}") for name, why in result.left_out.items()]
    table = _table(
        title, left=("peer",), right=("ms p20", "p50", "p80", "over ours p20", "p50", "p80", "error")
    )
    table.caption = "\n".join(notes)
    for s in sorted(result.standings, key=lambda s: s.ms.p50):
        style = "bold" if s.name == OURS else "dim" if s.lent else None
        name = f"{s.name} (best)" if s.name == result.best else s.name
        table.add_row(name, *_spread(s.ms), *_spread(s.ratio), f"{s.error:.1e}", style=style)
    return table


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _memory(report: Report) -> Table:
    table = _table(
        "Memory of training (resident, input included; kept: without the output)",
        left=("case", "what"),
        right=("eager MiB", "ours MiB", "ratio", "output MiB"),
    )
    by_key = defaultdict(dict)
    for m in report.memory:
        by_key[m.case, m.what][m.side] = m
    for (case, what), sides in by_key.items():
        theirs, ours = sides["eager"], sides[OURS]
        table.add_row(
            case, what, f"{theirs.bytes / MIB:.1f}", f"{ours.bytes / MIB:.1f}",
            f"{theirs.bytes / ours.bytes:.1f}x", f"{ours.output_bytes / MIB:.1f}",
        )  # fmt: skip
    return table


def _growth(report: Report) -> Table:
    """Every series' line: a fixed cost, a rate, and the point furthest from it, for time and memory."""
    table = _table(
        "Growth: our time against arithmetic, what we keep against data, and over eager",
        left=("series", "from, to"),
        right=("fixed us", "GFLOP/s", "worst", "at", "kept/data", "worst", "over eager"),
    )
    for name, points in by_series(report.growth).items():
        if len(points) < 2:
            continue
        time, memory = lines(points)
        ratios = sorted(p.ratio.p50 for p in points)
        table.add_row(
            name,
            f"{points[0].value}, {points[-1].value}",
            f"{time.fixed * 1e3:.0f}",
            f"{1e-6 / time.per_unit:.0f}",
            _off(time.worst, STRAIGHT_MS),
            str(points[time.at].value),
            f"{memory.per_unit:.2f}",
            _off(memory.worst, STRAIGHT_BYTES),
            f"{ratios[0]:.1f}x to {ratios[-1]:.1f}x",
        )
    table.caption = (
        f"worst: the point furthest from the line fixed + rate * work; red: beyond {STRAIGHT_MS:.0%} of a "
        f"time, or {STRAIGHT_BYTES:.0%} of memory"
    )
    return table


def lines(points: list[Point]) -> tuple[Line, Line]:
    """The lines of our time against arithmetic, and of what we keep for backward against data."""
    flops, data = [float(p.flops) for p in points], [float(p.data) for p in points]
    return fit(flops, [p.ours_ms.p50 for p in points]), fit(data, [float(p.ours_bytes) for p in points])


def _off(worst: float, allowed: float) -> str:
    return f"[red]{worst:+.0%}[/]" if abs(worst) > allowed else f"{worst:+.0%}"


def _dispatch(report: Report) -> Table:
    table = _table(
        f"One small block (1x3x8x8), one thread; budget eager + {BUDGET_US:.0f} us",
        left=("channels", "mode"),
        right=("eager us", "ours us", "extra us p20", "p50", "p80"),
    )
    for d in report.dispatch:
        style = None if d.extra_us.p50 <= BUDGET_US else "red"
        table.add_row(
            str(d.channels),
            d.mode,
            f"{d.eager_us:.1f}",
            f"{d.ours_us:.1f}",
            *_spread(d.extra_us, 1),
            style=style,
        )
    return table


def _steps(report: Report) -> Table:
    table = _table(
        "One step of a layer that carries its state on: nn's layer, and layer.stream()",
        left=("layer", "batch"),
        right=("eager us", "ours us", "over ours p20", "p50", "p80"),
    )
    for s in report.steps:
        table.add_row(s.layer, str(s.batch), f"{s.eager_us:.1f}", f"{s.ours_us:.1f}", *_spread(s.ratio, 2))
    return table


def _traces(report: Report) -> Table:
    table = _table("torch.profiler", left=("system", "part", "own ops", "copies of map size"))
    for t in report.traces:
        style = "red" if t.copies or not t.own_ops else None
        table.add_row(
            t.system, t.what, ", ".join(t.own_ops) or "none", ", ".join(t.copies) or "none", style=style
        )
    return table


def _blocks(report: Report) -> Table:
    """Blocks by mode and plans, then every one below the floor."""
    table = _table(
        f"{len(report.blocks)} block races over eager",
        left=("mode", "plan / backward"),
        right=("blocks", "least", "p20", "median", "p80", "most", f"below {FLOOR}"),
    )
    groups = defaultdict(list)
    for b in report.blocks:
        plan = b.plan if b.mode == "inference" else f"{b.plan} / {b.backward_plan}"
        groups[b.mode, plan].append(b.ratio.p50)
    for (mode, plan), ratios in sorted(groups.items()):
        s = Spread.of(ratios)
        table.add_row(
            mode, plan, str(len(ratios)), f"{min(ratios):.2f}", f"{s.p20:.2f}", f"{median(ratios):.2f}",
            f"{s.p80:.2f}", f"{max(ratios):.2f}", str(sum(r < FLOOR for r in ratios)),
        )  # fmt: skip
    slow = sorted((b for b in report.blocks if b.ratio.p50 < FLOOR), key=lambda b: b.ratio.p50)
    table.caption = "\n".join(_slow(b) for b in slow)
    return table


def _slow(b: BlockResult) -> str:
    spread = f"{b.ratio.p50:.2f}x ({b.ratio.p20:.2f} to {b.ratio.p80:.2f})"
    return f"{spread} {b.mode}, {b.plan} / {b.backward_plan} ({b.reason}): {b.block}"
