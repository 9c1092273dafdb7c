"""Large outputs: recycled once nobody holds them, and never before."""

from __future__ import annotations

import copy
import pickle
import re
import resource
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import run_forked
from helpers import assert_close_as_torch
from torch import nn

import cnnlstm_fast as cf
from cnnlstm_fast import _ext
from cnnlstm_fast.functional import conv_block
from cnnlstm_fast.limits import limit
from cnnlstm_fast.ops import outputs

pytestmark = pytest.mark.skipif(not _ext.loaded, reason=f"the compiled kernels are missing: {_ext.error}")

ROOT = Path(__file__).resolve().parents[1]
POOL = nn.MaxPool2d(2)


#: Images whose outputs are 48 and 6 MiB: more than the C library keeps mapped, and more than it keeps at all.
sizes = pytest.mark.parametrize("images", [1024, 128])


def large(x, w):
    return conv_block(x, w, padding=1, pool=POOL, layout="features", plan="direct")


def inputs(images=1024):
    return torch.randn(images, 1, 28, 28), torch.randn(64, 1, 3, 3)


@sizes
def test_what_somebody_holds_is_never_overwritten(images):
    x, w = inputs(images)
    first = large(x, w)
    copy, view = first.clone(), first[100:, 5:].detach()
    del first
    others = [large(-x, w) for _ in range(2)]
    assert all(o.untyped_storage().data_ptr() != view.untyped_storage().data_ptr() for o in others)
    assert torch.equal(view, copy[100:, 5:])


@sizes
def test_what_nobody_holds_is_used_again(images):
    x, w = inputs(images)
    first = large(x, w)
    at, expected = first.data_ptr(), first.clone()
    del first
    again = large(x, w)
    assert again.data_ptr() == at
    assert torch.equal(again, expected)


def test_idle_memory_is_bounded():
    x, w = inputs()
    held = [large(x, w) for _ in range(12)]
    del held
    with open("/proc/self/smaps_rollup") as smaps:
        before = int(next(line for line in smaps if line.startswith("Rss")).split()[1])
    held = [large(x, w) for _ in range(12)]
    del held
    with open("/proc/self/smaps_rollup") as smaps:
        after = int(next(line for line in smaps if line.startswith("Rss")).split()[1])
    assert after - before < 64 * 1024  # KiB: twelve outputs are 588 MiB


