"""The Triton kernels compiled ahead of time, without a device."""

from __future__ import annotations

import collections

import pytest
from forked import run_forked

pytest.importorskip("triton", reason="needs Triton")


def test_every_kernel_is_compiled_ahead_of_time():
    from cnnlstm_fast.kernels import aot, conv_block, conv_norm, recurrent

    launched = {
        launch.kernel for case in aot.CASES for dtype in case.dtypes for launch in aot.launches(case, dtype)
    }
    modules = conv_block, conv_norm, recurrent
    everything = [item for module in modules for item in vars(module).items()]
    assert launched == {kernel for name, kernel in everything if name.endswith("_kernel")}


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
