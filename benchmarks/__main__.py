"""``python -m benchmarks run | latency | blocks | calibrate | regret | gpu | soak | plot``, and the like."""

from __future__ import annotations

import enum
import json
import os
import secrets
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import blocks as block_races
from benchmarks import calibrate as calibration
from benchmarks import dispatch, gpu, gpu_works, growth, memory, roofline, trace
from benchmarks import latency as latencies
from benchmarks.calibrate_epilogue import Row, race_epilogues
from benchmarks.calibrate_fit import Clock
from benchmarks.cases import CASES, LENT_PEERS, SYSTEMS, Case
from benchmarks.models import MODELS, race_model
from benchmarks.race import WrongResult, race
from benchmarks.results import Device, Report, read
from benchmarks.soak import soak as run_soak
from benchmarks.tables import latency_table, show
from cnnlstm_fast.planning import rates

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Measure cnnlstm_fast against its peers.")
console = Console(width=None if sys.stdout.isatty() else 110)

Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")]

#: Dtypes that plans are calibrated for.
_DTYPES = torch.float32, torch.bfloat16

#: Cases whose memory a quick run measures: two processes each.
_QUICK_MEMORY = tuple(f"{kind}/features/training" for kind in SYSTEMS)
#: Peers that a quick run leaves out: preparing them takes longer than racing them.
_NOT_QUICK = ("torch.compile", *LENT_PEERS)


class Part(str, enum.Enum):
    """What a run can measure."""

    races = "races"
    growth = "growth"
    memory = "memory"
    dispatch = "dispatch"
    traces = "traces"


def _progress() -> Progress:
    """Bars on stderr, so that what is printed stays clean; gone when done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


@app.command()
def run(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick/--full",
            help="2 minutes: features stages, the ends of growth series, no torch.compile; or 30 with all.",
        ),
    ] = True,
    case: Annotated[
        list[str] | None,
        typer.Option(help="A case, or the beginning of its name; repeatable. All without it."),
    ] = None,
    part: Annotated[
        list[Part] | None, typer.Option(help="What to measure; repeatable. All without it.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds per race (quick 5, full 11).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the inputs; random without it, and reported.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Result file; benchmarks/results/ for a run of everything.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Race the cases, measure growth, memory and dispatch, trace; write a result file and print tables.

    The file is written anew after every race and part, so that a run that is cut short leaves what it
    has. Exits with 1 where a result was wrong.
    """
    if case:
        chosen = [c for name, c in CASES.items() if any(name.startswith(prefix) for prefix in case)]
    else:
        chosen = [c for c in CASES.values() if c.quick or not quick]
    if not chosen:
        raise typer.BadParameter(f"no case begins with {case}; there are: {', '.join(CASES)}")
    parts = part or list(Part)
    if Part.memory in parts and not sys.platform.startswith("linux"):
        typer.echo("memory is left out: it is read from /proc, which only Linux has", err=True)
        parts = [p for p in parts if p is not Part.memory]
    report = Report.begin("quick" if quick else "full")
    path = output or (None if case or part else report.path)

    def save() -> None:
        if path is not None:
            report.write(path)

    with _progress() as progress:
        report.roofline.append(roofline.measure())
        if Part.races in parts:
            _races(report, chosen, quick, rounds, seed, progress, save)
        if Part.growth in parts and not case:
            _growth(report, quick, seed, progress)
            save()
        report.roofline.append(roofline.measure())
        if Part.dispatch in parts:
            wanted = [(channels, mode) for channels in dispatch.CHANNELS for mode in ("inference", "forward")]
            for w in progress.track(wanted, description="dispatch"):
                report.dispatch.append(dispatch.measure(*w))
            for layer in progress.track(dispatch.STEPS, description="streams"):
                report.steps.append(dispatch.measure_step(*layer))
        if Part.traces in parts:
            for kind in progress.track(SYSTEMS, description="traces"):
                report.traces.extend(trace.trace(kind))
        save()
        if Part.memory in parts:
            measured = [c.name for c in chosen if c.training and (not quick or c.name in _QUICK_MEMORY)]
            wanted = [(name, side) for name in measured for side in memory.SIDES]
            for w in progress.track(wanted, description="memory"):
                report.memory.append(memory.measure(*w))
    _finish(report, path, as_json)


