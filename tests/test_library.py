"""What the library's convolutions are given, where it has AMX: csrc/library_limits.h has the table."""

from __future__ import annotations

from forked import run_forked
from helpers import needs_extension

pytestmark = needs_extension

# Blocks of the plan `chunked` in bfloat16, forward and backward.
_BLOCKS = """
import sys, torch
from cnnlstm_fast.functional import conv_block
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
for n, c, co, groups, size, kernel, stride, padding, dilation in ({cases}):
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, activation=None)
    x = torch.randn(n, c, *size).bfloat16()
    weight, bias = torch.randn(co, c // groups, *kernel).bfloat16(), torch.randn(co).bfloat16()
    for channels_last in (False, True):
        if channels_last:
            x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        doubles = [t.detach().double().contiguous().requires_grad_() for t in (x, weight, bias)]
        out = conv_block(*leaves, plan="chunked", **options)
        true = conv_block(*doubles, plan="reference", **options)
        grad = torch.randn(out.shape).bfloat16()
        found = torch.autograd.grad(out, leaves, grad)
        wanted = torch.autograd.grad(true, doubles, grad.double())
        for mine, exact in zip((out, *found), (true, *wanted)):
            assert mine.dtype == torch.bfloat16 and mine.isfinite().all()
            error, norm = (mine.double() - exact).norm(), exact.norm()
            assert error <= 2 * torch.finfo(torch.bfloat16).eps * norm, (size, kernel, error, norm)
print("the end")
"""
#: n, c, c_out, groups, size, kernel, stride, padding, dilation
COLUMNS = {
    "input of one column": (2, 8, 33, 1, (12, 1), (3, 2), (3, 7), (1, 5), (1, 3)),
    "map of one column": (2, 15, 24, 1, (28, 7), (4, 4), (3, 4), (0, 0), (2, 1)),
    "map of one column, padded": (2, 1, 16, 1, (12, 4), (1, 5), (1, 3), (0, 1), (1, 1)),
    "depthwise": (2, 4, 16, 4, (4, 1), (3, 1), (3, 2), (1, 1), (1, 2)),
    "kernel longer than the image": (5, 8, 33, 1, (3, 7), (8, 8), (3, 1), (7, 4), (1, 1)),
    "kernel wider than the image": (2, 8, 17, 1, (12, 5), (1, 7), (1, 1), (0, 4), (1, 1)),
}
OTHERS = {
    "short kernel on a shorter image": (8, 64, 64, 1, (2, 32), (3, 3), (1, 1), (1, 1), (1, 1)),
    "signal": (2, 8, 16, 1, (1, 30), (1, 5), (1, 1), (0, 2), (1, 1)),
    "map of one row": (2, 32, 64, 1, (2, 26), (2, 2), (1, 1), (0, 0), (1, 1)),
    "image": (2, 16, 32, 1, (9, 14), (3, 3), (1, 1), (1, 1), (1, 1)),
}


def _given(cases: dict) -> str:
    """What the library said it was given, as if it had AMX."""
    code = _BLOCKS.replace("{cases}", "".join(f"{case}, " for case in cases.values()))
    code = f"import os; os.environ['ONEDNN_VERBOSE'] = '1'\n{code}"
    ran = run_forked(code, CNNLSTM_FAST_LIBRARY_ISA="amx")
    assert ran.stdout.endswith("the end\n"), f"exit status {ran.returncode}: {ran.stderr[-2000:]}"
    return "\n".join(line for line in ran.stdout.splitlines() if ",convolution," in line)


def test_amx_gets_no_columns_in_bfloat16():
    """It read what nobody had written; they are float32 on their way."""
    given = _given(COLUMNS)
    assert "bf16:" not in given and given.count("src:f32") == 2 * 3 * len(COLUMNS)


def test_amx_gets_all_else_as_it_is():
    given = _given(OTHERS)
    assert "src:bf16" in given and "src:f32" not in given


def test_amx_multiplies_plain_lstms_in_bfloat16():
    """Where our kernels use a lower unit than oneDNN; what oneDNN does not run stays ours."""
    code = """
import torch
import cnnlstm_fast as cf
x = torch.randn(5, 3, 8)
layers = cf.LSTM(8, 6), cf.LSTM(8, 6, bidirectional=True), cf.LSTM(8, 6, proj_size=3), cf.GRU(8, 6)
for dtype in (torch.bfloat16, torch.float32):
    print(*(cf.explain(layer.to(dtype), x.to(dtype)).stages[-1].plan for layer in layers))
"""
    lower = "import os; os.environ['ONEDNN_MAX_CPU_ISA'] = 'AVX512_CORE'"
    for before, isa, unit, expected in (
        ("", "amx", "avx512_bf16", "library library fused fused"),
        (lower, "", "avx512_bf16", "fused fused fused fused"),
        ("", "amx", "emulated_amx", "fused fused fused fused"),
    ):
        ran = run_forked(before + code, CNNLSTM_FAST_LIBRARY_ISA=isa, CNNLSTM_FAST_BFLOAT16=unit)
        assert ran.stdout.splitlines() == [expected, "fused fused fused fused"], ran.stderr[-2000:]


def test_amx_is_never_chosen_where_it_fails():
    """The plan for these is ours: PyTorch's convolution reads unwritten memory there, or crashes."""
    code = """
import torch, torch.nn.functional as F
from cnnlstm_fast.functional import conv_block
for n, c, co, groups, size, kernel, stride, padding, dilation in (CASES):
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    x, weight = torch.randn(n, c, *size), torch.randn(co, c // groups, *kernel)
    true = F.relu(F.conv2d(x.bfloat16().double(), weight.bfloat16().double(), **options))
    low = conv_block(x.bfloat16(), weight.bfloat16(), activation="relu", **options)
    with torch.autocast("cpu", torch.bfloat16):
        cast = [conv_block(x, weight, activation="relu", **options) for _ in range(2)]
    for found in (low, *cast):
        assert found.dtype == torch.bfloat16
        assert (found.double() - true).norm() <= 2 * torch.finfo(torch.bfloat16).eps * true.norm()
print("the end")
"""
    crashes = (3, 128, 16, 16, (1, 16), (3, 3), (2, 1), (3, 0), (2, 2))
    cases = "".join(f"{case}, " for case in (*COLUMNS.values(), crashes))
    ran = run_forked(code.replace("CASES", cases), CNNLSTM_FAST_LIBRARY_ISA="amx")
    assert ran.stdout == "the end\n", f"exit status {ran.returncode}: {ran.stderr[-2000:]}"
