"""Autocast and dynamic quantization around convolutions and whole models."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from helpers import needs_extension
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

import cnnlstm_fast as cf
from cnnlstm_fast.planning import tuner

functional = importlib.import_module("cnnlstm_fast.functional.conv_block")  # its name is a function's too

# ---------------------------------------------------------------- blocks under autocast


def image_block() -> tuple[nn.Module, Tensor]:
    """A first convolution, whose batch statistics our kernels take with it in float32 alone."""
    model = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))
    return model, torch.randn(8, 1, 32, 96)


def trained(model: nn.Module, x: Tensor, low: bool) -> list[Tensor]:
    """Result, gradients and statistics of a step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = model(x)
    weights = torch.cos(torch.arange(out.numel()).view(out.shape).to(x.dtype))
    grads = torch.autograd.grad((out.to(x.dtype) * weights).sum(), list(model.parameters()))
    return [out, *grads, model[1].running_mean, model[1].running_var]


@needs_extension
def test_a_block_that_is_faster_in_float32_is_rounded_once():
    """Its dtypes are PyTorch's, and its errors at most twice PyTorch's own."""
    model, x = image_block()
    fast = cf.Sequential(*copy.deepcopy(model))
    spec = dict(padding=1, norm=fast[1], pool=fast[3])
    with torch.autocast("cpu", torch.bfloat16):
        tensors = functional.as_autocast_casts(x, fast[0].weight, fast[0].bias)
        call = functional.plan_under_autocast(
            *tensors, 1, 1, 1, 1, fast[1], "relu", fast[3], "channels_first"
        )
        cf.functional.conv_block(x, fast[0].weight, fast[0].bias, **spec)
    assert call.rounds_to == torch.bfloat16 and call.plan != "reference"
    fast = cf.Sequential(*copy.deepcopy(model))
    true = trained(copy.deepcopy(model).double(), x.double(), False)
    own, ours = trained(model, x, True), trained(fast, x, True)
    for exact, theirs, mine in zip(true, own, ours, strict=True):
        assert mine.dtype == theirs.dtype
        error, most = ((t.double() - exact).norm() for t in (mine, theirs))
        assert error <= 2 * most + 16 * torch.finfo(mine.dtype).eps * exact.norm()


@needs_extension
@pytest.mark.parametrize("asked", ["direct", "chunked"])
def test_a_plan_that_is_asked_for_runs_in_the_dtype_of_autocast(asked):
    model, x = image_block()
    conv, norm, _, pool = model
    with torch.autocast("cpu", torch.bfloat16):
        tensors = functional.as_autocast_casts(x, conv.weight, conv.bias)
        call = functional.plan_under_autocast(
            *tensors, 1, 1, 1, 1, norm, "relu", pool, "channels_first", asked
        )
    assert call.rounds_to is None and call.plan == asked


@needs_extension
def test_plans_of_calls_are_known_by_the_dtype_of_autocast(monkeypatch):
    """The second call of a kind plans nothing; another dtype, or none, is another kind."""
    monkeypatch.setattr(tuner, "enabled", False)
    layer = cf.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2)).requires_grad_(False)
    x = torch.randn(2, 3, 12, 14)
    functional._known_calls.clear()
    planned = []
    plan_call = functional.plan_call
    monkeypatch.setattr(
        functional, "plan_call", lambda *args: planned.append(args[0].dtype) or plan_call(*args)
    )
    kinds = {"off": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for _ in range(3):
        for name, dtype in kinds.items():
            on = name != "off"
            with torch.autocast("cpu", dtype if on else torch.bfloat16, enabled=on):
                assert layer(x).dtype == dtype
    first = len(planned)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32
    assert len(planned) == first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_dtypes_of_results_and_gradients(kind, dtype):
    """Of a convolution and a recurrent layer under autocast they are PyTorch's, whatever computes."""
    found = []
    for modules in (nn, cf):
        front = modules.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        rnn = getattr(modules, kind)(8 * 6, 16, batch_first=True)
        x = torch.randn(4, 1, 12, 20, requires_grad=True)
        with torch.autocast("cpu", dtype):
            maps = front(x)
            out, last = rnn(maps.permute(0, 3, 1, 2).flatten(2))
            loss = out.float().square().mean()
        scaled = torch.amp.GradScaler("cpu", init_scale=8.0).scale(loss)
        scaled.backward()
        last = last if isinstance(last, tuple) else (last,)
        grads = [x.grad, *(p.grad for m in (front, rnn) for p in m.parameters())]
        found.append([t.dtype for t in (maps, out, *last, scaled, *grads)])
    assert found[0] == found[1]


# ---------------------------------------------------------------- dynamic quantization


class Reader(nn.Module):
    """Images (N, 1, 16, W) -> scores (N, W / 2, 7): a small OCR model."""

    def __init__(self, kind: str):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d((8, 2))
        )
        self.rnn = getattr(nn, kind)(48, 33, 2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(66, 7)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.cnn(x).permute(0, 3, 1, 2).flatten(2))
        return self.fc(y)


def quantized(model: nn.Module) -> nn.Module:
    return quantize_dynamic(model, {nn.LSTM, nn.GRU, nn.Linear}, dtype=torch.qint8)


WAYS = {
    "accelerated after": lambda model, x: cf.accelerate(quantized(model)),
    "accelerated before": lambda model, x: quantized(cf.accelerate(model)),
    "accelerated, copied": lambda model, x: copy.deepcopy(quantized(cf.accelerate(model))),
    "frozen after": lambda model, x: cf.freeze(quantized(model), x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("way", WAYS)
def test_dynamic_quantization(way, kind):
    """``quantize_dynamic`` quantizes what it would, in either order; the convolutions stay ours.

    Activations are rounded to 8 bits, which an error of one rounding can turn: no further from PyTorch's
    quantized model than that is from the one in float32.
    """
    if torch.backends.quantized.engine in ("none", ""):
        pytest.skip("this build of PyTorch has no engine for quantized layers")
    model = Reader(kind).eval()
    x = torch.randn(5, 1, 16, 44)
    with torch.no_grad():
        plain, own = model(x), quantized(model)(x)
        made = WAYS[way](model, x)
        for _ in range(3):
            ours = made(x)
    assert ours.dtype == own.dtype and ours.shape == own.shape
    assert (ours - own).norm() <= 2 * (own - plain).norm()
    assert type(model.rnn) is getattr(nn, kind)  # the model that was given is as it was
    types = {type(m).__module__ for m in made.modules() if type(m).__name__ in (kind, "Linear")}
    assert types == {
        "torch.ao.nn.quantized.dynamic.modules.rnn",
        "torch.ao.nn.quantized.dynamic.modules.linear",
    }


@pytest.mark.filterwarnings("ignore")
def test_our_own_layers_stay_as_they_are():
    """``cf.LSTM`` is no ``nn.LSTM``: it runs in float32, which is faster than PyTorch's quantized layer."""
    model = cf.CNN_LSTM_Simple(3, 16, 1, 4).eval()
    x = torch.randn(2, 3, 8, 8)
    made = quantized(model)
    assert type(made.lstm) is cf.LSTM
    with torch.no_grad():
        assert (made(x) - model(x)).norm() < 0.1 * model(x).norm()