def _races(report: Report, cases: list[Case], quick: bool, rounds: int | None, seed, progress, save) -> None:
    rounds = rounds or (5 if quick else 11)
    for case in cases:
        skipped = [p for p in case.peers if quick and p in _NOT_QUICK]
        task = progress.add_task(case.name, total=rounds)
        try:
            result = race(
                replace(case, peers=tuple(p for p in case.peers if p not in skipped)),
                rounds=rounds,
                turn_s=0.1 if quick else 0.25,
                seed=torch.seed() % 2**31 if seed is None else seed,
                tell=lambda what, t=task, n=case.name: progress.update(t, description=f"{n}: {what}"),
                advance=lambda t=task: progress.advance(t),
            )
        except WrongResult as error:
            report.failures.append(str(error))
        else:
            left_out = result.left_out | dict.fromkeys(skipped, "not in a quick run")
            report.races.append(replace(result, left_out=left_out))
        save()
        progress.remove_task(task)


def _growth(report: Report, quick: bool, seed: int | None, progress: Progress) -> None:
    wanted = [(s, v) for s in growth.SERIES.values() for v in (s.quick if quick else s.values)]
    task = progress.add_task("growth", total=len(wanted))
    for series, value in wanted:
        progress.update(task, description=f"growth: {series.name} {value}")
        try:
            report.growth.append(
                growth.measure(
                    series,
                    value,
                    rounds=3 if quick else 7,
                    turn_s=0.02 if quick else 0.1,
                    seed=torch.seed() % 2**31 if seed is None else seed,
                )
            )
        except WrongResult as error:
            report.failures.append(str(error))
        progress.advance(task)


