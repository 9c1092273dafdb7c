"""The Triton kernels of recurrent layers: in Triton's interpreter on any machine, compiled on a CUDA device.

What is expected comes from a loop over steps written here, in float64; PyTorch's own error is that of
the same loop in the dtype at hand, since its own layers take neither resets nor lengths.
"""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import SEED, assert_close_as_torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="needs Triton")

KERNELS = Path(__file__).parents[1] / "kernels" / "recurrent.py"
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
modes = pytest.mark.parametrize("mode", ["LSTM", "GRU"])


@dataclass(frozen=True)
class Layer:
    """A recurrent layer and its input's sizes; ``width`` is the input's features."""

    mode: str
    batch: int
    steps: int
    width: int
    hidden: int
    directions: int = 1
    batch_first: bool = False
    bias: bool = True
    state: str = "both"  # which initial states are given: "none", "h", "c" (LSTM only) or "both"
    reset: bool = False
    lengths: bool = False

    @property
    def gates(self) -> int:
        return 4 if self.mode == "LSTM" else 3

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Everything a call takes, the ten weights under their names in the op's schema."""
        d, b, h = self.directions, self.batch, self.hidden
        leading = (b, self.steps) if self.batch_first else (self.steps, b)
        found = {"x": torch.randn(*leading, self.width)}
        if self.state in ("h", "both"):
            found["h0"] = torch.randn(d, b, h)
        if self.mode == "LSTM" and self.state in ("c", "both"):
            found["c0"] = torch.randn(d, b, h)
        for end in ("", "_r")[:d]:
            found[f"w_ih{end}"] = torch.randn(self.gates * h, self.width) * (0.8 / self.width**0.5)
            found[f"w_hh{end}"] = torch.randn(self.gates * h, h) * (0.8 / h**0.5)
            if self.bias:
                found[f"b_ih{end}"], found[f"b_hh{end}"] = torch.randn(2, self.gates * h).mul(0.5).unbind()
        found = {name: t.to(dtype) for name, t in found.items()}
        if self.reset:
            found["reset"] = torch.rand(leading) < random.choice((0.02, 0.2, 0.7))
        if self.lengths:
            found["lengths"] = torch.randint(random.choice((0, self.steps // 2, 1)), self.steps + 1, (b,))
        return found

    def grads(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Gradients of out, h_n and c_n."""
        d, b, h = self.directions, self.batch, self.hidden
        leading = (b, self.steps) if self.batch_first else (self.steps, b)
        out, states = torch.randn(*leading, d * h).to(dtype), torch.randn(2, d, b, h).to(dtype)
        return out, states[0], states[1] if self.mode == "LSTM" else None


WEIGHTS = [f"{name}{end}" for end in ("", "_r") for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")]
INPUTS = ["x", "h0", "c0", *WEIGHTS]


def loop(layer: Layer, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """(out, h_n, c_n or None) by one step after the other, in the dtype of the tensors."""
    x = tensors["x"].transpose(0, 1) if layer.batch_first else tensors["x"]
    reset, lengths = tensors.get("reset"), tensors.get("lengths")
    if reset is not None and layer.batch_first:
        reset = reset.t()
    zero = x.new_zeros(layer.batch, layer.hidden)
    outs, hs, cs = [], [], []
    for d, end in enumerate(("", "_r")[: layer.directions]):
        w_ih, w_hh = tensors[f"w_ih{end}"], tensors[f"w_hh{end}"]
        b_ih, b_hh = tensors.get(f"b_ih{end}"), tensors.get(f"b_hh{end}")
        h = tensors["h0"][d] if "h0" in tensors else zero
        c = tensors["c0"][d] if "c0" in tensors else zero
        steps = range(layer.steps)
        found = [zero] * layer.steps
        for t in reversed(steps) if d else steps:
            valid = torch.ones_like(zero[:, :1]).bool() if lengths is None else (t < lengths)[:, None]
            if reset is None:
                before_h, before_c = h, c
            else:
                before_h, before_c = (s.where(~reset[t][:, None], zero) for s in (h, c))
            of_x = torch.nn.functional.linear(x[t], w_ih, b_ih).chunk(layer.gates, 1)
            of_h = torch.nn.functional.linear(before_h, w_hh, b_hh).chunk(layer.gates, 1)
            if layer.mode == "LSTM":
                i, f, g, o = (a + b for a, b in zip(of_x, of_h, strict=True))
                new_c = torch.sigmoid(f) * before_c + torch.sigmoid(i) * torch.tanh(g)
                new_h = torch.sigmoid(o) * torch.tanh(new_c)
                c = new_c.where(valid, c)
            else:
                r, z = (torch.sigmoid(a + b) for a, b in zip(of_x[:2], of_h[:2], strict=True))
                n = torch.tanh(of_x[2] + r * of_h[2])
                new_h = (1 - z) * n + z * before_h
            h = new_h.where(valid, h)
            found[t] = new_h.where(valid, zero)
        outs.append(torch.stack(found))
        hs.append(h)
        cs.append(c)
    out = torch.cat(outs, -1)
    out = out.transpose(0, 1) if layer.batch_first else out
    return out, torch.stack(hs), torch.stack(cs) if layer.mode == "LSTM" else None


def by_loop(layer: Layer, tensors: dict[str, Tensor], grads, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients of :func:`loop` in a dtype."""
    leaves = {
        name: t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    results = loop(layer, leaves)
    pairs = [(r, g.to(dtype)) for r, g in zip(results, grads, strict=True) if g is not None]
    wanted = [name for name in INPUTS if name in leaves]
    found = torch.autograd.grad(
        [r for r, _ in pairs], [leaves[name] for name in wanted], [g for _, g in pairs]
    )
    named = dict(zip(("out", "h_n", "c_n"), (r for r in results if r is not None), strict=False))
    return {name: r.detach() for name, r in named.items()} | dict(
        zip((f"d{name}" for name in wanted), found, strict=True)
    )


class Kernels:
    """The host functions of the kernels, and where their tensors have to be."""

    def __init__(self, module, device: str):
        self.module, self.device = module, device

    def __call__(self, layer: Layer, tensors, grads, needs=(True, True, True)) -> dict[str, Tensor]:
        """Results and gradients under the names of :func:`by_loop`."""
        there = {name: _moved(t, self.device) for name, t in tensors.items()}
        grads = [None if g is None else _moved(g, self.device) for g in grads]
        inputs = [there.get(name) for name in INPUTS]
        masks = there.get("reset"), tensors.get("lengths")
        mode = {"LSTM": 0, "GRU": 1}[layer.mode]
        out, h_n, c_n, saved = self.module.forward(*inputs, *masks, mode, layer.batch_first, True)
        alone = self.module.forward(*inputs, *masks, mode, layer.batch_first, False)
        assert alone[3].shape == (0,) and all(map(torch.equal, alone[:3], (out, h_n, c_n)))
        assert out.is_contiguous() and out.dtype == there["x"].dtype
        named = {"out": out, "h_n": h_n} | ({"c_n": c_n} if layer.mode == "LSTM" else {})
        if layer.mode == "GRU":
            assert c_n.shape == (0,)
        found = self.module.backward(*grads, *inputs, *masks, out, saved, mode, layer.batch_first, *needs)
        needed = dict(zip(INPUTS, [needs[0], *[needs[1]] * 2, *[needs[2]] * 10], strict=True))
        for name, g in zip(INPUTS, found, strict=True):
            if name in there and needed[name]:
                assert g.is_contiguous()
                named[f"d{name}"] = g
            else:
                assert g.shape == (0,), name
        return {name: t.cpu() for name, t in named.items()}


def _moved(t: Tensor, device: str) -> Tensor:
    """The tensor on a device with the strides it has."""
    if device == "cpu":
        return t
    flat = torch.as_strided(t, [t.untyped_storage().nbytes() // t.element_size()], [1], 0)
    return flat.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def _interpreted():
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec = importlib.util.spec_from_file_location("interpreted_recurrent", KERNELS)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request):
    if request.param == "cuda":
        from cnnlstm_fast.kernels import recurrent

        yield Kernels(recurrent, "cuda")
        return
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    interpreter_builder.options = replace(options, sanitize_overflow=False)  # triples every operation
    yield Kernels(_interpreted(), "cpu")
    interpreter_builder.options = options


@pytest.fixture(autouse=True)
def _float32_means_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")


@pytest.fixture(params=["resident", "streamed"])
def weights(request, kernels, monkeypatch):
    """Where the recurrent weights are: the sizes of these tests would keep all of them on chip."""
    if request.param == "streamed":
        monkeypatch.setattr(kernels.module, "RESIDENT_BYTES", 0)
    return request.param


def assert_layer(kernels, layer: Layer, dtype: torch.dtype, change=lambda name, t: t) -> dict[str, Tensor]:
    """Results and gradients as near to float64 as PyTorch's own; returns them.

    ``change`` gives the tensors (also "grad_out") other strides.
    """
    tensors = {name: change(name, t) for name, t in layer.tensors(dtype).items()}
    grads = layer.grads(dtype)
    grads = (change("grad_out", grads[0]), *grads[1:])
    found = kernels(layer, tensors, grads)
    true, own = (by_loop(layer, tensors, grads, to) for to in (torch.float64, dtype))
    assert found.keys() == true.keys()
    for name, mine in found.items():
        assert_close_as_torch(mine, own[name], true[name], f"{name} of {layer}")
    return found


def _random_layers(count: int, most: int = 40, steps: int = 7):
    rng = random.Random(f"{SEED} recurrent {count}")
    found = []
    for _ in range(count):
        mode = rng.choice(("LSTM", "GRU"))
        found.append(
            Layer(
                mode,
                batch=rng.choice((1, 2, 5, 16, 17)),
                steps=rng.choice((1, 2, 3, steps)),
                width=rng.choice((1, 3, 16, 19, most)),
                hidden=rng.choice((1, 5, 16, 17, most)),
                directions=rng.choice((1, 2)),
                batch_first=rng.random() < 0.5,
                bias=rng.random() < 0.8,
                state=rng.choice(("none", "h", "both", "both") + ("c",) * (mode == "LSTM")),
                reset=rng.random() < 0.7,
                lengths=rng.random() < 0.7,
            )
        )
    return pytest.mark.parametrize("layer", found, ids=[str(i) for i in range(count)])


@dtypes
@_random_layers(8)
def test_random_layers_are_as_near_to_float64_as_torch(kernels, weights, layer, dtype):
    assert_layer(kernels, layer, dtype)
