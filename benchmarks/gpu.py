"""The GPU part: blocks, recurrent layers and whole systems on a CUDA device, against PyTorch's own ways.

As in the race on the CPU, nothing is timed before it is verified against float64, everyone runs in turn,
and ratios are paired within rounds. What differs: calls are timed by the device's events, several at a
time; rounds rotate among inputs that together exceed the device's cache; and what a call reaches is held
against the device's own copy bandwidth and matrix products, measured before and after in the same run.

Every part runs on the CPU too, which is how the tests run it; its figures mean nothing there.
"""

from __future__ import annotations

import copy
import datetime
import gc
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.gpu_works import DTYPES, Work
from benchmarks.race import OURS, Spread, WrongResult, errors, exceeding, paired_ratio
from benchmarks.results import FOLDER, commit

SCHEMA = 1
#: Inputs of a race together exceed the cache by this much, so that each round reads memory.
ROTATED_BYTES = 256 << 20
COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192


# ---------------------------------------------------------------- who runs it


def _eager(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return module


def _max_autotune(module: nn.Module) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(module, mode="max-autotune-no-cudagraphs", dynamic=False)


def _compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(module, dynamic=False)


OURS_COMPILED = f"{OURS}, compiled"

#: Name: (whether it runs our module, how it is prepared, whether that takes a while).
CONTESTANTS = {
    OURS: (True, _eager, False),
    "eager": (False, _eager, False),
    "channels_last": (False, _eager, False),
    "max-autotune": (False, _max_autotune, True),
    OURS_COMPILED: (True, _compiled, True),
}


class Runner:
    """A prepared contestant of a work."""

    def __init__(self, work: Work, name: str, module: nn.Module, prepare, device: str, dtype=None):
        self.work, self.name = work, name
        dtype = dtype or DTYPES[work.dtype]
        self.module = module.to(device=device, dtype=dtype).train(work.training)
        self.last = name == "channels_last"
        if self.last:
            self.module = self.module.to(memory_format=torch.channels_last)
        self.forward = prepare(self.module)

    def given(self, x: Tensor) -> Tensor:
        """An input as this contestant likes it, which nobody counts."""
        x = x.to(memory_format=torch.channels_last) if self.last else x
        return x.detach().requires_grad_(self.work.needs_x)

    def run(self, x: Tensor, grad: Tensor | None) -> Tensor:
        """One call; the gradient of the result is ``grad`` in training."""
        if not self.work.training:
            with torch.inference_mode():
                return self.forward(x)
        self.module.zero_grad(set_to_none=True)
        x.grad = None
        y = self.forward(x)
        y.backward(grad)
        return y

    def results(self, x: Tensor, grad: Tensor | None) -> dict[str, Tensor]:
        """What one call computes, by name, in float64."""
        x = self.given(x)
        found = {"output": self.run(x, grad).detach().double()}
        if self.work.training:
            found |= {
                f"gradient of {n}": p.grad.double()
                for n, p in self.module.named_parameters()
                if p.grad is not None
            }
        if self.work.needs_x:
            found["gradient of the input"] = x.grad.double()
        return found


# ---------------------------------------------------------------- measuring


class Clock:
    """Times calls on a device, and knows what they allocate."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self, calls: Callable[[], object]) -> float:
        """Milliseconds that ``calls`` takes from first to last kernel."""
        if not self.cuda:
            begin = time.perf_counter()
            calls()
            return (time.perf_counter() - begin) * 1e3
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        calls()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Bytes that ``call`` allocates at most beside what is there; None where nobody counts."""
        if not self.cuda:
            return None
        self.wait()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Rates:
    """What the device does: GB/s of a copy, read and written, and TFLOP/s of square products by kind."""

    copy_gbs: float
    matmul_tflops: dict[str, float]


def rates(device: str, copy_bytes: int = COPY_BYTES, size: int = MATMUL_SIZE, repeats: int = 9) -> Rates:
    """Measure a device by medians of ``repeats`` turns, on random values (zeros run faster)."""
    clock = Clock(device)

    def seconds(call) -> float:
        call()
        clock.wait()
        return median(clock.ms(call) for _ in range(repeats)) / 1e3

    source = torch.randn(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * copy_bytes / seconds(partial(target.copy_, source)) / 1e9
    del source, target
    found = {}
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for kind, dtype, precision in (
            ("float32", torch.float32, "ieee"),
            ("tf32", torch.float32, "tf32"),
            ("bfloat16", torch.bfloat16, "ieee"),
        ):
            torch.backends.cuda.matmul.fp32_precision = precision
            a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            found[kind] = 2 * size**3 / seconds(partial(torch.mm, a, b)) / 1e12
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return Rates(copied, found)


@dataclass(frozen=True)
class Standing:
    """How one contestant did: ms of a call, its time over ours, its largest error, and what it allocates."""

    name: str
    ms: Spread
    ratio: Spread
    error: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Result:
    """One work's race; ``left_out`` says who did not run and why."""

    work: str
    standings: list[Standing]
    left_out: dict[str, str]
    bytes: int
    flops: int
    seed: int
    rounds: int

    def standing(self, name: str) -> Standing:
        return next(s for s in self.standings if s.name == name)


def race(
    work: Work, device: str, *, seed: int, rounds: int = 9, turn_ms: float = 20.0, slow_peers: bool = True
) -> Result:
    """Verify everyone, then time everyone in turn; ``slow_peers`` lets those in that take a while to prepare.

    Raises:
        WrongResult: ours is further from float64 than the rule allows.
    """
    generator = torch.Generator().manual_seed(seed)
    reference, fast = work.build()
    x = work.draw(generator, device)
    exact = Runner(work, "float64", copy.deepcopy(reference), _eager, device, torch.float64)
    grad = None
    if work.training:
        with torch.no_grad():
            like = exact.forward(x.double())
        grad = torch.randn(like.shape, generator=generator).to(device, x.dtype)
    true = exact.results(x.double(), None if grad is None else grad.double())
    runners, found, left_out = [], {}, {}
    for name, (ours, prepare, slow) in CONTESTANTS.items():
        if name == "channels_last" and not work.images:
            left_out[name] = "the input is no batch of images"
        elif name == "max-autotune" and work.name.startswith("layer/"):
            left_out[name] = "torch.compile breaks its graph at every step of a plain layer"
        elif slow and not slow_peers:
            left_out[name] = "no time left to prepare it"
        else:
            try:
                runner = Runner(work, name, copy.deepcopy(fast if ours else reference), prepare, device)
                found[name] = errors(runner.results(x, grad), true)
                runners.append(runner)
            except Exception as error:  # a peer that cannot run is left out; we have to
                if name == OURS:
                    raise
                left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    _check(work, found)
    del exact, true
    sets = _inputs(work, generator, device, x, grad)
    times = _take_turns(runners, sets, Clock(device), rounds, turn_ms)
    standings = []
    for runner in runners:
        mine, (given, g) = times[runner.name], sets[0]
        given = runner.given(given)
        peak = Clock(device).peak_bytes(partial(runner.run, given, g))
        ratio = paired_ratio(mine, times[OURS])
        standings.append(
            Standing(runner.name, Spread.of(mine), ratio, max(found[runner.name].values()), peak)
        )
    return Result(work.name, standings, left_out, work.bytes, work.flops, seed, rounds)


def _check(work: Work, found: dict[str, dict[str, float]]) -> None:
    """Ours, compiled too, by the project's rule: twice PyTorch's worst way plus 16 eps of the true norm."""
    floor = 16 * torch.finfo(DTYPES[work.dtype]).eps
    ways = [found[name] for name in ("eager", "channels_last") if name in found]
    limits = {name: 2 * max(way[name] for way in ways) + floor for name in ways[0]}
    for name in (OURS, OURS_COMPILED):
        wrong = exceeding(found[name], limits) if name in found else None
        if wrong:
            raise WrongResult(f"{work.name}, {name}: {wrong}; not timed")


def _inputs(work: Work, generator, device: str, x: Tensor, grad: Tensor | None):
    """Pairs (input, gradient of the result) that together exceed the cache."""
    of_one = x.numel() * x.element_size() + (0 if grad is None else grad.numel() * grad.element_size())
    count = 2 if device == "cpu" else max(2, min(16, -(-ROTATED_BYTES // max(of_one, 1))))
    sets = [(x, grad)]
    while len(sets) < count:
        g = None if grad is None else torch.randn_like(grad)
        sets.append((work.draw(generator, device), g))
    return sets


def _take_turns(runners, sets, clock: Clock, rounds: int, turn_ms: float) -> dict[str, list[float]]:
    """Milliseconds of a call, by contestant and round; the order rotates from round to round."""
    times: dict[str, list[float]] = {runner.name: [] for runner in runners}
    given = {runner.name: [(runner.given(x), g) for x, g in sets] for runner in runners}

    def calls(runner: Runner, count: int) -> None:
        inputs = given[runner.name]
        for i in range(count):
            runner.run(*inputs[i % len(inputs)])

    counts = {}
    for runner in runners:
        calls(runner, 3)
        clock.wait()
        counts[runner.name] = max(1, int(turn_ms / max(clock.ms(partial(calls, runner, 1)), 1e-3)))
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            for runner in runners[r % len(runners) :] + runners[: r % len(runners)]:
                calls(runner, 1)
                clock.wait()
                count = counts[runner.name]
                times[runner.name].append(clock.ms(partial(calls, runner, count)) / count)
    finally:
        gc.enable()
    return times


# ---------------------------------------------------------------- what is left behind


@dataclass(frozen=True)
class Device:
    """Where it ran."""

    name: str
    capability: str
    memory_gib: float
    processors: int

    @classmethod
    def of(cls, device: str) -> Device:
        if not device.startswith("cuda"):
            return cls(platform.processor() or platform.machine(), "cpu", 0.0, 0)
        p = torch.cuda.get_device_properties(device)
        return cls(p.name, f"{p.major}.{p.minor}", round(p.total_memory / 2**30, 1), p.multi_processor_count)

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Report(results.ResultFile):
    """One run. ``rates`` were measured before and after; ``failures`` are works whose result was wrong."""

    device: Device
    versions: dict[str, str]
    commit: str
    date: str
    rates: list[Rates] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    @classmethod
    def begin(cls, device: str) -> Report:
        try:
            import triton

            found = triton.__version__
        except ImportError:
            found = "not installed"
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": found,
            "cuda": torch.version.cuda or "none",
            "cudnn": str(torch.backends.cudnn.version()),
        }
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return cls(Device.of(device), versions, commit(), now)

    def path(self, folder: Path = FOLDER) -> Path:
        return folder / f"{self.device.slug}.json"


def read(path: Path) -> Report:
    """:func:`benchmarks.results.read` of a file of this part."""
    return results.read(path, Report)


def run(
    report: Report,
    chosen: list[Work],
    device: str,
    *,
    seconds: float,
    rounds: int,
    seed: int,
    tell: Callable[[str], None] = lambda line: None,
    size: dict | None = None,
    save: Callable[[Report], None] = lambda report: None,
) -> None:
    """Race the works into ``report``; once ``seconds`` are over, peers that take a while are left out.

    ``save`` gets the report after every work, so that a run that is cut short leaves what it has.
    """
    begin = time.perf_counter()
    torch.backends.cudnn.benchmark = True
    report.rates.append(rates(device, **(size or {})))
    for at, work in enumerate(chosen):
        in_time = time.perf_counter() - begin < seconds
        try:
            result = race(work, device, seed=seed + at, rounds=rounds, slow_peers=in_time)
        except WrongResult as error:
            report.failures.append(str(error))
            tell(f"wrong: {error}")
        except Exception as error:  # the rest of the run on a rare machine is worth more than this one
            report.failures.append(f"{work.name}: {type(error).__name__}: {error}")
            tell(report.failures[-1])
        else:
            report.results.append(result)
            tell(line(result, report.rates[0]))
        save(report)
    report.rates.append(rates(device, **(size or {})))
    save(report)


def line(result: Result, rate: Rates) -> str:
    """A result in one line: our time, its share of what memory allows, and every ratio."""
    ours = result.standing(OURS)
    parts = [f"{result.work}: {ours.ms.p50:.3f} ms"]
    if result.bytes:
        gbs = result.bytes / ours.ms.p50 / 1e6
        parts.append(f"{gbs:.0f} GB/s, {gbs / rate.copy_gbs:.0%} of a copy")
    if result.flops:
        parts.append(f"{result.flops / ours.ms.p50 / 1e9:.1f} TFLOP/s")
    parts += [f"{s.name} {s.ratio.p50:.2f}x" for s in result.standings if s.name != OURS]
    if ours.peak_bytes:
        eager = result.standing("eager").peak_bytes
        parts.append(f"memory {ours.peak_bytes / 2**20:.0f} MiB, eager {eager / 2**20:.0f}")
    return "; ".join(parts)


def predictions(rate: Rates, chosen: list[Work]) -> str:
    """A table in Markdown of what each block must at least take on a device of these rates."""
    rows = ["| work | MB | GFLOP | by memory us | by arithmetic us |", "| --- | --- | --- | --- | --- |"]
    for work in chosen:
        if not work.bytes:
            continue
        kind = "bfloat16" if work.dtype == "bfloat16" else "tf32"
        by_bytes = work.bytes / rate.copy_gbs / 1e3
        by_flops = work.flops / rate.matmul_tflops[kind] / 1e6
        counts = f"{work.bytes / 1e6:.1f} | {work.flops / 1e9:.2f}"
        rows.append(f"| {work.name} | {counts} | {by_bytes:.0f} | {by_flops:.0f} |")
    return "\n".join(rows) + "\n"


def plot(report: Report, path: Path) -> None:
    """Write a PNG: a bar per peer and work, its time over ours.

    Raises:
        ValueError: the report holds no results.
    """
    if not report.results:
        raise ValueError("the report holds no results, so there is nothing to draw: run the benchmarks first")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    peers = [name for name in CONTESTANTS if name != OURS]
    figure, ax = plt.subplots(figsize=(9, 1 + 0.55 * len(report.results)))
    for at, result in enumerate(report.results):
        for s in result.standings:
            if s.name == OURS:
                continue
            y = at + 0.18 * (peers.index(s.name) - 1.5)
            ax.barh(y, s.ratio.p50, 0.16, color=f"C{peers.index(s.name)}", label=s.name if at == 0 else None)
    ax.axvline(1, color="#CC0000", lw=1)
    ax.set_xscale("log")
    ax.set_yticks(range(len(report.results)), [r.work for r in report.results], fontsize=7)
    ax.invert_yaxis()
    ax.legend(fontsize=7)
    ax.set_title(f"Time over {OURS}'s on {report.device.name}, torch {report.versions['torch']}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
