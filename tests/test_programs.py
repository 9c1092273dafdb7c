"""A minute of random programs (tests/programs.py), and whether their judge sees faults and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import weakref
from functools import partial
from itertools import islice
from unittest.mock import ANY

import programs
import pytest
import torch
from forked import run_forked
from helpers import SEED, needs_extension
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

pytestmark = needs_extension

PROGRAM_SEED = os.environ.get("CNNLSTM_FAST_PROGRAM_SEED", "3")
SECONDS = os.environ.get("CNNLSTM_FAST_PROGRAM_SECONDS", "60")


@pytest.mark.first
def test_a_minute_of_programs(tmp_path):
    """Random programs do the same plain, accelerated and compiled; what does not is printed as a script.

    Their seed is fixed: what new programs find is to be mended, not to stop another change. ``make programs``
    and CNNLSTM_FAST_PROGRAM_SEED draw others.
    """
    output = tmp_path / "programs.json"
    command = [sys.executable, programs.__file__, "--seconds", SECONDS, "--seed", PROGRAM_SEED, "--most", "1",
               "--output", str(output), "--journal", str(tmp_path / "program.py")]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr[-2000:]}"
    (found,) = json.loads(output.read_text())
    assert found["failed"] == 0 and found["programs"] > 20
    assert found["counts"]["fused"] > found["programs"] / 10, "hardly any program was fused"


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def convolutions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))]


def in_float64(m: nn.Module, *given: Tensor | None) -> Tensor:
    if given[0].dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return type(m)._conv_forward(m, *given)
    return type(m)._conv_forward(m, *(t if t is None else t.double() for t in given)).float()


def rounded(model: nn.Module) -> nn.Module:
    """Right, but rounded otherwise: convolutions in float64."""
    for m in convolutions(model):
        m.__dict__["_conv_forward"] = partial(in_float64, m)
    return model


class Late(Tensor):
    """A convolution's result that is computed from what its operands are when it is used."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            for value in tree_iter((args, kwargs or {})):
                if type(value) is Late:
                    value.__class__ = Tensor
                    if not value.is_inference():
                        value.data.copy_(value.compute())
            return function(*args, **(kwargs or {}))


def late_operands(model: nn.Module) -> nn.Module:
    """Wrong: convolutions read their operands when their results are used."""

    def hook(m, inputs, y):
        if type(y) is Tensor and torch.compiler.is_compiling() is False:
            y.__class__ = Late
            y.compute = lambda: type(m).forward(m, inputs[0]).data

    for m in convolutions(model):
        m.register_forward_hook(hook)
    return model


def late_statistics(model: nn.Module) -> nn.Module:
    """Wrong: norms count a batch when the model returns."""
    found: list[tuple[Tensor, Tensor]] = []

    def count(*_):
        for buffer, value in found:
            buffer.data.copy_(value)
        found.clear()

    def before(m, inputs):
        m.before = [(b, b.clone()) for b in (m.running_mean, m.running_var) if b is not None]

    def behind(m, inputs, y):
        for buffer, value in m.__dict__.pop("before", ()):
            found.append((buffer, buffer.clone()))
            buffer.data.copy_(value)

    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.register_forward_pre_hook(before)
            m.register_forward_hook(behind)
    model.register_forward_hook(count)
    return model


def reused_memory(model: nn.Module) -> nn.Module:
    """Wrong: what a convolution returned is gone when the model returns."""
    returned: list = []

    def forget(*_):
        for y in returned:
            if (y := y()) is not None:
                y.data.zero_()
        returned.clear()

    for m in convolutions(model):
        m.register_forward_hook(lambda m, inputs, y: returned.append(weakref.ref(y)))
    model.register_forward_hook(forget)
    return model


def some_programs(seed: int = SEED, count: int = 1000):
    return (programs.Writer(seed * 10**6 + at).write() for at in range(count))


@pytest.mark.some(1)
@pytest.mark.parametrize("wrong", [late_operands, late_statistics, reused_memory], ids=lambda f: f.__name__)
def test_planted_faults_are_found(wrong, one_thread):
    """Each is found, and what is left of a program that shows it is a short script, which runs."""
    runner = programs.Runner(wrong)
    for program in some_programs():
        found = runner.fails(program, "accelerate")
        if found and found[0] == "other values":
            break
    else:
        raise AssertionError("not found")
    small = runner.shrink(program, "accelerate", found[0])
    assert runner.fails(small, "accelerate")[0] == found[0]
    assert len(small.source()) < len(program.source())
    ran = run_forked(small.script("accelerate"))
    assert "values seen" in ran.stdout, ran.stderr


@pytest.mark.some(1)
@pytest.mark.parametrize("mode", programs.LOWER)
def test_planted_faults_of_frozen_models_are_found(mode, one_thread, monkeypatch):
    """A frozen model that is a little wrong is found, and a right one runs as one call into C++."""
    runner = programs.Runner()
    plain_models = (model for program in some_programs() if (model := program.frozen()) is not None)
    for model in plain_models:
        assert runner.fails(model, mode) is None, model.script(mode)
        if runner.counts["one program"]:
            break
    freeze = programs.cf.freeze

    def wrong(model, x, dtype):
        for c in convolutions(model):
            c.weight.data.mul_(1.01 if dtype is None else 1.1)
        return freeze(model, x, dtype=dtype)

    monkeypatch.setattr(programs.cf, "freeze", wrong)
    assert any(runner.fails(m, mode) == ("other values", ANY) for m in [model, *islice(plain_models, 5)])


