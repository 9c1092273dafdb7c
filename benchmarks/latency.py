"""Latency of frozen models: calls of 1, 4 and 16 inputs by a server, against the inference engines.

Every engine is prepared for each batch, as it is best. Engines take turns: a pause, uncounted calls, then a
share of the counted ones; so each meets the machine at the same times. Counting ends early where calls are
long; inputs larger than a server would take at a time are left out. A call ends when its result is released.
Each engine's result is compared with float64 first; ours by the numbers rule of the race, and one that fails
is not timed.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

import cnnlstm_fast as cf
from benchmarks import field
from benchmarks.cases import SYSTEMS, Case, of_the_field, system
from benchmarks.peers import PEERS, Forward, openvino
from benchmarks.race import OURS, PEER_ERROR, WrongResult

BATCHES = (1, 4, 16)
THREADS = (1, 4, 16)
#: Turns of each engine, and the pause before each, in which the others' threads stop spinning.
TURNS, PAUSE_S = 10, 0.02
ENGINES = (OURS, "accelerated", "eager", "inductor, frozen", "ONNX Runtime", "OpenVINO")
#: Those that compute in bfloat16, of float32 inputs and results.
LOW_OURS, LOW_OPENVINO = f"{OURS}, bfloat16", "OpenVINO, bfloat16"
#: Those that are ready in seconds, for a run of everything.
QUICK_ENGINES = (OURS, "eager", "ONNX Runtime", "OpenVINO")
#: How long the calls of one model at one batch are counted, all engines together.
SECONDS = 8.0
#: Elements of an input above which a batch is left out.
MOST_ELEMENTS = 2**25


@dataclass(frozen=True)
class Latency:
    """How one engine did.

    Attributes:
        model, engine, batch: what ran.
        p50, p99: milliseconds of a call; None where it did not run.
        why_not: why it did not run, or None.
        calls: how many were counted.
    """

    model: str
    engine: str
    batch: int
    p50: float | None = None
    p99: float | None = None
    why_not: str | None = None
    calls: int = 0


@dataclass(frozen=True)
class Throughput:
    """Calls a second of batch 1 that some Python threads make of one engine together."""

    model: str
    engine: str
    threads: int
    calls_per_second: float


def case_of(name: str, batch: int) -> Case:
    """A whole model in inference; ``batch`` of an agent counts games, each of 8 steps."""
    if name in SYSTEMS:
        return system(name, stage="model", batch=batch)
    case = of_the_field(name, "inference")
    shape = (8, batch, *case.shape[2:]) if name == "agent" else (batch, *case.shape[1:])
    return replace(case, shape=shape)


MODELS = (*SYSTEMS, *field.MODELS)


def batches_of(name: str, batches: Sequence[int] = BATCHES) -> list[int]:
    """The batches that a model is called with: not those whose inputs are too large."""
    return [b for b in batches if b == 1 or math.prod(case_of(name, b).shape) <= MOST_ELEMENTS]


def prepare(engine: str, case: Case, model: nn.Module, x: Tensor) -> Forward:
    """``x -> y`` of a copy of a plain model in eval mode."""
    model = copy.deepcopy(model)
    if engine == OURS:
        return cf.freeze(model, x)
    if engine == LOW_OURS:
        return cf.freeze(model, x, dtype=torch.bfloat16)
    if engine == "accelerated":
        fast = cf.accelerate(model)
        fast(x), fast(x)
        return fast
    if engine == "inductor, frozen":
        from torch._inductor import config

        torch._dynamo.reset()
        with config.patch(freezing=True):
            compiled = torch.compile(model, dynamic=False)
            compiled(x)
        return compiled
    case = replace(case, head=None, features=_whole)
    if engine == LOW_OPENVINO:
        return openvino(case, model, x, precision="bf16")
    why_not = PEERS[engine].why_not(case)
    if why_not:
        raise RuntimeError(why_not)
    return PEERS[engine].prepare(case, model, x)


def _whole(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _check(engine: str, forward: Forward, model: nn.Module, x: Tensor, true: Tensor) -> None:
    """Raise where a result is not right; ``true`` is that in float64."""
    norm = true.norm().item()
    error = (forward(x).double() - true).norm().item()
    low = engine in (LOW_OURS, LOW_OPENVINO)
    dtype = torch.bfloat16 if low else torch.float32
    own = (copy.deepcopy(model).to(dtype)(x.to(dtype)).double() - true).norm().item()
    allowed = 2 * own + 16 * torch.finfo(dtype).eps * norm if low or engine == OURS else PEER_ERROR * norm
    if not error <= allowed:
        raise WrongResult(f"{engine}: error {error:.2e} of {norm:.2e}, allowed {allowed:.2e}")


@torch.no_grad()
def engines_of(
    name: str, batch: int, engines: Sequence[str] = ENGINES
) -> tuple[Case, dict[str, Forward], list[Latency]]:
    """The engines that can run a model, checked, and why the others cannot."""
    case = case_of(name, batch)
    model, _ = case.build()
    model.eval()
    x = torch.randn(case.shape)
    true = copy.deepcopy(model).double()(x.double())
    ready, missing = {}, []
    for engine in engines:
        try:
            forward = prepare(engine, case, model, x)
            _check(engine, forward, model, x, true)
            ready[engine] = forward
        except WrongResult:
            if engine.startswith(OURS):
                raise
            missing.append(Latency(name, engine, batch, why_not="its result is wrong"))
        except Exception as error:  # whatever an engine cannot compile
            missing.append(Latency(name, engine, batch, why_not=str(error).splitlines()[0][:80]))
    return case, ready, missing


@torch.no_grad()
def measure(
    name: str, batch: int, calls: int = 1000, engines: Sequence[str] = ENGINES, seconds: float = SECONDS
) -> list[Latency]:
    """Latencies of one model at one batch, in turn, of so many calls or as many as the time allows."""
    case, ready, found = engines_of(name, batch, engines)
    times: dict[str, list[float]] = {engine: [] for engine in ready}
    inputs = [torch.randn(case.shape) for _ in range(4)]
    share, end = seconds / (TURNS * max(1, len(ready))), time.perf_counter() + seconds
    for turn in range(TURNS):
        if turn and time.perf_counter() > end:
            break
        order = list(ready)[turn % len(ready) :] + list(ready)[: turn % len(ready)]
        for engine in order:
            time.sleep(PAUSE_S)
            times[engine] += _timed(ready[engine], inputs, max(1, calls // TURNS), share)
    for engine, taken in times.items():
        p50, p99 = np.quantile(taken, (0.5, 0.99)) * 1e3
        found.append(Latency(name, engine, batch, float(p50), float(p99), calls=len(taken)))
    return found


def _timed(forward: Forward, inputs: list[Tensor], calls: int, seconds: float) -> list[float]:
    """Of so many calls, or fewer when the time is up; first two are not counted, or one that is long."""
    for x in inputs[:2]:
        begin = time.perf_counter()
        forward(x)
        if time.perf_counter() - begin > seconds:
            break
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < calls and (not taken or time.perf_counter() < end):
        start = time.perf_counter()
        result = forward(inputs[len(taken) % len(inputs)])
        del result
        taken.append(time.perf_counter() - start)
    return taken


@torch.no_grad()
def serve(
    name: str, engines: Sequence[str] = ENGINES, threads: Sequence[int] = THREADS, seconds: float = 2.0
) -> list[Throughput]:
    """Calls of batch 1 by several Python threads that share an engine, as a server's workers do."""
    case, ready, _ = engines_of(name, 1, engines)
    return [
        Throughput(name, engine, count, _calls_per_second(forward, case, count, seconds))
        for count in threads
        for engine, forward in ready.items()
        if engine != "OpenVINO"  # its request takes one call at a time
    ]


def _calls_per_second(forward: Callable, case: Case, count: int, seconds: float) -> float:
    done = [0] * count
    begin = threading.Barrier(count + 1)
    end = threading.Event()

    def work(at: int) -> None:
        x = torch.randn(case.shape)
        with torch.no_grad():
            forward(x)
            begin.wait()
            while not end.is_set():
                forward(x)
                done[at] += 1

    workers = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for worker in workers:
        worker.start()
    begin.wait()
    start = time.perf_counter()
    time.sleep(seconds)
    end.set()
    took = time.perf_counter() - start
    for worker in workers:
        worker.join()
    return sum(done) / took
