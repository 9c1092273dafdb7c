"""Rates by kind of processor: nanoseconds of one count, as ``python -m benchmarks calibrate`` writes them."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cnnlstm_fast import _ext

SCHEMA = 3
#: By instruction set, the file for processors of a make that has no file of its own.
_NEAREST = {"avx512": "avx512-amd", "avx2": "avx2-amd", "baseline": "baseline"}
_BY_AMX = " by amx"
_MAKES = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}


def kind(dtype: torch.dtype) -> str:
    """The name under which files have the rates of a dtype: with AMX, those of bfloat16 are others."""
    return str(dtype)[6:] + _BY_AMX * (dtype == torch.bfloat16 and library_has_amx())


@lru_cache(maxsize=1)
def library_has_amx() -> bool:
    """Whether PyTorch's library multiplies bfloat16 by AMX."""
    return _ext.loaded and torch.ops.cnnlstm_fast.library_has_amx()


class Rates(NamedTuple):
    """Nanoseconds of one count of each term of :mod:`cnnlstm_fast.planning.costs`, for a kind of processor.

    Attributes:
        name: of the file.
        device: the processor that was measured.
        threads: how many it ran with.
        plans: by :func:`kind` of dtype, plan and way (``"forward"`` or ``"backward"``).
        epilogues: by the same, by what runs the steps behind a convolution
            (:data:`cnnlstm_fast.planning.costs.PASSES`), and way.
        tilings: of the terms of :func:`cnnlstm_fast.ops.conv_fft.counts`, by which ``fft`` cuts its work.
    """

    name: str
    device: str
    threads: int
    plans: dict[str, dict[str, dict[str, dict[str, float]]]]
    epilogues: dict[str, dict[str, dict[str, dict[str, float]]]]
    tilings: dict[str, float]

    def of(self, dtype: torch.dtype, plan: str) -> tuple[dict[str, float], dict[str, float]]:
        """The rates of a plan's forward and backward."""
        ways = _of_dtype(self.plans, dtype)[plan]
        return ways["forward"], ways["backward"]

    def behind(self, dtype: torch.dtype, what: str) -> tuple[dict[str, float], dict[str, float]]:
        """The rates of what runs the steps behind a convolution, forward and backward."""
        ways = _of_dtype(self.epilogues, dtype)[what]
        return ways["forward"], ways["backward"]


def _of_dtype(given: dict[str, dict], dtype: torch.dtype) -> dict:
    plain = str(dtype)[6:]
    return given.get(kind(dtype)) or given.get(plain) or given[plain + _BY_AMX]


def read(name: str) -> Rates:
    """The rates of a file in this folder; ``name`` has no suffix.

    Raises:
        ValueError: the file is of another schema.
    """
    content: dict[str, Any] = json.loads((files(__name__) / f"{name}.json").read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{name}.json has schema {content.get('schema')}, expected {SCHEMA}")
    kinds = (content[kind] for kind in ("device", "threads", "plans", "epilogues", "tilings"))
    return Rates(name, *kinds)


def name_here() -> str:
    """The name of this processor's own file, which need not exist."""
    isa = torch.ops.cnnlstm_fast.isa() if _ext.loaded else "baseline"
    return isa if isa == "baseline" else f"{isa}-{make()}"


@lru_cache(maxsize=1)
def here() -> Rates:
    """The rates of this machine's instruction set, and of its make if there is a file for that."""
    name = name_here()
    return read(name if (files(__name__) / f"{name}.json").is_file() else _NEAREST[name.partition("-")[0]])


def make() -> str:
    """``"amd"``, ``"intel"`` or ``"other"``."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return _MAKES.get(line.split()[-1], "other")
    except OSError:
        pass
    return "other"
