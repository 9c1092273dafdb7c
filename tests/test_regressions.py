"""Faults that fuzzing, sanitizers, property tests or other versions of torch once found, by name."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from forked import run_forked
from helpers import SEED, Block, PoolCase, assert_block, decided, needs_extension, normal_tensors
from torch import nn

import cnnlstm_fast as cf
from cnnlstm_fast.functional import conv_block

pytestmark = needs_extension

forward = torch.ops.cnnlstm_fast.conv_block
backward = torch.ops.cnnlstm_fast.conv_block_backward


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gates_of_any_size_are_finite(kind):
    """A gate between -88.72 and -88.38 was NaN: e^x as infinity times less than one."""
    gates = {"LSTM": 4, "GRU": 3}[kind]
    x = torch.cat([torch.linspace(-130, 130, 26001), torch.linspace(-89, -88, 20001)])
    function = getattr(cf.functional, kind.lower())
    params = [torch.ones(gates, 1), torch.zeros(gates, 1), torch.zeros(gates), torch.zeros(gates)]
    state = torch.full((1, len(x), 1), 0.5)
    hx = (state, state) if kind == "LSTM" else state
    out, _ = function(x.view(1, -1, 1), hx, params, plan="fused")
    doubles = [p.double() for p in params]
    hx = (state.double(), state.double()) if kind == "LSTM" else state.double()
    true, _ = getattr(cf.reference, kind.lower())(x.double().view(1, -1, 1), hx, doubles)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), true, rtol=1e-6, atol=1e-7)


def _codes_case(pool, code):
    x, weight = torch.randn(1, 3, 6, 6), torch.randn(5, 3, 3, 3)
    conv = [1, 1, 1, 1, 1, 1, 1]
    out, codes, _ = forward(x, weight, None, conv, 1, [], pool, [0, 1, 2, 3], 1, True)
    return (
        torch.ones_like(out),
        x,
        weight,
        codes.fill_(code),
        conv,
        1,
        [],
        pool,
        [0, 1, 2, 3],
        1,
        True,
        True,
        True,
    )


@pytest.mark.parametrize("code", [0x00, 0x11, 0x99, 0xEE])
def test_codes_that_name_places_outside_are_refused(code):
    """The backward read and wrote at the places that saved winner codes name, whatever they were."""
    with pytest.raises(RuntimeError, match="names no position of the map"):
        backward(*_codes_case([3, 3, 2, 2, 1, 1, 1, 1, 0], code))


@pytest.mark.parametrize("code", [0x00, 0x33, 0xFF])
def test_codes_that_name_places_inside_are_taken(code):
    grads = backward(*_codes_case([2, 2, 2, 2, 0, 0, 1, 1, 0], code))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("padding", [2**31 - 1, 2**28, 2**24])
def test_a_huge_padding_is_refused_at_once(padding):
    """Looking at each of its pool windows in turn took minutes, and the sizes could overflow."""
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(5, 3, 3, 3)
    start = time.perf_counter()
    for plan in (1, 2):
        with pytest.raises(RuntimeError):
            conv, pool = [1, 1, padding, padding, 1, 1, 1], [2, 2, 3, 3, 0, 1, 2, 1, 1]
            forward(x, weight, None, conv, 1, [], pool, [0, 1, 2, 3], plan, True)
    assert time.perf_counter() - start < 5


def test_windows_meet_is_what_it_was():
    """The short way of finding windows without an element agrees with looking at all of them."""
    refused = taken = 0
    for size in (1, 2, 3, 5):
        for kernel in (1, 2, 3, 4):
            for stride in (1, 2, 3):
                for padding in range(kernel // 2 + 1):
                    for dilation in (1, 2, 5):
                        for ceil in (0, 1):
                            span = size + 2 * padding - dilation * (kernel - 1) - 1
                            windows = math.floor((span + ceil * (stride - 1)) / stride) + 1
                            if ceil and (windows - 1) * stride >= size + padding:
                                windows -= 1
                            if windows < 1:
                                continue
                            starts = [i * stride - padding for i in range(windows)]
                            meets = all(
                                any(0 <= s + j * dilation < size for j in range(kernel)) for s in starts
                            )
                            pool = [1, kernel, 1, stride, 0, padding, 1, dilation, ceil]
                            x, weight = torch.randn(1, 1, 1, size), torch.ones(1, 1, 1, 1)
                            try:
                                forward(
                                    x,
                                    weight,
                                    None,
                                    [1, 1, 0, 0, 1, 1, 1],
                                    0,
                                    [],
                                    pool,
                                    [0, 1, 2, 3],
                                    1,
                                    False,
                                )
                                assert meets, pool
                                taken += 1
                            except RuntimeError as error:
                                assert "meets no element" in str(error) and not meets, f"{error} {pool}"
                                refused += 1
    assert refused > 5 and taken > 100


@pytest.mark.parametrize("plan", ["direct", "chunked"])
@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2)], ids=["map", "pooled"])
def test_an_empty_batch_under_a_given_norm(plan, pool):
    """Divided by the number of images, and read gradients that nobody had made."""
    norm = nn.BatchNorm2d(4).eval()
    x, weight = torch.randn(0, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    out = conv_block(x, weight, norm=norm, pool=pool, plan=plan)
    assert out.shape == (0, 4, 6, 6) if pool is None else (0, 4, 3, 3)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any() and not norm.weight.grad.any() and not norm.bias.grad.any()


_COLUMNS = """
import torch
from cnnlstm_fast.functional import conv_block
for dtype in (torch.float32, torch.bfloat16):
    for n, c, co, groups, size, kernel, stride, padding, dilation in (
        (3, 5, 17, 1, (4, 1), (5, 1), (1, 2), (1, 1), (1, 3)),
        (2, 8, 33, 1, (12, 1), (3, 2), (3, 7), (1, 5), (1, 3)),
        (2, 4, 16, 4, (4, 1), (3, 1), (3, 2), (1, 1), (1, 2)),
        (2, 1, 16, 1, (12, 4), (1, 5), (1, 3), (0, 1), (1, 1)),
        (2, 1, 16, 1, (12, 2), (1, 3), (1, 2), (0, 1), (1, 1)),
        (1, 4, 16, 4, (7, 1), (2, 3), (3, 2), (0, 1), (1, 1)),
        (2, 8, 17, 1, (12, 1), (1, 5), (1, 3), (0, 2), (2, 1)),
    ):
        options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, activation=None)
        x = torch.randn(n, c, *size).to(dtype)
        weight = torch.randn(co, c // groups, *kernel).to(dtype)
        for channels_last in (False, True):
            if channels_last:
                x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            doubles = [t.detach().double().contiguous().requires_grad_() for t in (x, weight)]
            out = conv_block(*leaves, plan="chunked", **options)
            true = conv_block(*doubles, plan="reference", **options)
            grad = torch.randn(out.shape).to(dtype)
            found = torch.autograd.grad(out, leaves, grad)
            wanted = torch.autograd.grad(true, doubles, grad.double())
            for mine, exact in zip((out, *found), (true, *wanted)):
                error, norm = (mine.double() - exact).norm(), exact.norm()
                assert error <= 8 * torch.finfo(dtype).eps * (norm + 1), (size, kernel, dtype, error, norm)
print("the end")
"""


def test_maps_of_one_column():
    """The library's channels-last convolution of a map one column wide crashed, or read what nobody wrote."""
    ran = run_forked(_COLUMNS)
    assert ran.stdout.endswith("the end\n"), f"exit status {ran.returncode}: {ran.stderr[-2000:]}"


@pytest.mark.parametrize("groups", [1, 2])
def test_a_weight_whose_single_row_has_a_stride_of_its_own(groups):
    """The library took it for channels-last: wrong sums over groups, and no gradient."""
    x = torch.randn(2, 16 * groups, 12, 19)
    dense = torch.randn(4, 16, 1, 5).to(memory_format=torch.channels_last)
    weight = dense.as_strided(dense.shape, (80, 1, 320, 16))
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    doubles = [t.detach().double().contiguous().requires_grad_() for t in (x, dense)]
    out = conv_block(*leaves, groups=groups, plan="chunked")
    true = conv_block(*doubles, groups=groups, plan="reference")
    grad = torch.randn(out.shape)
    found = torch.autograd.grad(out, leaves, grad)
    wanted = torch.autograd.grad(true, doubles, grad.double())
    for mine, exact in zip((out, *found), (true, *wanted), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)


ONE_CHANNEL = {
    "activation": (nn.ReLU(),),
    "in place": (nn.ReLU(inplace=True),),
    "clamped": (nn.ReLU6(),),
    "norm": (nn.BatchNorm2d(1),),
    "activation, pool": (nn.ReLU(), nn.MaxPool2d(2)),
    "pool": (nn.MaxPool2d(2),),
    "norm, activation": (nn.BatchNorm2d(1), nn.Tanh()),
    "nothing": (),
}


@pytest.mark.parametrize("behind", ONE_CHANNEL)
@pytest.mark.parametrize("gradients", [True, False])
def test_one_channel_between_channels_last_blocks(behind, gradients):
    """A map of one channel lies both ways at once; what an activation makes of it is contiguous."""
    modules = [nn.Conv2d(2, 1, 1), *ONE_CHANNEL[behind], nn.Conv2d(1, 3, 1), nn.ReLU()]
    plain = nn.Sequential(*modules).to(memory_format=torch.channels_last).eval()
    ours = cf.Sequential(*plain)
    x = torch.randn(2, 2, 6, 8)
    with torch.set_grad_enabled(gradients):
        for given in (x, x.to(memory_format=torch.channels_last)):
            assert ours(given).stride() == plain(given).stride()


step = torch.ops.cnnlstm_fast.recurrent_stream_step


def _stream_call() -> dict:
    """One step of an LSTM of 5 inputs, 5 units, 2 sequences."""
    packed = torch.ops.cnnlstm_fast.recurrent_stream_pack(
        torch.randn(20, 5), torch.randn(20, 5), None, None, None, 0
    )
    return dict(
        x=torch.randn(2, 5), h=torch.randn(1, 2, 2, 16), c=torch.randn(1, 2, 16), packed=packed, reset=None,
        mode=0, hidden=5, width=5, step=0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["h", "c", "packed"])
def test_a_stream_refuses_memory_off_a_vector(name):
    """Whole vectors are read and written there: at another address that was a crash."""
    call = _stream_call()
    step(**call)
    given = call[name]
    call[name] = torch.zeros(given.numel() + 1)[1:].view(given.shape)
    with pytest.raises(RuntimeError, match="multiple of 64 bytes"):
        step(**call)


def test_a_stream_refuses_no_layers():
    """The result was memory that nobody had written."""
    nothing = dict(h=torch.zeros(0, 2, 2, 16), c=torch.zeros(0, 2, 16), packed=torch.zeros(0))
    with pytest.raises(RuntimeError, match="recurrent_stream"):
        step(**_stream_call() | nothing)


def test_a_stream_counts_from_any_number():
    """A negative step read and wrote before and behind the states."""
    call = _stream_call()
    copies = [{n: t.clone() if n in ("h", "c") else t for n, t in call.items()} for _ in range(2)]
    assert torch.equal(step(**copies[0] | {"step": -1}), step(**copies[1] | {"step": 1}))
    assert torch.equal(copies[0]["h"], copies[1]["h"])


_FUZZ = """
import json, sys
sys.path.insert(0, "tests/native")
import fuzz
print(json.dumps(fuzz.fuzz(60, 1500, {seed}, None)["of"]))
"""


@pytest.mark.first
def test_the_fuzzer_reaches_every_op():
    """It had gone on with arguments of an older schema: every call was refused, and none looked at."""
    of = json.loads(run_forked(_FUZZ.format(seed=SEED)).stdout)
    ops = {
        name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "cnnlstm_fast::" in name
    }
    without_tensors = {
        "isa", "fma_peak", "recycle_outputs", "limit", "conv_plans", "library_has_amx",
        "library_has_bfloat16", "bfloat16_unit", "bfloat16_peak", "int8_unit",
    }  # fmt: skip
    in_python = {"conv_fft", "conv_fft_backward", "holders"}
    programs = {"program_new", "program_run", "program_free"}  # tests/test_freeze_archive.py has crafted ones
    packed = {"frozen_conv", "frozen_conv_pack"}  # tests/test_frozen_conv.py has wrong calls
    copies = {"copy_contents", "same_contents"}  # tests/test_fusion_writes.py has wrong calls
    products = {"bfloat16_product"}  # tests/test_bfloat16.py has wrong calls
    assert of.keys() == ops - without_tensors - in_python - programs - packed - copies - products
    takes_nearly_all = {"fingerprint"}  # of tensors of any kind
    least = {op: 0 if op in takes_nearly_all else 5 for op in of}
    assert all(counts["accepted"] > 5 and counts["refused"] > least[op] for op, counts in of.items()), of


@pytest.mark.parametrize(
    "channels, kernel, stride, training",
    [(64, 3, 1, False), (64, 3, 2, True), (4, 5, 1, False), (4, 5, 1, True)],
)
def test_no_rule_asks_for_the_batch_of_an_exported_block(channels, kernel, stride, training):
    """Those of the plan fft and of small maps did, for blocks of any kind: the batch was no longer free."""
    conv = nn.Conv2d(channels, 64, kernel, stride=stride, padding=kernel // 2)
    model, batch = cf.Sequential(conv, nn.ReLU()), torch.export.Dim("batch", min=2, max=4096)
    with torch.set_grad_enabled(training):
        program = torch.export.export(model, (torch.randn(4, channels, 8, 8),), dynamic_shapes=({0: batch},))
        x = torch.randn(37, channels, 8, 8)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [21, 31])
def test_no_rule_asks_for_the_length_of_an_exported_signal(kernel):
    """That of the plan fft did, for kernels that it does not take; as does that of long kernels."""
    model = cf.Sequential(nn.Conv1d(16, 16, kernel, padding=kernel // 2), nn.ReLU()).eval()
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (torch.randn(4, 16, 40),), dynamic_shapes=({2: length},))
    x = torch.randn(4, 16, 3)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 64])
