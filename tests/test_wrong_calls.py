"""The ops of the block, called directly with arguments that no plan would make."""

from __future__ import annotations

import json

from forked import run_forked
from helpers import needs_extension

_WRONG_CALLS = """
import json, sys, torch, cnnlstm_fast
torch.set_num_threads(2)
f, b = torch.ops.cnnlstm_fast.conv_block.default, torch.ops.cnnlstm_fast.conv_block_backward.default
BIG = 2**62

def forward(name, **change):
    a = dict(x=torch.randn(2, 4, 9, 8), weight=torch.randn(6, 4, 3, 3), bias=torch.randn(6),
             conv=[1, 1, 1, 1, 1, 1, 1], activation=1, act=[], pool=[2, 2, 2, 2, 0, 0, 1, 1, 0],
             order=[0, 1, 2, 3], plan=1, keep=True)
    return name, f, a | change

def backward(name, **change):
    _, _, a = forward("")
    out, codes, _ = f(**a)
    del a["bias"], a["keep"]
    a = dict(grad=torch.ones_like(out), codes=codes, need_x=True, need_weight=True, need_bias=True, **a)
    return name, b, a | change

def conv(*change):
    args = [1, 1, 1, 1, 1, 1, 1]
    args[change[0]] = change[1]
    return args

def pool(*change):
    args = [2, 2, 2, 2, 0, 0, 1, 1, 0]
    args[change[0]] = change[1]
    return args

def tensors_and_sizes(make):
    r = torch.randn
    yield make("x of rank 3", x=r(4, 9, 8))
    yield make("x of rank 5", x=r(1, 2, 4, 9, 8))
    yield make("x of rank 0", x=r(()))
    yield make("weight of rank 3", weight=r(6, 4, 3))
    yield make("weight of rank 1", weight=r(6))
    yield make("float64", x=r(2, 4, 9, 8).double(), weight=r(6, 4, 3, 3).double())
    yield make("int64 x", x=torch.ones(2, 4, 9, 8, dtype=torch.int64))
    yield make("uint8 x", x=torch.ones(2, 4, 9, 8, dtype=torch.uint8))
    yield make("complex x", x=r(2, 4, 9, 8, dtype=torch.complex64))
    yield make("weight of another dtype", weight=r(6, 4, 3, 3).bfloat16())
    yield make("sparse weight", weight=r(6, 4, 3, 3).to_sparse())
    yield make("too many channels", x=r(2, 5, 9, 8))
    yield make("too few channels", x=r(2, 3, 9, 8))
    yield make("no channels", x=r(2, 0, 9, 8), weight=r(6, 0, 3, 3))
    yield make("no output channels", weight=r(0, 4, 3, 3), bias=None) if make is forward else make(
        "no output channels", weight=r(0, 4, 3, 3))
    yield make("empty kernel", weight=r(6, 4, 0, 3))
    yield make("empty image", x=r(2, 4, 0, 8))
    yield make("image too small", x=r(2, 4, 1, 8), conv=[1, 1, 0, 0, 1, 1, 1])
    yield make("map too small for the pool", x=r(2, 4, 1, 8))
    for i in range(7):
        for value in (-1, -BIG, BIG, 2**31, 2**32 + 1):
            yield make(f"conv[{i}] = {value}", conv=conv(i, value))
        if i not in (2, 3):
            yield make(f"conv[{i}] = 0", conv=conv(i, 0))
    yield make("huge padding", conv=[1, 1, 2**28, 2**28, 1, 1, 1])
    yield make("groups that divide nothing", conv=conv(6, 5))
    yield make("groups of another count", conv=conv(6, 2))
    for wrong in ([], [1] * 6, [1] * 8, [1, 1, 1, 1, 1, 1, 1, 0, -1], [1] * 8 + [BIG], [1] * 1000):
        yield make(f"conv of {len(wrong)}", conv=wrong)
    for i in range(9):
        for value in (-1, -BIG, BIG, 2**31):
            if i != 8 or value < 0:
                yield make(f"pool[{i}] = {value}", pool=pool(i, value))
        if i not in (4, 5, 8):
            yield make(f"pool[{i}] = 0", pool=pool(i, 0))
    yield make("pool padding over half", pool=pool(4, 2))
    for wrong in ([2, 2], [2] * 8, [2] * 10):
        yield make(f"pool of {len(wrong)}", pool=wrong)
    yield make("window of 289", x=r(1, 4, 40, 40), pool=[17, 17, 1, 1, 0, 0, 1, 1, 0])
    yield make("window of 2**40", pool=[2**20, 2**20, 1, 1, 0, 0, 1, 1, 0])
    yield make("pool wider than the map", pool=[2, 200, 1, 1, 0, 0, 1, 1, 0])
    for wrong in ([], [0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4], [-1, 0, 1, 2], [0, 1, 2, 3, 4], [BIG] * 4):
        yield make(f"order {wrong}", order=wrong)
    for wrong in (-1, 10, BIG):
        yield make(f"activation {wrong}", activation=wrong)
    for wrong in (2, 3, 4):
        yield make(f"activation {wrong} without numbers", activation=wrong)
        yield make(f"activation {wrong} of three numbers", activation=wrong, act=[1.0, 2.0, 3.0])
    yield make("a ReLU of one number", act=[1.0])
    for wrong in (0, -1, 5, BIG):
        yield make(f"plan {wrong}", plan=wrong)
    yield make("plan fft with dilation", plan=4, conv=conv(4, 2))
    yield make("plan fft with groups", plan=4, conv=conv(6, 2), weight=torch.randn(6, 2, 3, 3))
    yield make("plan fft in bfloat16", plan=4, x=torch.randn(2, 4, 9, 8).bfloat16(),
               weight=torch.randn(6, 4, 3, 3).bfloat16())

def calls():
    r = torch.randn
    yield from tensors_and_sizes(forward)
    yield forward("bias of another length", bias=r(5))
    yield forward("bias of length 1", bias=r(1))
    yield forward("bias of rank 2", bias=r(6, 1))
    yield forward("bias of rank 0", bias=r(()))
    yield forward("bias of another dtype", bias=r(6).bfloat16())
    yield from tensors_and_sizes(backward)
    shape = backward("")[2]["codes"].shape
    codes = torch.zeros(shape, dtype=torch.uint8)
    yield backward("no codes", codes=codes[:0])
    yield backward("codes of rank 1", codes=torch.zeros(0, dtype=torch.uint8))
    yield backward("codes of half the batch", codes=codes[:1])
    yield backward("codes of another window", codes=codes.repeat(1, 1, 1, 1, 2))
    yield backward("codes of another dtype", codes=codes.to(torch.int32))
    yield backward("grad of another shape", grad=r(2, 6, 4, 5))
    yield backward("grad of rank 3", grad=r(6, 4, 4))
    yield backward("grad of another order", grad=r(2, 4, 4, 6))
    yield backward("grad of another dtype", grad=r(2, 6, 4, 4).double())
    yield backward("bfloat16 grad", grad=r(2, 6, 4, 4).bfloat16())

for plan in (1, 2):
    for name, fn, args in calls():
        print(plan, fn.__name__, name, end=": ", flush=True)
        if not name.startswith("plan"):
            args["plan"] = plan
        try:
            fn(**args)
            print("accepted", flush=True)
        except Exception as e:
            print("RuntimeError" if isinstance(e, RuntimeError) else type(e).__name__,
                  str(e).replace("\\n", " ")[:200], flush=True)
print("the end")
"""


@needs_extension
def test_wrong_calls_of_the_ops_never_crash():
    """In a process of their own, so that a crash is seen: each wrong call is a RuntimeError."""
    ran = run_forked(_WRONG_CALLS)
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0 and lines and lines[-1] == "the end", (
        f"exit status {ran.returncode} after {json.dumps(lines[-1:])}: {ran.stderr[-2000:]}"
    )
    refused = [line for line in lines[:-1] if not line.split(": ", 1)[1].startswith("RuntimeError")]
    assert not refused, "\n".join(refused)