def test_threads_get_memory_of_their_own():
    x, w = inputs()
    expected, wrong = large(x, w), []

    def work():
        for _ in range(5):
            if not torch.equal(large(x, w), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_large_results_in_half_precision(kind):
    """What a bfloat16 layer keeps in float32 is twice as long as its inputs are."""
    module = getattr(nn, kind)(64, 128).to(torch.bfloat16)
    ours, wide = cf.accelerate(module), copy.deepcopy(module).double()
    x = torch.randn(128, 32, 64).bfloat16()
    leaves = [t.clone().requires_grad_() for t in (x, x)] + [x.double().requires_grad_()]
    results = [m(leaf)[0] for m, leaf in zip((ours, module, wide), leaves, strict=True)]
    grad = torch.randn(results[0].shape).bfloat16()
    for result in results:
        result.backward(grad.to(result.dtype))
    assert_close_as_torch(*results, "output")
    assert_close_as_torch(*(leaf.grad for leaf in leaves), "gradient")


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_large_results_under_autocast(kind):
    module = getattr(nn, kind)(64, 128)
    x = torch.randn(128, 32, 64)
    true = copy.deepcopy(module).double()(x.double())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, ours = module(x)[0], cf.accelerate(module)(x)[0]
    assert_close_as_torch(ours, [plain, plain.float().to(ours.dtype)], true)


#: Calls whose tensors have sizes without memory behind them, or whose products of sizes overflow 64 bits.
_ABSURD = """
import torch, cnnlstm_fast
ops = torch.ops.cnnlstm_fast

def sized(*size, dtype=torch.float32):
    try:
        return torch.zeros([1] * len(size), dtype=dtype).expand(size)
    except (RuntimeError, TypeError):  # PyTorch itself has no such tensor
        return None

def conv(n=1, c=1, co=1, h=3, w=3, plan=1, **more):
    return dict(x=sized(n, c, h, w), weight=sized(co, c, 3, 3), conv=[1, 1, 1, 1, 1, 1, 1], activation=0,
                act=[], pool=[], order=[0, 1, 2, 3], plan=plan, **more)

def layer(steps=1, batch=1, inputs=1, hidden=1, batch_first=False, mode=0):
    gates = 4 if mode == 0 else 3
    size = (batch, steps, inputs) if batch_first else (steps, batch, inputs)
    given = dict(x=sized(*size), w_ih=sized(gates * hidden, inputs), w_hh=sized(gates * hidden, hidden))
    names = "h0 c0 b_ih b_hh w_hr w_ih_r w_hh_r b_ih_r b_hh_r w_hr_r reset lengths".split()
    return dict.fromkeys(names) | given | dict(mode=mode, batch_first=batch_first)

def calls():
    for big in (2**41 + 1, 2**42 + 2, 2**58 + 2**17, 2**62):
        few = torch.zeros(1, 1, 1)
        yield "add_products", dict(grad=few, x=sized(big, 1, 1), out=sized(1, 1, big, 1))
        yield "add_products", dict(grad=sized(1, 1, big), x=few, out=sized(1, big, 1, 1))
        yield "add_products", dict(grad=sized(1, big, 1), x=sized(1, big, 1), out=sized(big, 1, 1, 1))
        yield "add_products", dict(grad=sized(big, 1, 1), x=sized(big, 1, 1), out=sized(1, 1, 1, 1))
        for at in range(6):
            size = [big if i == at else 1 for i in range(6)]
            matrix = sized(size[3], 1)
            out = [1 if i == 3 else s for i, s in enumerate(size)]
            yield "transform_windows", dict(x=sized(*size), matrix=matrix, out=sized(*out), add=False)
        yield "new_spectra", dict(like=few, size=[big, 1])
        for batch_first in (False, True):
            for which in ("steps", "batch", "inputs", "hidden"):
                for mode in (0, 1):
                    given = layer(**{which: big}, batch_first=batch_first, mode=mode)
                    yield "recurrent_layer", dict(**given, keep=False)
                    yield "recurrent_layer", dict(**given, keep=True)
        for plan in (1, 2, 3, 4):
            for which in ("n", "c", "co", "h", "w"):
                given = conv(**{which: big}, plan=plan)
                yield "conv_block", dict(**given, bias=None, keep=True)
                norm = dict.fromkeys("bias gamma beta mean var".split())
                yield "conv_norm_block", dict(**given, **norm, eps=1e-5, keep=True, keep_map=False)
                grad = sized(*(big if which == name else 1 for name in ("n", "co")),
                             *(big if which == name else 3 for name in ("h", "w")))
                needs = dict(need_x=plan % 2 == 0, need_weight=True, need_bias=True)
                codes = torch.empty(0, dtype=torch.uint8)
                yield "conv_block_backward", dict(**given, grad=grad, codes=codes, **needs)
        yield "fold_norm", dict(weight=sized(1, big, 1, 1), bias=None, gamma=None, beta=None,
                                mean=torch.zeros(1), var=torch.ones(1), eps=1e-5)
    # Every tensor has a size that a machine may have; what would be made of them has not.
    yield "patch_moments", dict(x=sized(1, 2**24, 3, 3), weight=sized(1, 2**24, 3, 3),
                                conv=[1, 1, 1, 1, 1, 1, 1])
    yield "conv_block", dict(conv(n=2**38, h=1, w=1), bias=None, weight=sized(64, 1, 3, 3), keep=False)
    yield "recurrent_layer", dict(**layer(steps=2**36), keep=True)

for op, given in calls():
    schema = getattr(ops, op).default._schema.arguments
    given = {a.name: given.get(a.name, a.default_value) for a in schema}
    if any(given[a.name] is None and "Optional" not in str(a.type) for a in schema):
        continue
    try:
        getattr(ops, op).default(**given)
        print(op, {k: tuple(v.shape) for k, v in given.items() if hasattr(v, "shape")}, "was accepted")
    except RuntimeError as error:
        if "memory for" in str(error) or "call failed" in str(error):
            print(op, "too late:", error)
print("the end")
"""


def test_absurd_sizes_are_refused_before_anything_is_allocated():
    ran = run_forked("import resource; resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))\n" + _ABSURD)
    assert ran.returncode == 0 and ran.stdout == "the end\n", (
        f"{ran.returncode}: {ran.stdout[-3000:]}{ran.stderr[-2000:]}"
    )


def test_memory_that_runs_out_is_an_error():
    """In any thread, and in a team that waits for each other."""
    code = """
import faulthandler, resource, torch, cnnlstm_fast as cf
faulthandler.dump_traceback_later(90, exit=True)
torch.set_num_threads(2)
torch.manual_seed(0)
x, w = torch.randn(4, 64, 40, 40), torch.randn(70, 64, 3, 3)
lstm, steps = cf.LSTM(700, 700), torch.randn(3, 2, 700)


def conv(plan):
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = cf.functional.conv_block(a, b, padding=1, activation="relu", pool=torch.nn.MaxPool2d(2), plan=plan)
    y.sum().backward()
    return [y.detach(), a.grad, b.grad]

def recurrent():
    y, _ = lstm(steps)
    y.sum().backward()
    return [y.detach()]

calls = [lambda p=p: conv(p) for p in ("direct", "winograd", "chunked")] + [recurrent]
expected = [call() for call in calls]
outcomes = {True: 0, False: 0}
with open("/proc/self/statm") as f:
    used = int(f.read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
for kib in [2**i for i in range(4, 18)] + [3 * 2**i for i in range(4, 18)]:
    for i, call in enumerate(calls):
        resource.setrlimit(resource.RLIMIT_AS, (used + kib * 1024, hard))
        try:
            found = call()
        except (RuntimeError, MemoryError):
            found = None
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        outcomes[found is not None] += 1
        if found is not None:
            for f, e in zip(found, expected[i]):
                assert torch.allclose(f, e, rtol=1e-3, atol=1e-3)
print(outcomes)
"""
    ran = run_forked(code, CNNLSTM_FAST_SCRATCH_BYTES="0", CNNLSTM_FAST_SHARED_WEIGHTS="1")
    assert ran.returncode == 0, f"{ran.returncode}: {ran.stdout[-2000:]}{ran.stderr[-3000:]}"


def test_fork_while_others_allocate():
    code = """
import os, signal, threading, time, torch, cnnlstm_fast
torch.set_num_threads(1)
new, like = torch.ops.cnnlstm_fast.new_spectra.default, torch.zeros(1)

def work():
    while True:
        new(like, [2**20])

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
end, children = time.monotonic() + 3, 0
while time.monotonic() < end:
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that hangs dies of it
        for _ in range(3):
            new(like, [2**20])
        os._exit(0)
    children += 1
    _, status = os.waitpid(child, 0)
    if status:
        print("child", children, "ended with", status, flush=True)
        os._exit(1)
print(children, flush=True)
os._exit(0)
"""
    ran = run_forked(code)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]