def test_no_rule_asks_for_the_size_of_exported_images(groups):
    """Those of depthwise planes and of odd maps did, and the check that something is left which is longer."""
    model = cf.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=groups), nn.ReLU()).eval()
    sizes = {2: torch.export.Dim("height", min=4, max=64), 3: torch.export.Dim("width", min=4, max=64)}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(4, 64, 32, 30),), dynamic_shapes=(sizes,))
        x = torch.randn(4, 64, 5, 7)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("training", [False, True])
def test_a_batch_first_result_lies_time_first(kind, training):
    """As PyTorch's does: heads take views of it, and dropout behind it draws in memory's order."""
    model = kind(16, 32, 2, batch_first=True, bidirectional=True).train(training)
    x = torch.randn(4, 20, 16)
    for layer in (cf.accelerate(model), getattr(cf, kind.__name__).like(model)):
        got, expected = layer(x)[0], model(x)[0]
        assert got.stride() == expected.stride()
        torch.testing.assert_close(got.transpose(0, 1).view(-1, 64), expected.transpose(0, 1).view(-1, 64))


def test_the_gradient_of_a_batch_first_input_lies_batch_first():
    """Otherwise the convolutions before it begin their backward with a copy."""
    x = torch.randn(4, 20, 16, requires_grad=True)
    seen = []
    y = x * 2
    y.register_hook(lambda grad: seen.append(grad.is_contiguous()))
    cf.LSTM(16, 32, batch_first=True)(y)[0].sum().backward()
    assert seen == [True]


