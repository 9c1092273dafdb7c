"""Forwards in which fusion/observe.py must find exactly the blocks there are: every known trap is a case."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerated import Doubling, Kinks, ReluInside, Same, gradients, module_with
from torch.utils.checkpoint import checkpoint
from twins import grid, real_strides

import cnnlstm_fast as cf

pytestmark = pytest.mark.usefixtures("always_worth_it")


def masked(self, x):
    y = self.conv(x)
    y = y.masked_fill(torch.arange(y.shape[-1]) > 4, 0)
    return F.relu(y)


def skipped(self, x):
    y = self.conv(x)
    z = F.relu(self.bn(y))
    return F.max_pool2d(z, 2).mean() * y + z


def read_in_training(self, x):
    y = self.bn(self.conv(x))
    self.seen = y.mean()
    return F.relu(y) * self.seen


def kept(self, x):
    self.feature = self.bn(self.conv(x))
    return F.relu(self.feature)


def late_consumer(self, x):
    y = self.conv(x)
    z = F.relu(self.bn(y))
    w = F.max_pool2d(self.other(z), 2)
    return w.sum() * y


def in_list(self, x):
    ys = [self.conv(x * k) for k in (1, 2, 3)]
    return torch.cat([F.relu(y) for y in ys])


def grad_mode_between(self, x):
    y = self.conv(x)
    with torch.no_grad():
        z = F.relu(self.bn(y))
    return z + F.elu(self.bn(self.conv(x)))


def autocast_between(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.conv(x)
    return F.relu(y.float())


def unused_norm(self, x):
    self.bn(self.conv(x))
    return F.relu(self.other(self.conv(x)))


def in_place_methods(self, x):
    y = self.bn(self.conv(x))
    y.relu_()
    return F.avg_pool2d(y, 2)


def in_place_then_read(self, x):
    y = self.conv(x)
    z = F.relu_(y)
    return z + y


def shapes_in_between(self, x):
    y = self.conv(x)
    n, c, h, w = y.shape
    assert y.size(1) == c == 6 and y.dim() == 4 and len(y) == n and y.dtype == x.dtype
    y = F.hardtanh(self.bn(y), 0, 20)
    assert y.ndim == 4 and y.numel() == n * c * h * w and y.requires_grad == torch.is_grad_enabled()
    return F.max_pool2d(y, (2, 1)).view(n, c, -1)


TRAPS = {
    "masked": masked,
    "skip": skipped,
    "read": read_in_training,
    "kept": kept,
    "late_consumer": late_consumer,
    "list": in_list,
    "custom_function": lambda self, x: F.relu(Doubling.apply(self.conv(x))),
    "custom_function_relu": lambda self, x: F.max_pool2d(ReluInside.apply(self.bn(self.conv(x))), 2),
    "custom_function_same": lambda self, x: F.relu(Same.apply(self.bn(self.conv(x)))),
    "checkpoint_reentrant": lambda self, x: F.relu(
        checkpoint(lambda t: self.bn(self.conv(t)), x, use_reentrant=True)
    ),
    "checkpoint_reentrant_all": lambda self, x: checkpoint(
        lambda t: F.max_pool2d(F.relu(self.bn(self.conv(t))), 2), x, use_reentrant=True
    ),
    "checkpoint_after_conv": lambda self, x: checkpoint(
        lambda t: F.relu(self.bn(t)), self.conv(x), use_reentrant=True
    ),
    "checkpoint": lambda self, x: checkpoint(
        lambda t: F.max_pool2d(F.relu(self.bn(self.conv(t))), 2), x, use_reentrant=False
    ),
    "checkpoint_half": lambda self, x: F.relu(
        checkpoint(lambda t: self.bn(self.conv(t)), x, use_reentrant=False)
    ),
    "grad_mode_between": grad_mode_between,
    "autocast_between": autocast_between,
    "unused_norm": unused_norm,
    "in_place_methods": in_place_methods,
    "in_place_then_read": in_place_then_read,
    "shapes": shapes_in_between,
    "numpy": lambda self, x: F.relu(self.conv(x)) + torch.from_numpy(self.conv(x).detach().numpy()),
    "no_activation": lambda self, x: self.other(self.conv(x)),
    "pool_first": lambda self, x: torch.sigmoid(F.max_pool2d(self.bn(self.conv(x)), 3, 2, 1)),
    "silu_after_pool": lambda self, x: F.silu(F.max_pool2d(self.conv(x), 2)),
    "gelu_average": lambda self, x: F.adaptive_avg_pool2d(F.gelu(self.conv(x)), (3, 2)),
    "softplus": lambda self, x: F.max_pool2d(F.softplus(self.bn(self.conv(x)), beta=0.7), 2),
    "mish": lambda self, x: F.max_pool2d(F.mish(self.bn(self.conv(x)), inplace=True), 2),
    "hardswish_after_pool": lambda self, x: F.hardswish(F.max_pool2d(self.conv(x), 2)),
    "hardsigmoid": lambda self, x: F.max_pool2d(F.hardsigmoid(self.bn(self.conv(x))), 2),
    "dropout": lambda self, x: F.max_pool2d(F.dropout(F.relu(self.conv(x)), 0.5, self.training), 2),
    "split": lambda self, x: torch.cat(self.conv(x).chunk(2, 1)[::-1], 1).relu(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap, mode):
    model = module_with(TRAPS[trap]).train(mode == "train")
    fast, twin = cf.accelerate(copy.deepcopy(model)), copy.deepcopy(model)
    for size in ((2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 6, 10)):
        x = grid(*size).requires_grad_()
        torch.manual_seed(3)
        got = fast(x)
        torch.manual_seed(3)
        with Kinks() as kinks:
            expected = twin(x)
        assert real_strides(got) == real_strides(expected)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        grad = torch.randn_like(expected)
        ours, theirs = (
            torch.autograd.grad(out, [x, *m.parameters()], grad, allow_unused=True)
            if "reentrant" not in trap and "after_conv" not in trap
            else gradients(out, x, m, grad)
            for out, m in ((got, fast), (expected, twin))
        )
        for mine, true in zip(ours, theirs, strict=True):
            assert (mine is None) == (true is None)
            if mine is not None and not kinks.near:
                torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-3)
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(fast.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
        del got, ours
        with torch.no_grad():
            torch.manual_seed(3)
            got = fast(x)
            torch.manual_seed(3)
            torch.testing.assert_close(got, twin(x), rtol=1e-4, atol=1e-4)
        if hasattr(twin, "feature"):
            torch.testing.assert_close(fast.feature + 0, twin.feature + 0, rtol=1e-4, atol=1e-4)
