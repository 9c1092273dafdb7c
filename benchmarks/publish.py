"""What README and docs show: tables between marks, and pictures, all from the committed result files.

A block of a page begins with ``<!-- measured: NAME -->`` and ends with ``<!-- end -->``; what stands
between them is written by :func:`publish` and by nobody else. Tests hold the pages to it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean, median
from textwrap import fill

from benchmarks import plot
from benchmarks.cases import SYSTEMS
from benchmarks.race import OURS, Result
from benchmarks.results import FOLDER, Report, from_json, read
from benchmarks.tables import GROWTH_COLUMNS, MIB, growth_rows, peak
from cnnlstm_fast.demo import plot as demo_plot
from cnnlstm_fast.demo.report import Report as DemoReport
from cnnlstm_fast.planning.choose import PLANS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/frozen.md")
#: Whose figures the pages quote; files of other machines may lie beside them.
DEVICE = "amd-epyc-2-cores-avx512"
_NONE = f"no result file of {DEVICE} holds any {{}}"
_BLOCK = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Committed:
    """The result files of one machine, the youngest first: a figure is quoted from the first that has it."""

    reports: dict[Path, Report]

    @classmethod
    def here(cls, folder: Path = FOLDER) -> Committed:
        found = {p: read(p) for p in folder.glob(f"*{DEVICE}.json") if not p.name.startswith("demo-")}
        return cls(dict(sorted(found.items(), key=lambda item: item[1].date, reverse=True)))

    def with_any(self, field: str, mode: str = "") -> tuple[Path, Report]:
        """The youngest file that has any of a :class:`Report`'s lists, of one mode where one is named.

        Raises:
            LookupError: no file has.
        """
        for path, report in self.reports.items():
            if getattr(report, field) and mode in ("", report.mode):
                return path, report
        raise LookupError(_NONE.format(field))

    def races(self, wanted: Callable[[str], bool]) -> list[tuple[Path, Report, Result]]:
        """By case name, each from the youngest file, in the order of the files.

        Raises:
            LookupError: no file has any.
        """
        found = {}
        for path, report in self.reports.items():
            for result in report.races:
                if wanted(result.case):
                    found.setdefault(result.case, (path, report, result))
        if not found:
            raise LookupError(_NONE.format("such races"))
        return list(found.values())


def _link(path: Path) -> str:
    name = f"benchmarks/results/{path.name}"
    return f"[`{name}`]({name})"


def _source(files: Iterable[tuple[Path, Report]]) -> str:
    """Where figures come from, in a line."""
    found = []
    for path, report in dict(files).items():
        torch = report.versions["torch"].partition("+")[0]
        where = f"{report.device.cpu}, {report.threads} threads, PyTorch {torch}, {report.date[:10]}"
        found.append(f"{where}: {_link(path)}")
    return "; ".join(found) + "."


def _table(head: list[str], rows: list[list[str]], *, words: int = 1) -> str:
    """Markdown; the first ``words`` columns hold words, the others figures."""
    rule = ["---" if i < words else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _figure(value: float) -> str:
    """Two or three digits."""
    return f"{value:.2f}" if value < 2 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _peer(case: str, name: str) -> str:
    if name.startswith("chunked"):
        return f"channels_last in chunks of {name.split()[1]}"
    given = case.split("/")[1]
    if case.startswith("recurrent/") and given != "plain":
        return f"{name}, {'loop over steps' if given == 'resets' else 'packed'}"
    return name


def _race_row(name: str, result: Result) -> list[str]:
    best = result.standing("best")
    return [
        name,
        _figure(result.standing(OURS).ms.p50),
        _peer(result.case, best.name),
        _figure(best.ratio.p50),
        _figure(result.standing("eager").ratio.p50),
    ]


def _race_table(found: list[tuple[Path, Report, Result]], name: Callable[[str], str], first: str = "") -> str:
    head = [first, "ms", "best peer", "times faster than it", "than eager"]
    table = _table(head, [_race_row(name(r.case), r) for _, _, r in found])
    return f"{table}\n\n{_source((p, r) for p, r, _ in found)}"


def _features(committed: Committed) -> str:
    found = committed.races(lambda case: case.split("/")[1] == "features")
    return _race_table(found, lambda case: f"{case.split('/')[0]}, {case.split('/')[2]}")


def _name_of_whole(case: str) -> str:
    kind, given, *what, mode = case.split("/")
    if kind != "recurrent":
        return f"{kind}, {mode}"
    return what[0] + (f", with {given}" if given != "plain" else "") + f", {mode}"


def _whole(committed: Committed) -> str:
    """Systems and recurrent layers; a plain layer that is there for comparison has no row of its own."""
    every = committed.races(lambda case: case.startswith("recurrent/") or case.split("/")[1] == "model")
    text = _race_table([f for f in every if f[2].targets], _name_of_whole)
    shares = [r.gflops / peak(report) for _, report, r in every if r.gflops]
    ms = {r.case: r.standing(OURS).ms.p50 for _, _, r in every}
    costs = [
        t / ms[case.replace(f"/{given}/", "/plain/")]
        for case, t in ms.items()
        for given in ("resets", "lengths")
        if f"/{given}/" in case
    ]
    path, report = committed.with_any("steps")
    step = report.steps[0]
    summary = (
        f"Inference in this table reaches {min(shares):.0%} to {max(shares):.0%} of the arithmetic peak "
        f"that the same run measured. A call with resets or lengths takes {min(costs):.2f} to "
        f"{max(costs):.2f} times as long as the same call without. One step of a stream of {step.layer} "
        f"takes {step.ours_us:.0f} us, of the plain layer {step.eager_us:.0f} "
        f"({_link(path)})."
    )
    return f"{text}\n\n{fill(summary, 120, break_long_words=False, break_on_hyphens=False)}"


def _field(committed: Committed) -> str:
    found = committed.races(lambda case: case.startswith("field/"))
    return _race_table(found, lambda case: ", ".join(case.split("/")[1:]))


def _memory(committed: Committed) -> str:
    path, report = committed.with_any("memory")
    by_case = defaultdict(dict)
    for m in report.memory:
        by_case[m.case][m.side] = m
    rows = []
    for stage, what in (
        ("features", "kept for the backward by the features of {}, input included"),
        ("model", "peak of a training step of {}"),
    ):
        for kind in SYSTEMS:
            sides = by_case[f"{kind}/{stage}/training"]
            rows.append([what.format(kind), *(_figure(sides[side].bytes / MIB) for side in ("eager", OURS))])
    table = _table(["", "eager, MiB", "fast, MiB"], rows)
    return f"{table}\n\n{_source([(path, report)])}"


def _blocks(committed: Committed) -> str:
    path, report = committed.with_any("blocks")
    rows = []
    for mode in ("inference", "training"):
        for plan in PLANS:
            ratios = [b.ratio.p50 for b in report.blocks if (b.mode, b.plan) == (mode, plan)]
            if ratios:
                figures = (_figure(f(ratios)) for f in (min, median, max))
                words = "PyTorch's own operators" if plan == "reference" else plan
                rows.append([mode, words, str(len(ratios)), *figures])
    table = _table(["", "plan of the forward", "blocks", "least", "median", "most"], rows, words=2)
    return f"{table}\n\n{_source([(path, report)])}"


def _picture(name: str, says: str) -> str:
    return f"![{says}]({name}.png)"


def _roofline(committed: Committed) -> str:
    rated = _rated(committed)
    r = max(rated[0][1].roofline, key=lambda r: r.gflops)
    picture = _picture("roofline", "arithmetic rates of inference under the machine's measured roofs")
    roofs = f"{r.gflops:.0f} GFLOP/s of multiply-adds, {r.copy_gbs:.0f} GB/s of copies."
    return f"{picture}\n\n{roofs} {_source((p, r) for p, r, _ in rated)}"


def _rated(committed: Committed) -> list[tuple[Path, Report, Result]]:
    """The races of the roofline: all of one file."""
    found = committed.races(lambda case: case.endswith("/inference"))
    rated = [f for f in found if f[2].gflops and f[2].bytes]
    if not rated:
        raise LookupError(_NONE.format("races with a rate"))
    return [f for f in rated if f[0] == rated[0][0]]


def _growth(committed: Committed) -> str:
    path, report = committed.with_any("growth")
    picture = _picture("growth", "time against arithmetic, memory against data, and the lines through them")
    caches = ", ".join(f"{name} {kib} KiB" for name, kib in report.device.caches_kib.items())
    table = _table(list(GROWTH_COLUMNS), growth_rows(report))
    return f"{picture}\n\n{table}\n\nCaches: {caches}. {_source([(path, report)])}"


def _latency(committed: Committed) -> str:
    """Ours at each batch, and the p50 of the faster of the two engines over it."""
    path, report = committed.with_any("latencies", "latency")
    found = {(one.model, one.batch, one.engine): one for one in report.latencies if one.p50}
    models = list(dict.fromkeys(one.model for one in report.latencies))
    batches = sorted({one.batch for one in report.latencies})
    ratios: dict[int, list[float]] = defaultdict(list)
    rows = []
    for model in models:
        cells = []
        for batch in batches:
            ours = found.get((model, batch, OURS))
            others = [found.get((model, batch, name)) for name in ("ONNX Runtime", "OpenVINO")]
            best = min((one for one in others if one and one.p50), key=lambda one: one.p50, default=None)
            if ours is None or best is None:
                cells += ["", ""]
                continue
            ratios[batch].append(best.p50 / ours.p50)
            cells += [f"{ours.p50:.2f} ({ours.p99:.2f})", f"{ratios[batch][-1]:.2f}"]
        rows.append([model, *cells])
    means = [f"{geometric_mean(ratios[b]):.2f}" if ratios[b] else "" for b in batches]
    rows.append(["geometric mean", *(cell for mean in means for cell in ("", mean))])
    head = ["", *(text for b in batches for text in (f"batch {b}: ms, p50 (p99)", "times faster"))]
    return f"{_table(head, rows)}\n\n{_source([(path, report)])}"


_BLOCKS: dict[str, Callable[[Committed], str]] = {
    "features": _features,
    "whole": _whole,
    "field": _field,
    "memory": _memory,
    "blocks": _blocks,
    "roofline": _roofline,
    "growth": _growth,
    "latency": _latency,
}


def render(page: Path, committed: Committed) -> str:
    """The page's text with every block as the result files have it; links are relative to the page."""

    def block(found: re.Match) -> str:
        try:
            text = _BLOCKS[found[2]](committed)
        except LookupError as error:
            text = f"Not measured yet: {error}."
        up = "../" * (len(page.relative_to(ROOT).parts) - 1)
        return f"{found[1]}{text.replace('](benchmarks/', f']({up}benchmarks/')}\n{found[3]}"

    return _BLOCK.sub(block, page.read_text())


