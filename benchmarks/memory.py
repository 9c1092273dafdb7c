"""Memory of training, by the process's resident memory, each figure in a process of its own.

- *kept*: what stays between forward and backward of the features stage: resident memory after the
  forward, less that before the input existed, less the output (which the next layer needs anyway).
  The input counts.
- *peak*: how far resident memory rises during one training step of the whole model (forward, loss,
  backward, SGD), input included, above what the process held before the input existed.

A small call beforehand loads code and threads. Free memory is handed back to the system before
every reading, so a figure holds what is in use (and whatever a library keeps for itself).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import CASES, Case
from benchmarks.peers import PEERS
from benchmarks.race import OURS, Contestant

SIDES = ("eager", OURS)


@dataclass(frozen=True)
class Memory:
    """One figure.

    Attributes:
        case: name of a training case: of the features stage for *kept*, of the model for *peak*.
        side: ``"eager"`` or ours.
        what: ``"kept"`` or ``"peak"``.
        bytes: the figure.
        output_bytes: of the result, not counted in *kept*.
    """

    case: str
    side: str
    what: str
    bytes: int
    output_bytes: int


def resident() -> int:
    """Bytes of this process in memory, after what is free went back to the system. Needs Linux and glibc."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}, so memory cannot be measured here")


def growth(make: Callable[[], object]) -> tuple[int, object]:
    """Bytes by which resident memory has grown once ``make`` is done, and its result, still held."""
    before = resident()
    held = make()
    return resident() - before, held


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes by which resident memory rises above its present level at the highest, while ``run`` runs."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run()
    return _status("VmHWM") - before


def contestant(case: Case, side: str) -> Contestant:
    reference, fast = case.build()
    model = fast if side == OURS else reference
    return Contestant(side, case, model, PEERS["eager"].prepare, torch.empty(0))


def measure_here(case: Case, side: str) -> Memory:
    """Measure in this process, which should be fresh."""
    runner = contestant(case, side)
    small = replace(case, shape=(2, *case.shape[1:]))
    like = small.forward(runner.model, torch.zeros(small.shape)).detach()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        runner.run(small.draw(generator, like=like))
    runner.model.zero_grad(set_to_none=True)
    output_bytes = like.numel() // 2 * case.shape[0] * like.element_size()
    if case.head is not None:
        peak = peak_growth(lambda: runner.run(case.draw(generator)))
        return Memory(case.name, side, "peak", peak, output_bytes)

    def forward() -> tuple[Tensor, Tensor]:
        x = torch.randn(case.shape, generator=generator)
        return x, runner.forward(x)

    grown, (_, y) = growth(forward)
    if not y.requires_grad:
        raise RuntimeError(f"{case.name}: the features keep nothing for a backward")
    return Memory(case.name, side, "kept", grown - output_bytes, output_bytes)


def measure(case: str, side: str) -> Memory:
    """Measure a case of :data:`benchmarks.cases.CASES` in a fresh process.

    Raises:
        RuntimeError: the process failed; the message holds the end of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.memory", case, side, str(torch.get_num_threads())]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {case} ({side}) failed: {done.stderr[-2000:]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure one memory figure in this fresh process.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(vars(measure_here(CASES[arguments.case], arguments.side))))
