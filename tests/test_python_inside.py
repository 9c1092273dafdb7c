"""Errors and Ctrl-C in the Python code of an op (ops/python_inside.py) come out as they are."""

from __future__ import annotations

import pytest
import torch
from forked import run_forked
from helpers import SEED, needs_extension

from cnnlstm_fast.functional import conv_block
from cnnlstm_fast.ops import conv_fft as op
from cnnlstm_fast.ops import python_inside
from cnnlstm_fast.ops.conv_block import PLANS, forward_op

pytestmark = needs_extension


CTRL_C = """
import collections, os, random, signal, sys, threading, time
import torch
from cnnlstm_fast.functional import conv_block

random.seed({seed})
signal.signal(signal.SIGINT, signal.default_int_handler)  # test runners ignore it
torch.set_num_threads(2)
x, w = torch.randn(2, 8, 1, 900), torch.randn(8, 8, 1, 60)
if {training}:
    x.requires_grad_(), w.requires_grad_()

def work():
    y = conv_block(x, w, torch.zeros(8), plan="fft", padding=(0, 30))
    if {training}:
        y.sum().backward()

work()
begun = time.perf_counter()
for _ in range(5):
    work()
once, seen = (time.perf_counter() - begun) / 5, collections.Counter()
for _ in range(60):
    caught = threading.Event()

    def press(delay):  # again, as a person would: Python swallows one that arrives in a finalizer
        while not caught.wait(delay):
            os.kill(os.getpid(), signal.SIGINT)
            delay = 2.0

    thread = threading.Thread(target=press, args=(random.uniform(0.5, 2.5) * once,))
    try:
        thread.start()
        while True:
            work()
    except BaseException as error:
        caught.set()
        seen[type(error).__name__] += 1
    thread.join()
    assert torch.is_grad_enabled()
    work()
print(dict(seen))
"""


@pytest.mark.parametrize("training", [False, True])
def test_ctrl_c_stays_ctrl_c(training):
    """Real signals at random moments, within the op's Python code and without."""
    done = run_forked(CTRL_C.format(seed=SEED, training=training))
    assert done.stdout.strip() == "{'KeyboardInterrupt': 60}", done.stderr[-2000:]


class OwnError(BaseException):
    pass


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, SystemExit, OwnError, ValueError])
@pytest.mark.parametrize("where", ["forward", "training", "backward"])
def test_errors_come_out_as_they_are(where, error, monkeypatch):
    x, w = torch.randn(1, 3, 1, 90), torch.randn(4, 3, 1, 20)
    x.requires_grad_(where != "forward")
    raised = error("on its way")

    def fail(t):
        raise raised

    y = conv_block(x, w, plan="fft")
    with monkeypatch.context() as patched:
        patched.setattr(op, "_finite", fail)
        with pytest.raises(error) as caught:
            y.sum().backward() if where == "backward" else conv_block(x, w, plan="fft")
    assert caught.value is raised
    torch.testing.assert_close(conv_block(x, w, plan="fft"), y)
    with pytest.raises(RuntimeError, match="channels"):  # a refusal is no error of a kernel
        forward_op(x, w[:, :2], None, [1, 1, 0, 0, 1, 1, 1], 0, [], [], [0, 1, 2, 3], PLANS["fft"], False)


def test_an_interrupt_before_the_kernel_begins(monkeypatch):
    """Its entry is the first Python code after a signal, where nothing can be noted."""
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("handed on")
        return 3

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(python_inside, "_only_ctrl_c_raises", lambda: True)  # test runners ignore the signal
        python_inside.call(failing, 1)
    assert len(calls) == 2
    monkeypatch.setattr(python_inside, "_only_ctrl_c_raises", lambda: False)
    with pytest.raises(RuntimeError, match="handed on"):
        python_inside.call(lambda: calls.clear() or failing())

    def refusing():
        raise RuntimeError("wrong sizes")

    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="wrong sizes"):
        python_inside.call(refusing)