# ---------------------------------------------------------------- results as PyTorch's


def results() -> dict[str, Callable[[], torch.Tensor]]:
    """Large results of every op and gradients."""
    images, weight = torch.randn(160, 3, 32, 32), torch.randn(32, 3, 3, 3)
    steps, lstm, gru = torch.randn(400, 64, 48), cf.LSTM(48, 128), cf.GRU(48, 128)
    normed = cf.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))

    def gradient(fn, x):
        leaf = x.clone().requires_grad_()
        fn(leaf).sum().backward()
        return leaf.grad

    def block(x, plan="direct", **more):
        return conv_block(x, weight, padding=1, plan=plan, **more)

    wide = torch.randn(160, 3, 64, 64)
    return {
        **{plan: lambda plan=plan: block(images, plan) for plan in ("direct", "chunked", "winograd", "fft")},
        "bfloat16": lambda: conv_block(images.bfloat16(), weight.bfloat16(), padding=1, plan="direct"),
        "norm": lambda: normed(images).detach(),
        "gradient of an input": lambda: gradient(block, wide),
        "gradient through a norm": lambda: gradient(normed, wide),
        "LSTM": lambda: lstm(steps)[0].detach(),
        "GRU": lambda: gru(steps)[0].detach(),
        "gradient through time": lambda: gradient(lambda x: lstm(x)[0], steps),
    }


@pytest.mark.parametrize("which", results())
def test_results_are_resized_and_emptied_as_pytorchs(which):
    make = results()[which]
    result = make()
    assert result.numel() * result.element_size() >= 2**22
    expected = result.clone()
    storage = result.untyped_storage()
    assert storage.resizable() and storage.nbytes() == result.numel() * result.element_size()
    size = storage.nbytes()
    storage.resize_(0)  # as FSDP empties what it can make again
    assert storage.nbytes() == 0
    other = make()
    storage.resize_(size)
    result.copy_(expected)
    assert torch.equal(other, make()) and torch.equal(result, expected)
    result.resize_(2 * result.numel())[expected.numel() :] = 7
    assert torch.equal(
        result[: expected.numel()].view(expected.shape), expected.flatten().view(expected.shape)
    )
    out = make()
    torch.cat([expected, expected], out=out.resize_(0))
    assert torch.equal(out, torch.cat([expected, expected]))
    emptied = make()
    emptied.set_()
    assert emptied.numel() == 0
    assert torch.equal(pickle.loads(pickle.dumps(other)), other)


