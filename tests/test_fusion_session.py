"""Sessions of accelerated models: beside PyTorch's own machinery, on several threads, and how they end."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from accelerated import Block, close, pair
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from twins import grid

import cnnlstm_fast as cf

pytestmark = pytest.mark.usefixtures("always_worth_it")


# ---------------------------------------------------------------- PyTorch's own machinery


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        for value in args:
            if isinstance(value, Tensor):
                assert value.shape is not None
                value.detach().sum()
        return function(*args, **(kwargs or {}))


def test_a_mode_that_looks_at_arguments():
    plain, fast = pair(Block())
    for _ in range(3):
        x = grid(2, 3, 8, 6)
        with Watching():
            close(fast(x), plain(x))
        close(fast(x), plain(x))


@pytest.mark.parametrize("where", ["functional", "method"])
def test_a_patched_convolution(where, monkeypatch):
    calls = []
    if where == "functional":
        own = F.conv2d
        monkeypatch.setattr(
            F, "conv2d", lambda x, *args, **kw: (calls.append(x.shape), own(x, *args, **kw))[1]
        )
    else:
        method = nn.Conv2d._conv_forward

        def patched(self, x, weight, bias):
            calls.append(x.shape)
            return method(self, x, weight, bias)

        monkeypatch.setattr(nn.Conv2d, "_conv_forward", patched)
    plain, fast = pair(Block())
    for _ in range(4):
        x = grid(2, 3, 8, 6)
        calls.clear()
        expected = plain(x)
        before = len(calls)
        close(fast(x), expected)
        assert len(calls) == 2 * before == 2


class Modules(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.pool, self.lstm, self.gru = nn.MaxPool2d(2), nn.LSTM(6 * 4, 5, batch_first=True), nn.GRU(5, 4)

    def forward(self, x):
        y = self.pool(self.relu(self.bn(self.conv(x))))
        return self.gru(self.lstm(y.permute(0, 3, 1, 2).flatten(2))[0])[0]


@pytest.mark.filterwarnings("ignore")
def test_eager_quantization():
    quantization = torch.ao.quantization
    plain, fast = pair(Modules().eval())
    x = grid(2, 3, 8, 6)
    for _ in range(3):
        fast(x)
    found = []
    for model in (plain, fast):
        model = quantization.fuse_modules(model, [["conv", "bn", "relu"]])
        values = [model(x) for _ in range(3)]
        model.conv.qconfig = quantization.default_qconfig
        quantization.prepare(model, inplace=True)
        values += [model(x) for _ in range(3)]
        found.append((values, type(quantization.convert(model).conv)))
    assert found[0][1] is found[1][1]
    for ours, theirs in zip(found[1][0], found[0][0], strict=True):
        close(ours, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("used", [False, True])
def test_torchscript(used):
    plain, fast = pair(Modules().eval())
    x = grid(2, 3, 8, 6)
    if used:
        for _ in range(3):
            fast(x)
    close(torch.jit.script(fast)(x), plain(x))
    close(torch.jit.script(fast.conv)(x), plain.conv(x))
    assert isinstance(fast.lstm, cf.LSTM)
    for _ in range(3):
        close(fast(x), plain(x))


# ---------------------------------------------------------------- lifetimes


@pytest.fixture
def uncollected():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("grad", [False, True])
def test_inputs_and_models_die_at_once(grad, uncollected):
    """Without the garbage collector: after an observed call, after an exception, with the model."""

    def between(self, name, value):
        if name == self.fails_at:
            raise ValueError

    fast = cf.accelerate(Block(between, lambda call: call > 2))
    with torch.set_grad_enabled(grad):
        for fails_at in ("nowhere", "nowhere", "nowhere", "conv", "norm", "activation", "late"):
            fast.fails_at = fails_at
            x = grid(2, 3, 8, 6)
            alive = weakref.ref(x)
            with contextlib.suppress(ValueError):
                fast(x)
            fast.x = None
            del x
            assert alive() is None, fails_at
    conv = weakref.ref(fast.conv)
    del fast
    assert conv() is None


def test_an_interrupt_ends_the_session():
    """PyTorch calls no hook after a KeyboardInterrupt; what was held becomes plain in the next call."""

    def between(self, name, value):
        if name == "conv":
            self.held = value
            raise KeyboardInterrupt

    plain, fast = pair(Block(between))
    x = grid(2, 3, 8, 6)
    for call in range(1, 7):
        if call == 4:
            for model in (plain, fast):
                with pytest.raises(KeyboardInterrupt):
                    model(x)
        else:
            close(fast(x), plain(x))
    assert type(fast.held) is Tensor
    close(fast.held, plain.held)


def test_threads_have_sessions_of_their_own():
    plain, fast = pair(Block(when=lambda call: False).eval())
    inputs = [grid(2, 3, 8, 6) for _ in range(4)]
    with torch.no_grad():
        expected = [plain(x) for x in inputs]
    wrong = []

    def run(i):
        with torch.no_grad():
            for _ in range(30):
                if not torch.allclose(fast(inputs[i]), expected[i], rtol=1e-4, atol=1e-4):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_convolution_called_outside_of_any_forward_runs_as_it_is():
    plain, fast = pair(Block())
    x = grid(2, 3, 8, 6)
    for _ in range(4):
        y, expected = fast.conv(x), plain.conv(x)
        assert type(y) is Tensor
        close(y, expected)
    assert "outside" in fast.report().sites[0].reason


@pytest.mark.parametrize("change", ["weights channels-last", "frozen convolution"])
def test_what_a_shape_does_not_tell(change):
    plain, fast = pair(Block(when=lambda call: False))
    for call in range(6):
        if call == 3:
            for model in (plain, fast):
                if change == "frozen convolution":
                    model.conv.requires_grad_(False)
                else:
                    model.to(memory_format=torch.channels_last)
        x = grid(2, 3, 8, 6)
        ours, theirs = fast(x), plain(x)
        assert ours.stride() == theirs.stride() and ours.requires_grad == theirs.requires_grad
        close(ours, theirs)


@pytest.mark.parametrize("size", [(3, 3), (2, 3), (4, 2)])
def test_a_weight_of_another_size_than_its_module_was_made_for(size):
    """PyTorch pads by the weight's size where the padding is the same on both sides."""
    model = Block()
    model.conv = nn.Conv2d(3, 6, 2, padding="same", dilation=(1, 3))
    model.conv.weight = nn.Parameter(torch.randn(6, 3, *size))
    plain, fast = pair(model)
    for _ in range(4):
        x = grid(2, 3, 8, 6)
        close(fast(x), plain(x))
