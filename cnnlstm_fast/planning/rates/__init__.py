"""How long one of each thing takes, by kind of processor, as ``python -m benchmarks calibrate`` writes it."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cnnlstm_fast import _ext

SCHEMA = 1
#: Files that stand in for others, by instruction set: where a make of processor has none of its own.
_NEAREST = {"avx512": "avx512-amd", "avx2": "avx2-amd", "baseline": "baseline"}
_MAKES = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}


class Rates(NamedTuple):
    """Nanoseconds by term of :mod:`cnnlstm_fast.planning.costs`, as a processor of this kind takes them.

    Attributes:
        name: of the file.
        device: the processor that was measured.
        threads: with which it was.
        plans: by dtype, plan and way (``"forward"`` or ``"backward"``).
    """

    name: str
    device: str
    threads: int
    plans: dict[str, dict[str, dict[str, dict[str, float]]]]

    def of(self, dtype: torch.dtype, plan: str) -> tuple[dict[str, float], dict[str, float]]:
        """Those of a plan, forward and backward."""
        ways = self.plans[str(dtype)[6:]][plan]
        return ways["forward"], ways["backward"]


def read(name: str) -> Rates:
    """The rates of a file of this folder, without its suffix.

    Raises:
        ValueError: the file is of another schema.
    """
    content: dict[str, Any] = json.loads((files(__name__) / f"{name}.json").read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{name}.json has schema {content.get('schema')}, expected {SCHEMA}")
    return Rates(name, content["device"], content["threads"], content["plans"])


def name_here() -> str:
    """The file that is this processor's own, whether or not there is one."""
    isa = torch.ops.cnnlstm_fast.isa() if _ext.loaded else "baseline"
    return isa if isa == "baseline" else f"{isa}-{make()}"


@lru_cache(maxsize=1)
def here() -> Rates:
    """Those of this machine: of its instruction set, and of its make where there are any."""
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
