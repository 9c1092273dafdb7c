"""What a run leaves behind: a JSON file with everything needed to judge its figures."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
import types
import typing
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from benchmarks.blocks import BlockResult
from benchmarks.calibrate import Regret
from benchmarks.dispatch import Dispatch, Step
from benchmarks.growth import Point
from benchmarks.latency import Latency
from benchmarks.memory import Memory
from benchmarks.models import ModelRace
from benchmarks.race import Result
from benchmarks.roofline import Roofline
from benchmarks.trace import Trace
from cnnlstm_fast import _ext

SCHEMA = 1
FOLDER = Path(__file__).parent / "results"
_PACKAGES = ("torch", "onnxruntime", "openvino", "onnx", "numpy")


@dataclass(frozen=True)
class Device:
    """Where it ran: processor, usable cores, the instruction set of torch and that of our kernels.

    ``caches_kib`` holds the sizes of the first core's caches by level, those shared with other cores too.
    """

    cpu: str
    cores: int
    torch_isa: str
    our_isa: str
    memory_gib: float
    system: str
    caches_kib: dict[str, int] = field(default_factory=dict)

    @classmethod
    def here(cls) -> Device:
        ours = torch.ops.cnnlstm_fast.isa() if _ext.loaded else f"none: {_ext.error}"
        return cls(
            cpu=_cpu_name(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            torch_isa=torch.backends.cpu.get_cpu_capability(),
            our_isa=ours,
            memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
            system=f"{platform.system()} {platform.machine()}",
            caches_kib=_caches_kib(),
        )

    @property
    def slug(self) -> str:
        """For file names, as ``amd-epyc-9b45-2-cores-avx512``."""
        text = f"{self.cpu} {self.cores} cores {self.torch_isa}".lower()
        return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _caches_kib() -> dict[str, int]:
    """As Linux tells; elsewhere empty."""
    found = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = int(size.removesuffix("K"))
    return found


class ResultFile:
    """A dataclass of a run that is written as JSON; :func:`read` reads it."""

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Report(ResultFile):
    """One run.

    Attributes:
        device, versions, threads: where and with what.
        commit: of the project; ends in ``+changes`` where the tree was not clean.
        date: UTC, ISO 8601.
        mode: ``"quick"``, ``"full"``, ``"blocks"``, ``"regret"`` or ``"latency"``.
        roofline: measured before and after the races, in this order.
        failures: cases whose result was wrong, and so were not timed.
    """

    device: Device
    versions: dict[str, str]
    threads: int
    commit: str
    date: str
    mode: str
    roofline: list[Roofline] = field(default_factory=list)
    races: list[Result] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    dispatch: list[Dispatch] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    blocks: list[BlockResult] = field(default_factory=list)
    growth: list[Point] = field(default_factory=list)
    regrets: list[Regret] = field(default_factory=list)
    models: list[ModelRace] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    @classmethod
    def begin(cls, mode: str) -> Report:
        """A report on this machine, still empty."""
        return cls(
            device=Device.here(),
            versions={"python": platform.python_version(), **_versions()},
            threads=torch.get_num_threads(),
            commit=commit(),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            mode=mode,
        )

    @property
    def path(self) -> Path:
        """Where the file of such a run lies."""
        return FOLDER / f"{self.mode}-{self.device.slug}.json"


def read(path: Path, kind: type = Report):
    """Read a result file as a ``kind`` of report, whose default ``schema`` it must have.

    Raises:
        ValueError: it was written for another schema, or a field is missing, unknown or mistyped.
    """
    data = json.loads(path.read_text())
    found = data.get("schema") if isinstance(data, dict) else None
    if found != kind.schema:
        raise ValueError(
            f"{path.name} has schema {found!r}, expected {kind.schema}: run the benchmarks again"
        )
    return from_json(kind, data, path.name)


def from_json(kind, data, where: str):
    """``data`` as ``kind``: a dataclass, list, dict, union with None, or plain type.

    A field with a default may be missing: it is younger than the file.
    """
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        needed = {
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        if not isinstance(data, dict) or not needed <= set(data) <= set(hints):
            found = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"{where}: expected the fields {sorted(hints)}, got {found}")
        return kind(**{name: from_json(hints[name], data[name], f"{where}.{name}") for name in data})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        return from_json(next(a for a in args if a is not type(None)), data, where)
    if origin is list and isinstance(data, list):
        return [from_json(args[0], item, f"{where}[{i}]") for i, item in enumerate(data)]
    if origin is dict and isinstance(data, dict):
        return {k: from_json(args[1], v, f"{where}.{k}") for k, v in data.items()}
    if kind is float and type(data) is int:
        return float(data)
    if origin is None and type(data) is kind:
        return data
    raise ValueError(f"{where}: expected {kind}, got {data!r}")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The project's commit, ending in ``+changes`` where the tree is not clean; or ``"unknown"``."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=FOLDER.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
