"""What is built and available on this machine, and how to mend what is not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from cnnlstm_fast import __version__, _ext
from cnnlstm_fast.planning import support

__all__ = ["Finding", "Report", "compile_kernels", "report"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: what was looked at.
        status: ``ok``, ``warning`` (works, but slower or at risk) or ``missing`` (does without).
        value: what was found.
        mend: what to do about it; empty where nothing is to be done.
    """

    name: str
    status: str
    value: str
    mend: str = ""


@dataclass(frozen=True)
class Report:
    """What :func:`cnnlstm_fast.doctor.report` found; ``str()`` is a table.

    Attributes:
        findings: a :class:`cnnlstm_fast.doctor.Finding` for each thing that was looked at.
    """

    findings: tuple[Finding, ...]

    def __getitem__(self, name: str) -> Finding:
        """The finding of that name.

        Args:
            name: of a :class:`cnnlstm_fast.doctor.Finding`.

        Raises:
            KeyError: nothing of that name was looked at.
        """
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(name)

    def __str__(self) -> str:
        names = max(len(f.name) for f in self.findings)
        states = max(len(f.status) for f in self.findings)
        lines = []
        for f in self.findings:
            lines.append(f"{f.status:<{states}}  {f.name:<{names}}  {f.value}")
            if f.mend:
                lines.append(f"{'':<{states}}  {'':<{names}}  -> {f.mend}")
        return "\n".join(lines)


def report() -> Report:
    """Look at the package, the machine and the process; changes nothing, takes milliseconds.

    Returns:
        A :class:`cnnlstm_fast.doctor.Report`. It raises nothing: what cannot be found out is a finding too.

    Example:
        >>> report = cf.doctor.report()
        >>> report["threads"].status in ("ok", "warning")
        True
        >>> print(report)  # doctest: +SKIP
    """
    return Report(
        (
            _versions(),
            _extension(),
            _compiler(),
            _instruction_set(),
            _threads(),
            _openmp(),
            _huge_pages(),
            _triton(),
            _cuda(),
        )
    )


def compile_kernels() -> list:
    """Compile every Triton kernel ahead of time for every supported GPU; needs no GPU.

    Returns:
        One record per kernel, variant and architecture: ``registers`` of a thread; ``shared`` memory and
        ``spills`` in bytes.

    Raises:
        ImportError: Triton is not installed.

    Example:
        >>> records = cf.doctor.compile_kernels()  # doctest: +SKIP
        >>> any(record.spills for record in records)  # doctest: +SKIP
        False
    """
    if not support.triton_available():
        raise ImportError("compiling the GPU kernels needs Triton: pip install triton")
    from cnnlstm_fast.kernels import aot

    return aot.compile_all()


def _versions() -> Finding:
    own = __version__ if _installed("cnnlstm-fast") else f"{__version__} (imported from a checkout)"
    value = f"cnnlstm_fast {own}, torch {torch.__version__}, Python {platform.python_version()}"
    return Finding("versions", "ok", f"{value}, {platform.machine()}")


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> Finding:
    if _ext.loaded:
        return Finding("CPU kernels", "ok", "loaded")
    mend = f"{_ext.mend} (CPU tensors run PyTorch's own operators until then)"
    return Finding("CPU kernels", "missing", str(_ext.error), mend)


def _compiler() -> Finding:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found:
        return Finding("C++ compiler", "ok", found)
    status, mend = ("ok", "") if _ext.loaded else ("missing", "install g++ or clang++, or set CXX")
    return Finding("C++ compiler", status, f"none of {', '.join(names)} found", mend)


def _instruction_set() -> Finding:
    cpu = torch.backends.cpu.get_cpu_capability()
    if not _ext.loaded:
        return Finding("instruction set", "missing", f"no kernels; PyTorch uses {cpu}")
    chosen, forced = torch.ops.cnnlstm_fast.isa(), os.environ.get("CNNLSTM_FAST_ISA")
    if forced:
        mend = "unset CNNLSTM_FAST_ISA to let the machine decide"
        return Finding("instruction set", "warning", f"{chosen} (CNNLSTM_FAST_ISA={forced})", mend)
    unit = torch.ops.cnnlstm_fast.bfloat16_unit()
    low = f", bfloat16 by {unit}" if unit else ""
    small = f", int8 by {torch.ops.cnnlstm_fast.int8_unit()}"
    return Finding("instruction set", "ok", f"{chosen}{low}{small}; PyTorch uses {cpu}")


def _threads() -> Finding:
    threads = torch.get_num_threads()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    value = f"{threads} of {usable} usable CPUs"
    if threads > usable:
        mend = f"torch.set_num_threads({usable}): threads that share a CPU wait for each other"
        return Finding("threads", "warning", value, mend)
    return Finding("threads", "ok", value)


def openmp_runtimes(maps: str) -> list[str]:
    """The OpenMP libraries in a process's memory map (the text of ``/proc/<pid>/maps``)."""
    paths = re.findall(r"(\S*/lib(?:gomp|iomp5|omp)\b[^/\s]*\.so\S*)", maps)
    return sorted({os.path.realpath(path) for path in paths})


def _openmp() -> Finding:
    try:
        found = openmp_runtimes(Path("/proc/self/maps").read_text())
    except OSError:
        return Finding("OpenMP", "ok", "unknown: this system has no /proc/self/maps")
    value = ", ".join(map(os.path.basename, found)) or "none"
    if len(found) > 1:
        mend = (
            "their thread pools spin against each other: find which package brings the second one "
            "along, or start with OMP_WAIT_POLICY=passive"
        )
        return Finding("OpenMP", "warning", value, mend)
    return Finding("OpenMP", "ok", value)


def _huge_pages() -> Finding:
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return Finding("huge pages", "missing", "this system has none: large fresh outputs cost page faults")
    mode = (re.findall(r"\[(\w+)\]", modes) or ["unknown"])[0]
    if mode == "never":
        mend = "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        return Finding("huge pages", "warning", "never: large fresh outputs cost page faults", mend)
    return Finding("huge pages", "ok", mode)


def _triton() -> Finding:
    needed = torch.cuda.is_available()
    if not support.triton_available():
        mend = "pip install triton (CUDA tensors run PyTorch's own operators until then)" if needed else ""
        return Finding("Triton", "missing", "not installed; only GPUs need it", mend)
    return Finding("Triton", "ok", _installed("triton") or "installed, version unknown")


def _cuda() -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("CUDA", "ok", ", ".join(names))
    built = torch.version.cuda
    return Finding("CUDA", "ok", "no device" if built else "no device; this torch is built without CUDA")
