"""What the tests of copying.py share: a model, and a comparison of ``accelerate`` with ``copy.deepcopy``."""

import copy
import threading

import torch
from torch import Tensor, nn

import cnnlstm_fast as cf


class Net(nn.Module):
    """Training and evaluation differ in the norm; what it keeps is read after the call."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.pool = nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2)
        self.kept: dict = {}

    def forward(self, x):
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        return torch.relu(self.conv2(x)).mean((2, 3))

    def keep(self, name, module, args, result):
        self.kept[name] = result.detach().clone()

    def take(self, x):
        y = Net.forward(self, x)
        return y + self.kept.pop("c").mean()


class Takes(Net):
    """Needs what its hook has kept, so a hook on another model's part shows."""

    def forward(self, x):
        return self.take(x)


def fingerprint(model: nn.Module) -> list:
    """What a model is, to the bit and to the attribute."""
    found: list = []
    for name, module in model.named_modules():
        found.append((name, type(module), module.training))
        for key, value in module.__dict__.items():
            inner = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else None
            found.append((name, key, id(value), inner))
    found += [(name, t._version, id(t)) for name, t in model.state_dict(keep_vars=True).items()]
    return found


def images() -> Tensor:
    return torch.randn(2, 3, 8, 6)


def assert_like_deepcopy(model: nn.Module, twin: nn.Module | None = None, make=images) -> nn.Module:
    """Accelerate ``model`` and compare the result with ``copy.deepcopy``'s, in both modes."""
    before = fingerprint(model)
    twin = copy.deepcopy(model) if twin is None else twin
    fast = cf.accelerate(model)
    assert fingerprint(model) == before
    assert fast is not model and list(fast.state_dict()) == list(model.state_dict())
    for (name, p), q in zip(model.named_parameters(), fast.parameters(), strict=True):
        assert p is q, name
    for (name, p), q in zip(model.named_buffers(), fast.buffers(), strict=True):
        assert p is q, name
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    for mode in (False, True, False):
        twin.train(mode), fast.train(mode)
        for _ in range(3):
            x = make()
            twin.load_state_dict(state), fast.load_state_dict(state)
            torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-5)
            for (name, b), ours in zip(twin.named_buffers(), fast.buffers(), strict=True):
                torch.testing.assert_close(ours, b, msg=lambda m, n=name: f"{n}: {m}")
    assert [m.training for m in model.modules()] == modes
    fast.load_state_dict(state)
    return fast


class Counter:
    """Cannot be copied."""

    def __init__(self):
        self.n, self.lock = 0, threading.Lock()

    def count(self, *_):
        with self.lock:
            self.n += 1