@sizes
def test_whoever_holds_a_result_keeps_it(images):
    """Views, storages, arrays, capsules, saved tensors, shared memory and weak references alike."""
    x, w = inputs(images)
    expected = large(x, w)
    holders = {
        "view": lambda y: y[3:],
        "detached": lambda y: y.detach(),
        "data": lambda y: y.data,
        "storage": lambda y: y.untyped_storage(),
        "weak reference": lambda y: weakref.ref(y.untyped_storage()),
        "array": lambda y: y.numpy(),
        "memory view": lambda y: memoryview(y.numpy()),
        "capsule": torch.utils.dlpack.to_dlpack,
        "saved": lambda y: (y.requires_grad_() * y).sum(),
        "closure": lambda y: lambda: y,
        "shared": lambda y: y.share_memory_(),
        "set": lambda y: torch.empty(0).set_(y),
        "other type": lambda y: y.view(torch.int32),
    }
    held = {name: hold(large(x, w)) for name, hold in holders.items()}
    for _ in range(2):
        others = [large(-x, w) for _ in range(len(holders))]
        del others
    assert torch.equal(held["view"], expected[3:])
    for name in ("detached", "data", "shared", "set"):
        assert torch.equal(held[name], expected), name
    assert torch.equal(torch.empty(0).set_(held["storage"], 0, expected.shape), expected)
    assert held["weak reference"]() is None or torch.equal(
        torch.empty(0).set_(held["weak reference"](), 0, expected.shape), expected
    )
    assert torch.equal(torch.from_numpy(held["array"]), expected)
    assert torch.equal(
        torch.frombuffer(held["memory view"].cast("B"), dtype=torch.float32), expected.flatten()
    )
    assert torch.equal(torch.from_dlpack(held["capsule"]), expected)
    assert torch.equal(held["closure"](), expected)
    assert torch.equal(held["other type"].view(torch.float32), expected)


def test_a_result_is_of_the_mode_it_is_made_in():
    x, w = inputs(128)
    with torch.inference_mode():
        assert large(x, w).is_inference()
    plain = conv_block(x, w, padding=1, pool=POOL, plan="direct")
    assert not plain.is_inference() and plain._version == 0 and plain._base is None
    del plain
    with torch.inference_mode():
        assert large(x, w).is_inference()


def test_an_interrupt_comes_when_the_op_is_done(monkeypatch):
    x, w = inputs(128)
    expected = large(x, w)
    kept = expected.clone()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs, "_state", interrupted)
    found = None  # and None it stays where the interpreter looks before it has a name
    with pytest.raises(KeyboardInterrupt):
        found = large(x, w)
        for _ in range(1000):  # until the interpreter looks
            time.sleep(0.001)
    monkeypatch.undo()
    for result in (found, large(x, w)):
        assert result is None or torch.equal(result, kept)


def test_pages_are_not_cleared_again():
    """As many page faults as the whole output takes would cost as much as the convolution."""
    x, w = inputs(1024)
    for _ in range(3):
        large(x, w)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        large(x, w)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 4 * 1000  # an output has 12,000 pages of 4 KiB


# ---------------------------------------------------------------- fences


@pytest.mark.parametrize(
    "harm, ended",
    [
        ("", 0),
        ("at[16] = 1", -signal.SIGSEGV),  # beyond the last cache line
        ("at[7] = 1", -signal.SIGABRT),  # in the last cache line, beyond the buffer
        ("at[-1] = 1", -signal.SIGABRT),
        ("at[-1023] = 1", -signal.SIGSEGV),
        ("del buffer; at[0] = 1", -signal.SIGSEGV),  # given back
    ],
)
def test_an_overrun_of_a_buffer_is_reported(harm, ended):
    code = f"""
import ctypes, torch, cnnlstm_fast
buffer = torch.ops.cnnlstm_fast.new_spectra(torch.zeros(1), [7])
assert buffer.isnan().all()
at = ctypes.cast(buffer.data_ptr(), ctypes.POINTER(ctypes.c_float))
at[6] = 1
{harm}
"""
    ran = run_forked(code, CNNLSTM_FAST_FENCES="1", CNNLSTM_FAST_POOL_BYTES="1")
    assert ran.returncode == ended, ran.stderr[-2000:]
    assert ended != -signal.SIGABRT or "buffer of 28 bytes was written" in ran.stderr


def test_limits_are_documented():
    page = (ROOT / "docs" / "contributing.md").read_text()
    sources = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "cnnlstm_fast").rglob("*.py")]
    names = {n for f in sources for n in re.findall(r'\blimit\(\s*"([A-Z_]+)"', f.read_text())}
    assert len(names) > 20 and not {n for n in names if f"`{n}`" not in page}


@pytest.mark.parametrize("names", [{}, {"CNNLSTM_FAST_A": "5"}, {"CNNLSTM_FAST_A": "0"}])
def test_limits_are_usual_least_or_asked_for(names, monkeypatch):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    asked = {"5": 5, "0": 2}.get(names.get("CNNLSTM_FAST_A"))
    monkeypatch.delenv("CNNLSTM_FAST_LEAST", raising=False)
    assert limit("A", 9, 2) == (asked or 9)
    monkeypatch.setenv("CNNLSTM_FAST_LEAST", "1")
    assert limit("A", 9, 2) == (asked or 2)
