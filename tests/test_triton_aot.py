"""The Triton kernels compiled ahead of time, without a device."""

from __future__ import annotations

import collections
import importlib
from typing import Any

import pytest
from forked import run_forked

triton = pytest.importorskip("triton", reason="needs Triton")


def test_every_kernel_is_compiled_ahead_of_time():
    from cnnlstm_fast.kernels import aot

    launched = {
        launch.kernel for case in aot.CASES for dtype in case.dtypes for launch in aot.launches(case, dtype)
    }
    assert launched == {f for name, f in _device_functions().items() if name.endswith("_kernel")}


def test_inductor_can_copy_every_kernel():
    """It copies a kernel and the device functions that it finds under their own names in its globals."""
    for function in _device_functions().values():
        found = function.fn.__globals__
        names = [name for name in function.fn.__code__.co_names if name in found]
        for name in names:
            called = found[name]
            is_device_function = isinstance(called, triton.JITFunction) and called.fn.__name__ == name
            assert called is triton.language or is_device_function, f"{function.fn.__name__} names {name}"


def _device_functions() -> dict[str, Any]:
    """All functions of the kernels that run on a device, by module and name."""
    package = "cnnlstm_fast.kernels"
    modules = ("common", "conv_block_kernels", "conv_norm_kernels", "epilogue_kernels", "recurrent_kernels")
    members = {m: vars(importlib.import_module(f"{package}.{m}")) for m in modules}
    everything = [(m, name, f) for m, found in members.items() for name, f in found.items()]
    return {f"{m}.{name}": f for m, name, f in everything if isinstance(f, triton.JITFunction)}


def test_ahead_of_time_compilation_needs_no_device():
    from cnnlstm_fast.kernels import aot

    case = aot.Case("small", (2, 3, 8, 8), 16, (3, 3), dtypes=("bfloat16",))
    records = aot.compile_all([case], [90])
    assert collections.Counter(record.kernel for record in records) == {  # with all choices of tiles
        "forward_kernel": 3, "grad_input_kernel": 3, "grad_weight_kernel": 2, "grad_bias_kernel": 1,
    }  # fmt: skip
    for record in records:
        assert record.arch == "sm_90a" and 16 <= record.registers <= 255 and record.spills == 0, record


def test_importing_the_package_imports_no_triton():
    code = "import sys, cnnlstm_fast; sys.exit('triton' in sys.modules)"
    assert run_forked(code).returncode == 0