def pictures(committed: Committed) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """By name in ``docs/``: the date of the run that a picture shows, and what draws it."""
    found = {}

    def add(name: str, draw: Callable[[Report, Path], None], report: Report) -> None:
        found[f"{name}.png"] = report.date, lambda path: draw(report, path)

    features = committed.races(lambda case: case.split("/")[1] == "features")
    add("features", plot.plot_ratios, replace(features[0][1], races=[r for _, _, r in features]))
    rated = _rated(committed)
    add("roofline", plot.plot_roofline, replace(rated[0][1], races=[r for _, _, r in rated]))
    with contextlib.suppress(LookupError):
        add("growth", plot.plot_growth, committed.with_any("growth")[1])
    demo = _demo()
    found["demo.png"] = demo.date, lambda path: demo_plot.draw(demo, path)
    return found


def _demo() -> DemoReport:
    data = json.loads((FOLDER / f"demo-{DEVICE}.json").read_text())
    for system in data["systems"]:
        del system["loss_difference"]  # follows from the curves
    return from_json(DemoReport, data, "demo")


def publish() -> Iterator[Path]:
    """Write all blocks and pictures; yields each file once it is written."""
    committed = Committed.here()
    for name in PAGES:
        page = ROOT / name
        page.write_text(render(page, committed))
        yield page
    for name, (_, draw) in pictures(committed).items():
        draw(ROOT / "docs" / name)
        yield ROOT / "docs" / name