def test_rounding_is_no_fault(one_thread):
    """A model that rounds otherwise passes, in programs that change nothing behind autograd's back."""
    runner, ran = programs.Runner(rounded), 0
    for program in some_programs(count=100):
        if re.search(r"\.data|numpy|detach\(\)[.\[]|pickle|saved\(model|dlpack", program.source()):
            continue
        ran += 1
        if found := runner.fails(program, "accelerate"):
            raise AssertionError(f"{found}\n{program.script('accelerate')}")
    assert ran > 20


def test_what_pytorch_refuses_may_go_on_to_another_error(one_thread):
    """And an error of another kind in the same place is a fault."""
    seen = []
    for places in ([[7]], [[9]], [[7]]):
        found = programs.Seen([("raised", RuntimeError if not seen else AttributeError)])
        found.places = places
        seen.append(found)
    judge = programs.Judge.__new__(programs.Judge)
    judge.compares_gradients, judge.steps, judge.may_refuse, judge.plain = True, False, False, seen[0]
    assert judge.difference(seen[1]) is None
    assert judge.difference(seen[2]) == ("raises", "AttributeError is raised where RuntimeError was")


#: A norm whose backward gets a gradient that lies channels-last where its input is contiguous.
NORM = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(x).transpose(1, 2).flatten(2)

def drive(wrap):
    model, x = wrap(build()), rand(2, 2, 2, 1).requires_grad_()
    total(model(x)).backward()
    see("gradient of x", x.grad)
"""


@pytest.mark.parametrize("wrong", [False, True])
def test_gradients_that_pytorch_has_wrong_are_not_compared(wrong, one_thread):
    """And others are."""

    def contiguous_gradients(model):
        model.norm.register_forward_hook(
            lambda m, x, y: y.register_hook(lambda g: g.contiguous() * (1 + wrong)) and None
        )
        return model

    source = NORM.replace("transpose(1, 2).", "") if wrong else NORM
    code = compile(source, "<program>", "exec")
    judge = programs.Judge(code, SEED, False, source)
    difference = judge.difference(programs.execute(code, contiguous_gradients, SEED))
    assert difference and difference[0] == "other values" if wrong else difference is None


VIEW = """
class Net(nn.Module):
    def forward(self, x):
        return x.flatten(1)

def drive(wrap):
    with torch.no_grad():
        see("out", wrap(build())(rand(2, 3, 4).requires_grad_()))
"""

#: Its backward reads running statistics that have changed since the forward read them.
LATE_STATISTICS = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2).eval()

    def forward(self, x):
        y = self.norm(x)
        F.batch_norm(x.detach(), self.norm.running_mean, self.norm.running_var, training=True)
        return y

def drive(wrap):
    model, x = wrap(build()), rand(2, 2, 3, 3).requires_grad_()
    total(model(x)).backward()
    see("gradient of x", x.grad)
"""


@pytest.mark.parametrize("late", [False, True])
def test_gradients_by_late_statistics_are_not_compared(late, one_thread):
    """And others are."""

    def as_read(model):
        model.norm.forward = lambda x: nn.functional.batch_norm(
            x, *(t.clone() for t in (model.norm.running_mean, model.norm.running_var)),
            model.norm.weight * (1 if late else 2), model.norm.bias,
        )  # fmt: skip
        return model

    source = LATE_STATISTICS if late else LATE_STATISTICS.replace("training=True", "training=False")
    judge = programs.Judge(compile(source, "<program>", "exec"), SEED, False, source)
    difference = judge.difference(programs.execute(judge.code, as_read, SEED))
    assert difference is None if late else difference[0] == "other values"


@pytest.mark.parametrize("frozen", [False, True])
def test_only_frozen_results_may_require_no_gradient(frozen):
    """And none may require one where the model's does not."""
    judge = programs.Judge(compile(VIEW, "<program>", "exec"), SEED, False, VIEW, frozen)
    outside = programs.execute(judge.code, lambda model: lambda x: model(x).detach(), SEED)
    assert (judge.difference(outside) is None) == frozen
    required = VIEW.replace("return", "x.requires_grad_()\n        return").replace(".requires_grad_())", ")")
    without = VIEW.replace(".requires_grad_())", ")")
    judge = programs.Judge(compile(without, "<program>", "exec"), SEED, False, without, frozen)
    found = judge.difference(programs.execute(compile(required, "<program>", "exec"), programs.plain, SEED))
    assert found is not None and "needs a gradient" in found[1]


def test_the_same_seed_writes_the_same_program():
    for one, two in zip(some_programs(count=5), some_programs(count=5), strict=True):
        assert one.script("compile") == two.script("compile")
