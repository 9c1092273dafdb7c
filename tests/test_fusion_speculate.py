"""Values of a block that a program asks for, keeps or uses as in no call before."""

import copy
import ctypes
import functools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerated import Block, ReluInside, Same, assert_alike, assert_same_gradients, close, module_with, pair
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from twins import grid

import cnnlstm_fast as cf

pytestmark = pytest.mark.usefixtures("always_worth_it")


def keep(self, name, value):
    if name == "late":
        self.log += value


def look_late(self, name, value):
    if name == "late":
        self.log += [value[0].mean(), value[1].detach().numpy().sum(), value[2].sum()]


def retained(self, name, value):
    if name == "late":
        value[1].retain_grad()
        self.kept = value[1]


def hooked(which):
    def between(self, name, value):
        if name == which:
            value = value[1] if name == "late" else value
            if value.requires_grad:
                value.register_hook(lambda grad: self.log.append(grad.clone()))

    return between


def doubled(self, name, value):
    if name == "late" and value[0].requires_grad:
        value[0].register_hook(lambda grad: grad * 2)


ESCAPES = {
    "kept": keep,
    "looked at late": look_late,
    "retained": retained,
    "doubled late": doubled,
    **{f"hooked at {name}": hooked(name) for name in ("conv", "norm", "activation", "late")},
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("escape", ESCAPES)
def test_values_that_escape(escape, mode, grad):
    """On the fourth call only, when the block is speculated."""
    if escape == "retained" and not grad:
        return
    plain, fast = pair(Block(ESCAPES[escape]))
    assert_alike(plain.train(mode == "train"), fast.train(mode == "train"), grad=grad)
    if escape == "retained":
        close(fast.kept.grad, plain.kept.grad)


def test_a_kept_value_is_that_of_its_call():
    """Read after the optimizer's step, with the weights of before."""

    class Keeps(Block):
        def forward(self, x):
            self.feature = self.conv(x)
            return F.max_pool2d(F.relu(self.feature), 2).mean((1, 2, 3))

    plain, fast = pair(Keeps())
    for _ in range(5):
        x = grid(2, 3, 8, 6)
        plain(x), fast(x)
        expected = plain.feature.detach().clone()
        with torch.no_grad():
            for p in (*plain.parameters(), *fast.parameters()):
                p.mul_(1.01)
        x.zero_()
        close(fast.feature.detach(), expected)


@pytest.mark.parametrize("what", ["returned", "logged", "yielded"])
def test_values_returned_on_some_calls(what):
    class Sometimes(Block):
        def forward(self, x):
            self.calls += 1
            y = self.conv(x)
            z = F.relu(y)
            out = F.max_pool2d(z, 2).mean((1, 2, 3))
            if self.calls % 3:
                return out
            if what == "logged":
                self.log.append(y)
            return (out, y, z) if what == "returned" else out

    plain, fast = pair(Sometimes())
    for call in range(1, 9):
        x = grid(2, 3, 8, 6)
        ours, theirs = fast(x), plain(x)
        if call % 3 or what == "yielded":
            close(ours, theirs)
        elif what == "logged":
            close(fast.log[-1], plain.log[-1])
        else:
            for mine, true in zip(ours, theirs, strict=True):
                close(mine, true)
            for at in (1, 2):
                (mine,) = torch.autograd.grad(ours[0].pow(2).sum(), ours[at], retain_graph=True)
                (true,) = torch.autograd.grad(theirs[0].pow(2).sum(), theirs[at], retain_graph=True)
                close(mine, true)
            close(
                torch.autograd.grad(ours[1].sum() + ours[0].sum(), fast.conv.weight)[0],
                torch.autograd.grad(theirs[1].sum() + theirs[0].sum(), plain.conv.weight)[0],
            )


def through_dlpack(y):
    return float(torch.from_dlpack(torch.utils.dlpack.to_dlpack(y)).sum())


def through_its_address(y):
    buffer = (ctypes.c_float * y.numel()).from_address(y.data_ptr())
    return float(torch.frombuffer(buffer, dtype=torch.float32).sum())


#: Ways to a value's memory, of which some do not pass ``__torch_function__``.
ROUTES = {
    "dlpack capsule": through_dlpack,
    "from_dlpack": lambda y: float(torch.from_dlpack(y.detach()).sum()),
    "address": through_its_address,
    "numpy": lambda y: float(np.asarray(y.detach()).sum()),
    "storage": lambda y: float(torch.tensor(y.untyped_storage().tolist()[:8]).sum()),
    "pickle": lambda y: float(pickle.loads(pickle.dumps(y.detach())).sum()),
    "raw operator": lambda y: float(torch.ops.aten.sum.default(y)),
    "format": lambda y: f"{y.sum():.3f}",
    "tolist": lambda y: y.detach().flatten()[:3].tolist(),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("when", ["always", "fourth call"])
@pytest.mark.parametrize("at", ["conv", "norm", "activation"])
@pytest.mark.parametrize("route", ROUTES)
def test_ways_to_the_memory(route, at, when, grad):
    def between(self, name, value):
        if name == at:
            found = ROUTES[route](value)
            self.log.append(torch.tensor(found) if isinstance(found, float) else found)

    plain, fast = pair(Block(between, (lambda call: True) if when == "always" else lambda call: call == 4))
    for model in (plain, fast):
        model.eval()
    for _ in range(6):
        x = grid(2, 3, 8, 6)
        with torch.set_grad_enabled(grad):
            close(fast(x), plain(x))
    for ours, theirs in zip(fast.log, plain.log, strict=True):
        if isinstance(theirs, Tensor):
            close(ours, theirs)
        elif isinstance(theirs, str):
            assert float(ours) == pytest.approx(float(theirs), abs=2e-3)
        else:
            assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_identity_and_attributes(last, grad):
    class Marked(Block):
        def forward(self, x):
            y = self.conv(x)
            y.mark = 5
            z = F.relu_(y)
            self.log += [z is y, z.mark]
            return z if last else F.max_pool2d(z, 2)

    plain, fast = pair(Marked())
    assert_alike(plain, fast, grad=grad)


@pytest.mark.parametrize("grad", [False, True])
def test_a_value_within_a_transform(grad):
    def between(self, name, value):
        if name == "conv":
            self.log.append(torch.func.vmap(torch.tanh)(value))

    assert_alike(*pair(Block(between).eval()), grad=grad)


def test_a_step_within_a_checkpoint():
    """Behind a convolution that stands before it; which counts what its steps save."""

    class Half(Block):
        def forward(self, x):
            self.calls += 1
            y = self.conv(x)
            if self.calls % 3 == 2:
                return checkpoint(F.relu, y, use_reentrant=False)
            return F.relu(y)

    assert_alike(*pair(Half()))


def test_partial_hooks_see_values():
    class Saves(Block):
        def __init__(self):
            super().__init__()
            self.found = {}
            self.bn.register_forward_hook(functools.partial(self.save, "bn"))

        def save(self, name, module, args, output):
            self.found[name] = output

    plain, fast = pair(Saves())
    for _ in range(5):
        x = grid(2, 3, 8, 6)
        close(fast(x), plain(x))
        close(fast.found["bn"], plain.found["bn"])


#: What a forward does once it has been observed as conv, norm, activation, pool.
FLIPS = {
    "look": lambda self, y, stage: (y.mean(), y)[1],
    "use_twice": lambda self, y, stage: y + 0 * y.abs(),
    "other_activation": lambda self, y, stage: torch.tanh(y),
    "custom_function": lambda self, y, stage: ReluInside.apply(y),
    "same_function": lambda self, y, stage: Same.apply(y),
    "checkpoint": lambda self, y, stage: checkpoint(torch.tanh, y, use_reentrant=True),
    "detach": lambda self, y, stage: y.detach() + y,
    "numpy": lambda self, y, stage: y * float(y.detach().numpy().sum() * 0 + 2),
    "no_grad": lambda self, y, stage: y + torch.no_grad()(torch.relu)(y),
    "in_place": lambda self, y, stage: y.mul_(2) if stage < 2 else y * 2,  # ReLU keeps its result
    "item": lambda self, y, stage: y if y.sum().item() == 0.123 else y * 3,
    "index": lambda self, y, stage: y[:, :, :4, :4],
    "raw_op": lambda self, y, stage: torch.ops.aten.relu.default(y),
    "hook": lambda self, y, stage: (y.register_hook(lambda g: g * 7) if y.requires_grad else 0, y)[1],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_that_small_inputs_do_not_take(dtype):
    """It was seen with a large one; for a small one it would raise."""

    def forward(self, x):
        y = self.conv(x)
        return F.relu(F.max_pool2d(y, 2) if y.shape[-1] > 1 else y)

    model = module_with(forward).to(dtype)
    fast = cf.accelerate(copy.deepcopy(model))
    for size in (8, 8, 1, 8):
        x = grid(2, 3, size, size).to(dtype)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("flip", FLIPS)
def test_a_flow_that_changes_later(flip, mode, stage):
    """Deferred values leave in every way; value, gradient and statistics are eager's."""

    def forward(self, x):
        steps = (lambda t: self.bn(t), lambda t: F.relu(t), lambda t: F.max_pool2d(t, 2))
        y = self.conv(x)
        for i, step in enumerate(steps):
            if self.flag and i == stage:
                y = FLIPS[flip](self, y, stage)
            y = step(y)
        return y

    model = module_with(forward).train(mode == "train")
    fast, twin = cf.accelerate(copy.deepcopy(model)), copy.deepcopy(model)
    for flag in (False, False, True, False, False, True):
        fast.flag = twin.flag = flag
        x = grid(2, 3, 8, 8).requires_grad_()
        got, expected = fast(x), twin(x)
        assert type(got) is Tensor
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert_same_gradients(got, expected, x, fast, twin)
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(fast.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
        del got
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-4)


def test_statistics_of_a_norm_whose_result_is_dropped():
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y.new_zeros(()) if self.flag else F.relu(y)

    model = module_with(forward)
    fast, twin = cf.accelerate(copy.deepcopy(model)), copy.deepcopy(model)
    for flag in (False, False, True, False):
        fast.flag = twin.flag = flag
        x = grid(2, 3, 8, 8)
        fast(x), twin(x)
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(fast.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
