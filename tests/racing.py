"""What the tests of the benchmarks share: small cases, short races, and faults."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import nn

from benchmarks.cases import Case, system


def quick() -> dict:
    """A short race on inputs of this test's own seed (conftest.py seeds ``random``)."""
    return {"rounds": 2, "turn_s": 0.0, "seed": random.randrange(10**6)}


def small(kind: str = "Simple", mode: str = "inference", **options) -> Case:
    case = system(kind, mode=mode, batch=3, frames=7, size=(8, 10), hidden=4, **options)
    return dataclasses.replace(case, peers=("eager", "chunked 16"))


def with_fast(case: Case, change) -> Case:
    """The case with its fast model changed by ``change(model)``."""

    def build():
        reference, fast = case.build()
        change(fast)
        return reference, fast

    return dataclasses.replace(case, build=build)


def no_clock(*args, **kwargs):
    pytest.fail("something was timed behind a red gate")


def scale_weight(model: nn.Module) -> None:
    conv = model.cnn if isinstance(model.cnn, nn.Conv2d) else model.cnn[0]
    with torch.no_grad():
        conv.weight *= 1 + 1e-4