@pytest.mark.parametrize("kernel, pool", [(1, None), (6, PoolCase((2,), (2,), (0,), (1,)))])
def test_the_weight_gradient_of_a_long_signal(kernel, pool):
    """It was one chain of float32 along the signal, without a pool three times as inexact as allowed."""
    activation = "gelu" if pool is None else "relu"
    block = Block(1, 16, (200_000,), 8, (kernel,), (1,), (0,), (1,), activation=activation, pool=pool)
    tensors = normal_tensors(block, torch.float32)
    grad = torch.randn(block.out_shape()) * decided(block, tensors)
    assert_block(block, tensors, grad, plan="direct")


_STRIDED_POINTWISE = """
import torch
from torch import nn
import cnnlstm_fast as cf

conv, block = nn.Conv2d(2, 64, 1, stride=2, bias=False), torch.randn(8, 2, 128, 128)
layers = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)
model = cf.accelerate(nn.Sequential(*layers, nn.Conv2d(12, 8, 1, stride=2), nn.BatchNorm2d(8), nn.ReLU()))
for _ in range(8):
    y = cf.functional.conv_block(block, conv.weight, stride=2, activation=nn.ReLU(), plan="chunked")
    grad = torch.randn_like(y)
    weight = conv.weight.detach().double().requires_grad_()
    torch.nn.functional.conv2d(block.double(), weight, stride=2).relu().backward(grad.double())
    found, = torch.autograd.grad(y, conv.weight, grad)
    torch.testing.assert_close(found.double(), weight.grad, rtol=1e-4, atol=1e-2)
    model(torch.randn(4, 1, 128, 128)).sum().backward()
    held = [torch.randn(size) for size in (1000, 100_000, 3000)]
"""


