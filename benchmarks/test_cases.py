"""The cases as a pytest-benchmark suite: ``pytest benchmarks/``, with that plugin's options.

Every contestant of a case is verified before any of them is timed. The project's own figures come
from ``python -m benchmarks``, where contestants take turns within rounds; here each runs by itself.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from benchmarks.cases import CASES
from benchmarks.race import OURS, Verified

#: Those that need no minute of preparation.
CONTESTANTS = (OURS, "eager", "channels_last", "chunked 8")


@pytest.fixture(scope="module")
def verified():
    """By case name; made once for all contestants of a case, the last one only."""
    held: dict[str, Verified] = {}

    def get(name: str) -> Verified:
        if name not in held:
            held.clear()
            case = CASES[name]
            peers = tuple(p for p in case.peers if p in CONTESTANTS)
            held[name] = Verified(replace(case, peers=peers), random.randrange(2**31))
        return held[name]

    return get


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.quick])
def test_case(benchmark, verified, name, contestant):
    case = CASES[name]
    if contestant not in (OURS, *case.peers):
        pytest.skip(f"{contestant} is no peer of {name}")
    ready = verified(name)
    runner = next((c for c in ready.contestants if c.name == contestant), None)
    if runner is None:
        pytest.skip(f"left out: {ready.left_out[contestant]}")
    benchmark.group = name
    benchmark.extra_info["error"] = ready.errors[contestant]
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    batch = case.draw(generator, like=ready.like)
    runner.run(batch)
    benchmark(runner.run, batch)
