"""What the tests of drop-in modules share: exact values, a module against its plain twin, watching."""

from __future__ import annotations

import copy
import warnings

import torch
from helpers import assert_close_as_torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def grid(*shape: int, step: float = 0.25, top: float = 2.0) -> Tensor:
    """Random multiples of ``step``: sums of their products are exact in float32.

    So every convolution gives the same values whatever its order of adding, ReLU and max pooling
    decide alike everywhere, and gradients may be compared closely.
    """
    return (torch.randn(shape) / step).round().mul(step).clamp(-top, top)


@torch.no_grad()
def on_grid(module: nn.Module) -> nn.Module:
    """Put the parameters of convolutions and batch norms, and their statistics, on a grid; in place.

    The biases of norms lie between the points that a norm of running statistics maps a convolution's values
    to, so that nothing behind one is zero, where rounding would decide what a ReLU lets pass. Their weights
    are not zero: of a constant channel rounding decides which value a max pool takes behind an exponential.
    """
    for m in module.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d)):
            for p in m.parameters():
                p.copy_(grid(*p.shape, step=0.125, top=0.5))
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 2.0**-10
            m.running_mean.copy_(grid(m.num_features))
            m.running_var.copy_(4.0 ** torch.randint(-1, 2, (m.num_features,)) - m.eps)
            weight = grid(m.num_features, step=0.5, top=1.0)
            m.weight.copy_(weight.where(weight != 0, 0.5))
            m.bias.copy_(grid(m.num_features) + 2.0**-9)
    return module


def results(module: nn.Module, x: Tensor, grad: Tensor | None) -> dict[str, Tensor]:
    """The output, and with ``grad`` the gradients of the input and of every parameter that wants one."""
    x = x.detach().requires_grad_(grad is not None)
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    out = module(x)
    found = {"out": out.detach()}
    if grad is not None:
        grads = torch.autograd.grad(out, [x, *named.values()], grad.to(out.dtype))
        found |= dict(zip(["x", *named], grads, strict=True))
    return found


def assert_like_twin(ours: nn.Module, twin: nn.Module, x: Tensor, gradients: bool = True) -> None:
    """``ours`` and the plain ``twin``, of the same weights, by the numbers rule; also in float64."""
    assert ours.state_dict().keys() == twin.state_dict().keys()
    with torch.no_grad():
        shape = copy.deepcopy(twin)(x).shape
    grad = torch.randn(shape) if gradients else None
    ways = [results(copy.deepcopy(twin), x, grad)]
    if x.dim() >= 4:
        last = copy.deepcopy(twin).to(memory_format=torch.channels_last)
        ways.append(results(last, x, grad))
    with torch.backends.mkldnn.flags(enabled=False):  # its native convolutions and recurrent layers
        ways.append(results(copy.deepcopy(twin), x, grad))
    true = results(copy.deepcopy(twin).double(), x.double(), grad)
    mine = results(copy.deepcopy(ours), x, grad)
    assert mine.keys() == true.keys()
    for name, got in mine.items():
        assert_close_as_torch(got, [way[name] for way in ways], true[name], name)


def real_strides(x: Tensor) -> list[int]:
    """Strides of the dimensions along which there is anything to stride over."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def assert_compiles(fn, module: nn.Module, x: Tensor, backend: str) -> None:
    """``fn`` without a graph break, forward and backward, with the results of eager."""
    torch._dynamo.reset()
    parameters = [p for p in module.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo")
        compiled = torch.compile(fn, fullgraph=True, backend=backend)
        x = x.requires_grad_()
        got, expected = compiled(x), fn(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert real_strides(got) == real_strides(expected)
    grad = torch.randn_like(expected)
    used = dict(allow_unused=True)
    for mine, theirs in zip(
        torch.autograd.grad(got, [x, *parameters], grad, **used),
        torch.autograd.grad(expected, [x, *parameters], grad, **used),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fn(x), rtol=1e-5, atol=1e-5)


class Ops(TorchDispatchMode):
    """Names of the operators that run inside, in order; views are left out."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name not in ("aten::_unsafe_view", "aten::detach"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))