def test_the_weight_gradient_of_a_strided_pointwise_convolution():
    """oneDNN's, of channels-last maps of less than a vector of channels, wrote beyond its memory."""
    run = run_forked(_STRIDED_POINTWISE)
    assert run.returncode == 0, run.stderr[-2000:]


_WIDE_DEPTHWISE = """
import torch
from torch import nn
import cnnlstm_fast as cf
from cnnlstm_fast.planning import choose
for channels, kernel, width in ((16, 17, 100), (8, 15, 41), (16, 33, 100), (24, 13, 64)):
    weight = torch.randn(channels, 1, 1, kernel, dtype=torch.bfloat16, requires_grad=True)
    x = torch.randn(2, channels, 8, width, dtype=torch.bfloat16, requires_grad=True)
    for plan in ("chunked", "direct", "auto"):
        y = cf.functional.conv_block(x, weight, padding=(0, kernel // 2), groups=channels, plan=plan)
        true = nn.functional.conv2d(x.double(), weight.double(), None, 1, (0, kernel // 2), 1, channels)
        torch.testing.assert_close(y.double(), true.relu(), rtol=2e-2, atol=2e-2)
        y.sum().backward()
choose.GAIN_PERCENT = -(2**31)  # so that the first block hands its map on channels-last
model = cf.accelerate(nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, (1, 17), groups=16), nn.ReLU()
).bfloat16().eval())
with torch.no_grad():
    for _ in range(3):
        model(torch.randn(2, 3, 8, 100, dtype=torch.bfloat16))
print("the end")
"""


def test_a_depthwise_convolution_of_a_wide_kernel():
    """oneDNN's, of channels-last maps in bfloat16, never ended; contiguous ones do."""
    ran = run_forked(_WIDE_DEPTHWISE)
    assert ran.stdout == "the end\n", ran.stderr[-2000:]
