"""A report as tables for a terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.blocks import FLOOR, BlockResult
from benchmarks.dispatch import BUDGET_US
from benchmarks.growth import STRAIGHT_MS, Point, Stretch, by_series, kept_line, time_stretches
from benchmarks.latency import Latency, Throughput
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
        latency_table(report.latencies),
    ):
        if table.row_count:
            console.print(table)
    for failure in report.failures:
        console.print(f"[bold red]wrong:[/] {failure}")


def latency_table(found: Sequence[Latency | Throughput]) -> Table:
    """Latencies with the ratio of each engine's p50 over ours, or calls a second of several threads."""
    if any(isinstance(one, Throughput) for one in found):
        table = Table(
            "model",
            "threads",
            "engine",
            "calls/s",
            title="Calls of batch 1 by several threads",
            box=box.SIMPLE,
        )
        for one in found:
            if isinstance(one, Throughput):
                table.add_row(one.model, str(one.threads), one.engine, f"{one.calls_per_second:,.0f}")
        return table
    table = Table(
        "model", "batch", "engine", "p50, ms", "p99, ms", "over ours", title="Latency", box=box.SIMPLE
    )
    ours = {
        (one.model, one.batch): one.p50
        for one in found
        if isinstance(one, Latency) and one.engine.startswith(OURS)
    }
    for one in found:
        assert isinstance(one, Latency)
        if one.p50 is None or one.p99 is None:
            table.add_row(one.model, str(one.batch), one.engine, "", "", escape(one.why_not or ""))
            continue
        ratio = one.p50 / (ours.get((one.model, one.batch)) or float("nan"))
        cells = (f"{one.p50:.3f}", f"{one.p99:.3f}", f"{ratio:.2f}")
        table.add_row(
            one.model,
            str(one.batch),
            one.engine,
            *cells,
            style="bold" if one.engine.startswith(OURS) else None,
        )
    return table


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
    notes = [f"{result.rounds} rounds, seed {result.seed}, {_others(result.others_cpu)}"]
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


GROWTH_COLUMNS = (
    "series",
    "fixed, us",
    "GFLOP/s",
    "where time bends",
    "kept per byte of data",
    "furthest off",
    "times faster than eager",
)


def growth_rows(report: Report) -> list[list[str]]:
    """Per series, under :data:`GROWTH_COLUMNS`: the first line, where others begin, memory's line, ratios."""
    rows = []
    for name, points in by_series(report.growth).items():
        first, *others = time_stretches(points)
        if first.line is None:
            continue
        memory = kept_line(points)
        ratios = [p.ratio.p50 for p in points]
        rows.append(
            [
                f"{name}, {points[0].value} to {points[-1].value}",
                f"{first.line.fixed * 1e3:.0f}",
                f"{1e-6 / first.line.per_unit:.0f}",
                "; ".join(_bend(points, stretch) for stretch in others) or "nowhere",
                f"{memory.per_unit:.2f}",
                f"{memory.worst:+.0%} at {points[memory.at].value}",
                f"{min(ratios):.1f} to {max(ratios):.1f}",
            ]
        )
    return rows


def _bend(points: list[Point], stretch: Stretch) -> str:
    p = points[stretch.begin]
    rate = 1 / stretch.line.per_unit if stretch.line else p.flops / p.ours_ms.p50
    sizes = f"weights {p.parameters / MIB:.1f}, data {p.data / MIB:.1f} MiB"
    return f"at {p.value}, to {rate / 1e6:.0f} GFLOP/s ({sizes})"


def _growth(report: Report) -> Table:
    left = ("series", "where time bends")
    table = _table("Growth: our time against arithmetic, and what we keep against data", left=())
    for column in GROWTH_COLUMNS:
        table.add_column(column, justify="left" if column in left else "right")
    for row in growth_rows(report):
        table.add_row(*row)
    if report.growth:
        table.caption = (
            f"a line is fixed + rate * work, and none of its times is further off than {STRAIGHT_MS:.0%}; "
            f"{_others(max(p.others_cpu for p in report.growth))}"
        )
    return table


def _others(share: float) -> str:
    """How busy others were, in red where figures are not worth quoting."""
    said = f"others used {share:.0%} of the machine"
    return f"[bold red]{said}: too busy to quote these figures[/]" if share > BUSY else said


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
