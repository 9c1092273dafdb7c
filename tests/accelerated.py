"""What the tests of ``accelerate`` and of ``fusion/`` share: models, and a comparison with eager."""

import contextlib
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from twins import grid, on_grid

import cnnlstm_fast as cf

#: Functions whose slopes jump, and the size of their arguments there.
JUMPS = {"relu": 0, "leaky_relu": 0, "hardtanh": 0, "hardswish": 3, "hardsigmoid": 3}


class Kinks(TorchFunctionMode):
    """Notes how near a program comes to where rounding decides on gradients.

    That is where slopes of ReLUs and the like jump, and where the largest values of a window are nearly the
    same. Values that are quite the same have the same winner everywhere.
    """

    def __init__(self):
        super().__init__()
        self.least = float("inf")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        jump = JUMPS.get(getattr(function, "__name__", "").removesuffix("_"))
        if jump is not None and args[0].numel():
            self.least = min(self.least, (args[0].detach().abs() - jump).abs().min().item())
        if function in (F.max_pool2d, torch.max_pool2d):
            self.least = min(self.least, least_gap(*args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))

    @property
    def near(self) -> bool:
        return self.least < 1e-5


def least_gap(x: Tensor, kernel_size, stride=None, padding=0, *_, **__) -> float:
    """Between the largest values of a window of a pool that differ."""
    k, s, p = (value if isinstance(value, (tuple, list)) else (value, value) for value in (
        kernel_size, stride or kernel_size, padding
    ))  # fmt: skip
    padded = F.pad(x.detach(), (p[1], p[1], p[0], p[0]), value=float("-inf"))
    windows = padded.unfold(-2, k[0], s[0]).unfold(-2, k[1], s[1]).flatten(-2)
    gaps = windows.topk(2).values.diff().abs()
    return min(gaps[gaps > 0].tolist(), default=float("inf"))


def settle(module: nn.Module, *inputs) -> None:
    """Calls in which the module is observed."""
    for _ in range(2):
        module(*inputs)


def results(module: nn.Module, inputs, grad=None) -> dict[str, Tensor]:
    """The output, and with ``grad`` the gradients of the first input and of every parameter."""
    x = inputs[0].detach().requires_grad_(grad is not None)
    out = module(x, *inputs[1:])
    found = {"out": out.detach()}
    if grad is not None:
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(out, [x, *named.values()], grad.to(out.dtype), allow_unused=True)
        found |= {name: g for name, g in zip(["x", *named], grads, strict=True) if g is not None}
    return found


class Net(nn.Module):
    """Two blocks, one by modules and one by functions, with a residual connection between."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 12, 5)
        self.note = {"any": ["thing"]}

    def forward(self, x):
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        y = F.leaky_relu(self.conv2(x), 0.2)
        y = self.bn3(self.conv3(y)) + x
        return self.fc(torch.tanh(y).flatten(1))

    def helper(self):
        return "helped"


#: The last one's norm and sum run behind it (:mod:`cnnlstm_fast.ops.epilogue`).
NET_BLOCKS = [("BatchNorm2d", "ReLU", "MaxPool2d"), (None, "LeakyReLU", None), (None, None, None)]


def net() -> Net:
    return on_grid(Net())


def images(n: int = 2) -> Tensor:
    return grid(n, 3, 6, 8)


def assert_same(fast: nn.Module, model: nn.Module, x: Tensor, **tolerance) -> None:
    """Output, gradients and buffers against a copy of the eager ``model``, after being observed."""
    tolerance = {"rtol": 1e-4, "atol": 1e-4, **tolerance}
    fast_state = copy.deepcopy(fast.state_dict())
    for _ in range(3):
        twin = copy.deepcopy(model)
        fast.load_state_dict(fast_state)
        twin.load_state_dict(fast_state, strict=False)
        grad = torch.randn_like(copy.deepcopy(twin)(x))
        expected, got = results(twin, (x,), grad), results(fast, (x,), grad)
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(fast.get_buffer(name), buffer, **tolerance)
    fast.load_state_dict(fast_state)


def module_with(forward, *, children=None):
    """A module of a convolution and a norm whose forward is ``forward(self, x)``."""

    class Trap(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.other = nn.Conv2d(6, 6, 3, padding=1)
            self.flag = False

    Trap.forward = forward
    Trap.__qualname__ = "Trap"
    return on_grid(Trap())


class Doubling(torch.autograd.Function):
    """Looks like an identity; its gradient says whether it was there."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class ReluInside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (y > 0) * 3


class Same(torch.autograd.Function):
    """Hands its very argument back."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * 5


def gradients(out, x, module, grad):
    """By ``backward``, as reentrant checkpoints need it."""
    for t in (x, *module.parameters()):
        t.grad = None
    out.backward(grad)
    return [t.grad for t in (x, *module.parameters())]


def assert_same_gradients(got, expected, x, fast, twin):
    grad = torch.randn_like(expected)
    for mine, true in zip(gradients(got, x, fast, grad), gradients(expected, x, twin, grad), strict=True):
        assert (mine is None) == (true is None)
        if mine is not None:
            torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-3)


class Block(nn.Module):
    """A block whose forward calls ``between(self, name, value)`` after every step, on some calls only."""

    def __init__(self, between=lambda self, name, value: None, when=lambda call: call == 4):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.between, self.when, self.calls, self.log = between, when, 0, []

    def forward(self, x):
        self.calls += 1
        self.x = x = x * 1
        now = self.when(self.calls)
        y = self.conv(x)
        if now:
            self.between(self, "conv", y)
        z = self.bn(y)
        if now:
            self.between(self, "norm", z)
        a = F.relu(z)
        if now:
            self.between(self, "activation", a)
        out = F.max_pool2d(a, 2)
        if now:
            self.between(self, "late", (y, z, a))
        self.x = None
        return out


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    on_grid(model)
    return copy.deepcopy(model), cf.accelerate(copy.deepcopy(model))


def close(got, expected) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def assert_alike(plain: nn.Module, fast: nn.Module, calls: int = 6, grad: bool = True) -> None:
    """Results, gradients of input and parameters, buffers and logs, call by call.

    Where rounding decides on what a ReLU lets pass, gradients are not compared.
    """
    for _ in range(calls):
        x = grid(2, 3, 8, 6)
        seen, kinks = [], Kinks()
        for model in (plain, fast):
            model.zero_grad()
            given = x.clone().requires_grad_(grad)
            with torch.set_grad_enabled(grad), kinks if model is plain else contextlib.nullcontext():
                out = model(given)
            values = [out]
            if grad:
                (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
            if grad and not kinks.near:
                values += [given.grad, *(p.grad for p in model.parameters())]
            values += [*model.buffers(), *model.parameters(), *model.log]
            seen.append([v.detach().clone() if isinstance(v, Tensor) else v for v in values])
            model.log.clear()
        assert len(seen[0]) == len(seen[1])
        for ours, theirs in zip(seen[1], seen[0], strict=True):
            if isinstance(theirs, Tensor):
                close(ours, theirs)
            else:
                assert ours == theirs
