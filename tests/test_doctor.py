"""What the doctor sees."""

import os

import pytest
import torch
from forked import run_forked
from helpers import needs_extension

import cnnlstm_fast as cf
from cnnlstm_fast import doctor

NAMES = {
    "versions", "CPU kernels", "C++ compiler", "instruction set", "threads", "OpenMP", "huge pages", "Triton",
    "CUDA",
}  # fmt: skip


def elsewhere(**env) -> str:
    """The doctor's report in a fresh process with these environment variables."""
    code = "from cnnlstm_fast import doctor; print(doctor.report())"
    done = run_forked(code, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_report():
    report = doctor.report()
    assert {f.name for f in report.findings} == NAMES
    assert all(f.status in ("ok", "warning", "missing") for f in report.findings)
    text = str(report)
    for finding in report.findings:
        assert finding.value and finding.value in text and finding.mend in text
    assert torch.__version__ in report["versions"].value
    assert report["threads"].value.startswith(f"{torch.get_num_threads()} of ")
    with pytest.raises(KeyError):
        report["nothing"]


@needs_extension
def test_instruction_set():
    finding = doctor.report()["instruction set"]
    assert finding.value.startswith(torch.ops.cnnlstm_fast.isa())
    text = elsewhere(CNNLSTM_FAST_ISA="baseline")
    assert "baseline (CNNLSTM_FAST_ISA=baseline)" in text and "unset CNNLSTM_FAST_ISA" in text


def test_without_kernels():
    text = elsewhere(CNNLSTM_FAST_NO_EXTENSION="1")
    assert "missing" in text and "unset CNNLSTM_FAST_NO_EXTENSION" in text


def test_kernels_not_built(monkeypatch):
    monkeypatch.setattr(doctor._ext, "loaded", False)
    monkeypatch.setattr(doctor._ext, "error", "it has not been built")
    finding = doctor.report()["CPU kernels"]
    assert (finding.status, finding.value) == ("missing", "it has not been built")
    assert doctor._ext.mend in finding.mend
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor.report()["C++ compiler"].status == "missing"


def test_two_openmp_runtimes(monkeypatch):
    maps = """
7f00-7f01 r-xp 00000000 08:01 11 /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0
7f02-7f03 r--p 00000000 08:01 11 /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0
7f04-7f05 r-xp 00000000 08:01 12 /opt/env/lib/libiomp5.so
7f06-7f07 r-xp 00000000 08:01 13 /opt/env/lib/python/some.libs/libgomp-24e2ab19.so.1
7f08-7f09 r-xp 00000000 08:01 14 /usr/lib/libompi.so
7f0a-7f0b rw-p 00000000 00:00 0 [heap]
"""
    found = doctor.openmp_runtimes(maps)
    names = {os.path.basename(path) for path in found}
    assert names == {"libgomp-24e2ab19.so.1", "libgomp.so.1.0.0", "libiomp5.so"}
    assert doctor.openmp_runtimes("7f0a rw-p 0 [heap]\n") == []
    monkeypatch.setattr(doctor, "openmp_runtimes", lambda _: found)
    finding = doctor.report()["OpenMP"]
    assert finding.status == "warning" and "OMP_WAIT_POLICY" in finding.mend


def test_more_threads_than_cpus():
    torch.set_num_threads(len(os.sched_getaffinity(0)) + 1)  # conftest.py sets it back
    finding = doctor.report()["threads"]
    assert finding.status == "warning" and "torch.set_num_threads" in finding.mend


def test_huge_pages_never(monkeypatch):
    monkeypatch.setattr(doctor.Path, "read_text", lambda self: "always madvise [never]")
    finding = doctor._huge_pages()
    assert finding.status == "warning" and "madvise" in finding.mend


def test_compiling_gpu_kernels_without_triton(monkeypatch):
    monkeypatch.setattr(doctor.support, "triton_available", lambda: False)
    with pytest.raises(ImportError, match="pip install triton"):
        doctor.compile_kernels()
    assert doctor.report()["Triton"].status == "missing"


def test_import_is_light():
    code = (
        "import sys, cnnlstm_fast, cnnlstm_fast.doctor as d; d.report(); "
        "print([m for m in ('triton', 'rich', 'typer', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = run_forked(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_public_names():
    for name in cf.__all__:
        assert getattr(cf, name) is not None