@app.command()
def latency(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model, by the beginning of its name; repeatable. All without it."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="A batch; repeatable. 1, 4 and 16.")] = None,
    calls: Annotated[int, typer.Option(min=10, help="Counted calls of each engine.")] = 1000,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="An engine, by the beginning of its name; repeatable. Those ready in seconds."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="How long the calls of a model at a batch are counted.")
    ] = latencies.SECONDS,
    bfloat16: Annotated[
        bool, typer.Option("--bfloat16", help="Engines that compute in bfloat16: ours and OpenVINO.")
    ] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Calls a second of 1, 4 and 16 Python threads instead.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Result file; benchmarks/results/ for all models and batches, else none."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Latency of frozen models, p50 and p99, against the inference engines: 10 minutes for all.

    What is measured is written after each model. Exits with 1 where our result was wrong.
    """
    chosen = [n for n in latencies.MODELS if not model or any(n.startswith(prefix) for prefix in model)]
    if not chosen:
        raise typer.BadParameter(f"no model begins with {model}; there are: {', '.join(latencies.MODELS)}")
    engines: tuple[str, ...] = latencies.QUICK_ENGINES
    if engine:
        engines = tuple(e for e in latencies.ENGINES if any(e.startswith(prefix) for prefix in engine))
    if bfloat16:
        engines = latencies.LOW_OURS, latencies.LOW_OPENVINO
    if serve:
        _serve(chosen, engines, as_json)
        return
    report = Report.begin("latency-bfloat16" if bfloat16 else "latency")
    path = output or (None if model or batch or engine else report.path)
    with _progress() as progress:
        report.roofline.append(roofline.measure())
        wanted = [(n, b) for n in chosen for b in batch or latencies.batches_of(n)]
        for name, size in progress.track(wanted, description="latency"):
            try:
                report.latencies.extend(latencies.measure(name, size, calls, engines, seconds))
            except WrongResult as error:
                report.failures.append(f"{name}, batch {size}: {error}")
            if path:
                report.write(path)
        report.roofline.append(roofline.measure())
    if path:
        report.write(path)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=1))
    else:
        show(report, console)
    if report.failures:
        raise typer.Exit(1)


def _serve(models: list[str], engines: tuple[str, ...], as_json: bool) -> None:
    found: list[latencies.Throughput] = []
    with _progress() as progress:
        try:
            for name in progress.track(models, description="latency"):
                found += latencies.serve(name, engines)
        except WrongResult as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=1))
    else:
        console.print(latency_table(found))


@app.command()
def blocks(
    count: Annotated[int, typer.Option(min=1, help="How many random block shapes.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the shapes and inputs.")] = 0,
    mode: Annotated[
        list[str] | None, typer.Option(help="inference, training; repeatable. Both without it.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Result file; benchmarks/results/ without it.")] = None,
    as_json: Json = False,
) -> None:
    """Race random blocks like the field's over eager: which plan each gets, and its ratio.

    Exits with 1 where a result was wrong.
    """
    modes = mode or ["inference", "training"]
    if not set(modes) <= {"inference", "training"}:
        raise typer.BadParameter(f"unknown mode in {modes}, expected inference or training")
    report = Report.begin("blocks")
    wanted = [(b, m) for b in block_races.draw_blocks(count, seed) for m in modes]
    with _progress() as progress:
        report.roofline.append(roofline.measure())
        for at, (block, m) in enumerate(progress.track(wanted, description="blocks")):
            try:
                report.blocks.append(block_races.race_block(block, m, seed=seed + at))
            except WrongResult as error:
                report.failures.append(str(error))
        report.roofline.append(roofline.measure())
    _finish(report, output or report.path, as_json)


Blocks = Annotated[int, typer.Option("--blocks", min=1, help="Random blocks, each in both modes.")]
RaceSeed = Annotated[int, typer.Option(help="Of the blocks and their inputs; random without it.")]
OneThread = Annotated[
    bool, typer.Option("--one-thread", help="Time one thread's own work: for machines that others use too.")
]


def _clock(one_thread: bool) -> Clock:
    """The wall's, or by ``one_thread`` that of this process's work, which from now on one thread does."""
    if not one_thread:
        return time.perf_counter
    torch.set_num_threads(1)
    return time.process_time


def _race_plans(
    count: int, seed: int, dtypes: Sequence[torch.dtype], keep: Path | None, clock: Clock,
    unlisted: float = 0.5,
    tune: bool = False,
) -> list[calibration.Race]:  # fmt: skip
    with _progress() as progress:
        task = progress.add_task("blocks", total=2 * count * len(dtypes))
        tell = partial(progress.update, task)
        races = calibration.run(count, seed, dtypes, lambda done: tell(completed=done), unlisted, tune, clock)
    if keep is not None:
        calibration.write_races(keep, races)
    return races


@app.command()
def calibrate(
    count: Blocks = 400,
    seed: RaceSeed = -1,
    races: Annotated[
        list[Path] | None, typer.Option(help="Races kept earlier, to be fitted instead; repeatable.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Where the races go, as lines of JSON.")] = None,
    prior: Annotated[
        str | None,
        typer.Option(help="Rates to begin at, and to keep where no race says more."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File of rates; without it the package's own for this processor.")
    ] = None,
    only_epilogues: Annotated[
        bool, typer.Option(help="Race what runs behind convolutions alone; the file keeps all else.")
    ] = False,
    one_thread: OneThread = False,
) -> None:
    """Race every plan of random blocks and fit the rates by which plans are chosen on this processor."""
    tilings: list[list[calibration.Cut]] = []
    epilogues: dict[str, dict[str, list[Row]]] = {}
    clock = _clock(one_thread)
    path = output or Path(rates.__file__).parent / f"{rates.name_here()}.json"
    if only_epilogues:
        seed = seed if seed >= 0 else secrets.randbelow(2**31)
        epilogues = {str(d)[6:]: race_epilogues(count, seed, d, clock) for d in _DTYPES}
        calibration.write(path, calibration.with_epilogues(json.loads(path.read_text()), epilogues))
        console.print(f"{count} races of epilogues in each dtype; written: {path}")
        return
    if races:
        raced = [one for path in races for one in calibration.read_races(path)]
    else:
        seed = seed if seed >= 0 else secrets.randbelow(2**31)
        raced = _race_plans(count, seed, _DTYPES, keep, clock)
        tilings = calibration.race_tilings(count // 10, seed, clock)
        epilogues = {str(d)[6:]: race_epilogues(count // 2, seed, d, clock) for d in _DTYPES}
    here = Device.here()
    device = f"{here.cpu}, {here.cores} cores, {here.our_isa}"
    given = None if prior is None else rates.read(prior)
    calibration.write(path, calibration.content(raced, tilings, epilogues, device, given))
    console.print(f"{len(raced)} races; written: {path}")


@app.command()
def regret(
    count: Blocks = 60,
    seed: RaceSeed = -1,
    races: Annotated[list[Path] | None, typer.Option(help="Races kept earlier; repeatable.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Where the races go, as lines of JSON.")] = None,
    of: Annotated[str | None, typer.Option(help="Rates; without it those of this processor.")] = None,
    unlisted: Annotated[float, typer.Option(help="Share of blocks that are like no model's.")] = 0.0,
    tune: Annotated[bool, typer.Option("--tune", help="Judge what cnnlstm_fast.tune chooses.")] = False,
    most: Annotated[float, typer.Option(help="Exit with 1 where the mean is more.")] = 1.05,
    models: Annotated[
        bool, typer.Option("--models", help="Race models too: accelerated, eager, channels-last eager.")
    ] = False,
    autocast: Annotated[bool, typer.Option("--autocast", help="Those under bfloat16 autocast.")] = False,
    output: Annotated[Path | None, typer.Option(help="Result file, as JSON.")] = None,
    one_thread: OneThread = False,
) -> None:
    """Race every plan of fresh random blocks: what choosing by prediction costs over knowing."""
    clock = _clock(one_thread)
    if races:
        raced = [one for path in races for one in calibration.read_races(path)]
    else:
        seed = seed if seed >= 0 else secrets.randbelow(2**31)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["CNNLSTM_FAST_CACHE"] = cache  # so that nothing is known yet
            raced = _race_plans(count, seed, [torch.float32], keep, clock, unlisted, tune)
    given = rates.here() if of is None else rates.read(of)
    report = Report.begin("regret")
    for mode in ("inference", "training"):
        for dtype in sorted({one.dtype for one in raced}):
            found = calibration.regret([r for r in raced if (r.mode, r.dtype) == (mode, dtype)], given)
            report.regrets.append(found)
            console.print(
                f"{mode}, {dtype}, {found.races} blocks by {given.name}: chosen over fastest "
                f"{found.mean:.3f}, at most {found.worst:.2f}; over PyTorch at most "
                f"{found.over_pytorch:.2f}; PyTorch alone {found.pytorch:.3f}"
            )
            for line in found.lines:
                console.print(f"  {line}", highlight=False)
    for name, mode in [(n, m) for n in MODELS if models for m in ("inference", "training")]:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["CNNLSTM_FAST_CACHE"] = cache
            ran = race_model(name, mode, seed=max(seed, 0), tune=tune, autocast=autocast, clock=clock)
        report.models.append(ran)
        console.print(ran.describe())
    if output is not None:
        report.write(output)
    if any(found.mean > most for found in report.regrets):
        raise typer.Exit(1)


def _finish(report: Report, path: Path | None, as_json: bool) -> None:
    if path is not None:
        report.write(path)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=1))
    else:
        show(report, console)
        if path is not None:
            console.print(f"written: {path}")
    if report.failures:
        raise typer.Exit(1)


@app.command()
def soak(
    steps: Annotated[int, typer.Option(min=80, help="Training steps.")] = 20000,
    seed: Annotated[int, typer.Option(help="Of the models, the shapes and the inputs.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON with memory and time at forty points.")] = None,
) -> None:
    """Train with changing shapes for long: memory flat, no slow-down, finite losses; else exits with 1."""
    with _progress() as progress:
        task = progress.add_task("soak", total=steps)
        result = run_soak(steps, seed, tell=lambda step: progress.update(task, completed=step + 1))
    mib = [b / 2**20 for b in result.bytes]
    console.print(
        f"{result.steps} steps of {result.shapes} shapes in {result.seconds:.0f} s; resident memory "
        f"{min(mib):.0f} to {max(mib):.0f} MiB, at the end {mib[-1]:.0f}; a fixed step "
        f"{result.step_ms[0]:.1f} ms of CPU time at first, {result.step_ms[-1]:.1f} at the end"
    )
    if output is not None:
        output.write_text(json.dumps(asdict(result), indent=1) + "\n")
    if result.failures:
        console.print("; ".join(result.failures))
        raise typer.Exit(1)


@app.command("gpu")
def on_gpu(
    work: Annotated[
        list[str] | None,
        typer.Option(help="A work, or the beginning of its name; repeatable. All without it."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="After so long, peers that take a while to prepare are left out.")
    ] = 360.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per race.")] = 9,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, or cpu to try this part out.")] = "cuda",
    folder: Annotated[
        Path | None, typer.Option(help="Where the result file goes; benchmarks/results/ without it.")
    ] = None,
) -> None:
    """Race blocks, recurrent layers and systems on a CUDA device; write a result file and a plot.

    Exits with 1 where a result was wrong.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here: --device cpu tries this part out")
    every = gpu_works.works()
    chosen = [w for name, w in every.items() if not work or any(name.startswith(p) for p in work)]
    if not chosen:
        raise typer.BadParameter(f"no work begins with {work}; there are: {', '.join(every)}")
    report = gpu.Report.begin(device)
    path = report.path(folder or gpu.FOLDER)
    small = {} if device.startswith("cuda") else {"copy_bytes": 1 << 20, "size": 64}
    gpu.run(
        report, chosen, device, seconds=seconds, rounds=rounds, seed=seed, size=small,
        tell=lambda line: print(line, flush=True), save=lambda r: r.write(path),
    )  # fmt: skip
    for when, r in zip(("before", "after"), report.rates, strict=True):
        products = ", ".join(f"{kind} {rate:.1f} TFLOP/s" for kind, rate in r.matmul_tflops.items())
        print(f"{when}: copies {r.copy_gbs:.0f} GB/s, {products}")
    print(f"written: {path}")
    if report.results:
        gpu.plot(report, path.with_suffix(".png"))
    if report.failures:
        raise typer.Exit(1)


@app.command("show")
def show_file(path: Path) -> None:
    """Print a result file's tables."""
    show(read(path), console)


@app.command()
def plot(
    path: Annotated[Path, typer.Argument(help="Result file.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the PNGs; beside the result file without it.")
    ] = None,
) -> None:
    """Draw a result file's ratios, growth curves and roofline as PNGs, each where it has any.

    Exits with 1 if there is nothing to draw.
    """
    from benchmarks.plot import plot_all

    with _progress() as progress:
        progress.add_task("drawing", total=None)
        written = plot_all(read(path), (output or path.parent) / path.stem)
    for target in written:
        console.print(f"written: {target}")
    if not written:
        console.print(f"{path} holds nothing to draw: run the benchmarks first")
        raise typer.Exit(1)


@app.command()
def publish() -> None:
    """Write the tables of README and docs, and their pictures, from the committed result files."""
    from benchmarks.publish import publish as write_all

    with _progress() as progress:
        for path in progress.track(write_all(), description="writing"):
            console.print(f"written: {path}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="torch")
    app()
